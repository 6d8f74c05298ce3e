// y = x W^T + b by Hopper's tensor cores for some rows; gemm_swiglu_sm90 makes silu(first half of y) * second half.
//
// Shapes: x [num_rows, in_features]; W [out_features, in_features], both with rows of whole 16-byte vectors; y
// [num_rows, out_features], out_features a multiple of 8. T has 16 bits; sums are float, rounded to T once.
//
// An RMSNorm between two products needs no kernel of its own. norm(t) W^T = r (t * norm) W^T with one number r for each
// row, r = 1 / sqrt(mean(t^2) + eps). The product in front, given `residual` [num_rows, out_features], writes `total`
// t = y + residual as add_rms_norm does, t * norm as its y, and the sums of squares of each 128 elements of t,
// `total_squares` [num_rows, out_features / 128]. The product behind, given these as `x_squares`, multiplies its sums
// by r.
//
// Who does what: a block makes 128 outputs for ROWS rows of x. Neighbours along x in a cluster share the columns;
// neighbours along y share W: each fetches a part of it for all of them, and rows of x of its own. One thread lets the
// copy engine fill a ring with W and x, 64 columns a stage; two warpgroups multiply 64 outputs each. W is the A of the
// product and x its B, which may be narrow: y^T = W x^T wastes little on small batches. In the end each of the blocks
// that share the columns adds up the sums of its part of the rows, and a thread finishes 8 neighbouring outputs and the
// 8 that are 64 further on: with SwiGLU the ups of these gates.
//
// A block starts while the kernel in front still runs (pdl), and fills its ring with W meanwhile.
//
// Bytes: W from the L2 cache once for each ROWS rows of x that do not share it; x once for each 128 outputs.
//
// H200, bf16, rms_norm and product in turn, the weights of 28 (4 to 10 for the last four) layers after one another in
// one graph, us a pair; cuBLASLt in brackets (with silu_and_mul where it says SwiGLU). gemm_sm90.py chooses the cut by
// a cost model, fitted to these and some hundred others; where it is 3 % and more off, the best cut stands behind.
//                              16 rows       32            64            128           192               256
//   1024 x 2048             4.96 (8.23)   5.83 (8.22)   6.55 (8.17)   7.57 (8.32)   8.61 (8.69)       9.28 (8.78)
//   1024 x 3072             5.46 (9.05)   6.51 (8.95)   7.69 (9.14)   8.59 (9.54)   10.4 (10.4)       11.5 (10.7)
//   4096 x 1024             5.20 (7.47)   5.87 (7.58)   7.33 (7.59)   7.77 (7.69)   8.50 (8.32)       8.45 (8.81)
//   6144 x 1024, SwiGLU     6.73 (8.89)   7.70 (9.29)   8.06 (9.04)   8.94 (9.62)   9.71 (10.5)       11.2 (11.3)
//   4096 x 4096                           14.8 (16.0)   15.0 (15.2)   19.4 (17.5)   23.0 (24.4) 20.2  21.3 (20.2)
//   6144 x 4096                           17.5 (19.7)   18.9 (19.6)   20.9 (20.8)   23.5 (25.0)       27.2 (26.4)
//   24576 x 4096, SwiGLU                  55.2 (54.9)   56.2 (57.0)   62.8 (61.9)   75.4 (67.7)       86.0 (80.4)
//   4096 x 12288                          36.6 (34.4)   35.7 (36.4)   47.1 (39.9)   66.3 (49.0) 50.8  59.0 (53.1) 56.8
//   (rms_norm alone: 1.1 to 1.4, in the last row 2.1 to 4.8; 16 rows of the small ones by gemv.cu: 4.98 to 7.42)
//
// Where the time goes (time stamps of an earlier version; 1024 x 2048, 128 rows by 64, 4 blocks a cluster): 0.4 us from
// the wait to the first x, 1.8 multiplying, 1.5 for the cluster's sums, the rest between the kernels. A step takes
// 0.18, 0.19, 0.235 and 0.335 us with 16, 32, 64 and 128 rows: shared memory is written and read at its full rate.
// 128 blocks, each with a multiprocessor to itself, go in one round alone or in clusters of 2, in two in larger ones.
// Tried:
//   128 bytes fetched into L2 at a time instead of 256: no change in layers of Qwen3-0.6B and 8B with 64 to 256 rows
//   256 rows of 4096 x 1024, nobody sharing W: 9.1; four instead of two sharing it: two rounds, 14.1
//   the consumers' arrival at another block's barrier with .release.cluster, which is a fence of all memory in each
//     step: 12.6 to 16 us instead of 8.5; a branch between own and others' barriers instead of one address: 9.3
//   the cluster's sums as single stores into the others' shared memory, behind a releasing barrier, instead of one copy
//     for each block: up to 0.7 us more with splits of 4 and 8 (1024 x 2048, 64 rows: 7.5 instead of 6.8)
//   dividing by the cluster's sizes, and the code for sharing W in tiles that never do (1465 instead of 997
//     instructions with 16 rows): a decode step of Qwen3-0.6B with 8 sequences 0.953 ms instead of 0.933, with 16 1.169
//     (1.138)
//   the norm between two products, one thread making a row's factor before the first step, and what the end needs
//     loaded there: a step of Qwen3-0.6B with 256, 64, 8 sequences 5.66, 2.05, 0.888 ms instead of 5.73, 2.10, 0.910
//     with rms_norm's own launches, but one of Qwen3-8B with 8 5.37 instead of 5.14
//   the same with the norm's weights fetched to shared memory before the block's first barrier: 8B with 8 5.35 instead
//     of 4.99, since the ring's first copies wait for what comes from memory
//   now: 0.6B with 64, 16, 8 sequences 2.06, 1.12, 0.875 ms instead of 2.12, 1.15, 0.910; 8B with 8 5.16 instead of
//     4.97: large weights keep the memory busy while rms_norm runs, so they are left to it
//   a kernel of its own for large weights and many rows: blocks that stay, tiles of 256 rows by 256 outputs shared by
//     two blocks, 64 x 256 wgmma, work cut evenly across tiles (stream-K), SwiGLU in the end. Predicted for 256 rows
//     62 us for 24576 x 4096 with SwiGLU and 34 for 4096 x 12288; measured with rms_norm 88.8 (cuBLASLt and
//     silu_and_mul 80.7) and 54.9 (48.5): a step takes 0.76 us in both, for the GPU is at its power limit, and sums
//     that go by way of memory cost 8 to 12 us. For 16384 rows, each run for a second: 24576 x 4096 5184 us (5170 with
//     silu_and_mul), 6144 x 4096 1283 (1221), 6144 x 1024 with SwiGLU 382 (397)
//   each block reading its part of the sums from the others' shared memory (1024 x 2048, 128 rows): 8.35; with that,
//     rms_norm letting this kernel start only after its own wait 8.68, and then half the ring, two blocks a
//     multiprocessor, 8.96; wgmma_wait<2> the same
#include "cluster.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

constexpr int OUTPUTS = 128;  // of a block: twice the M of a wgmma
constexpr int MULTIPLIERS = 256, THREADS = MULTIPLIERS + WARP_SIZE;

// The sum over 8 neighbouring threads, whatever the others of the warp do.
__device__ inline float sum_of_eight(float x) {
    const unsigned mask = 0xffu << threadIdx.x % WARP_SIZE / 8 * 8;
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) x += __shfl_xor_sync(mask, x, offset);
    return x;
}

// The sums of x W^T for rows first_row.. of x and outputs first_output.. and second_output.. (64 each), multiplied by r
// where there are x_squares. For each row, each of 8 neighbouring threads calls
//     finish(row, column, first, second, prepare(row, column))
// once, in one of the cluster's blocks, with the sums of the 8 outputs from first_output + column and from
// second_output + column on; before all rows, begin(column). What these load arrives while the block waits for others.
// Shared memory, from a multiple of 1024 on: the ring of `stages`, in which this block's sums lie afterwards, float
// [ROWS][OUTPUTS + 4]; behind it, if blocks share the columns, as many sums that it has received.
template <typename T, int ROWS, typename Begin, typename Prepare, typename Finish>
__device__ inline void product(const TensorMap& x_map, const TensorMap& w_map, int first_output, int second_output,
                               int first_row, int num_rows, int in_features, int stages,
                               const float* x_squares, float eps, Begin begin, Prepare prepare, Finish finish) {
#ifdef HAS_WGMMA
    constexpr int COLUMNS = 64, MAX_STAGES = 16;  // of a step: a swizzled row
    constexpr int SUM_ROW = OUTPUTS + 4;          // floats, padded, so that fragments meet no bank twice
    constexpr int HALF_BYTES = OUTPUTS / 2 * SWIZZLE_ROW, STAGE_BYTES = 2 * HALF_BYTES + ROWS * SWIZZLE_ROW;
    constexpr int SUMS_BYTES = ROWS * SUM_ROW * sizeof(float);
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[2][MAX_STAGES], sums_received;

    const uint32_t ring = shared_address(shared), received = shared_address(&sums_received);
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    constexpr bool MAY_SHARE = ROWS >= 64;  // smaller tiles are for batches that fit into one
    const int split = cluster_shape().x, split_bits = log2_of_power(split);  // nothing is divided by it
    const int sharers = MAY_SHARE ? cluster_shape().y : 1;
    const int rank = cluster_place().x, sharer = cluster_place().y;
    const int num_steps = div_ceil(in_features, COLUMNS);
    const int first_step = num_steps * rank >> split_bits, count = (num_steps * (rank + 1) >> split_bits) - first_step;

    if (threadIdx.x == MULTIPLIERS) {
        prefetch_tensor_map(w_map);
        prefetch_tensor_map(x_map);
        for (int i = 0; i < stages; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, sharers * (MULTIPLIERS / WARP_SIZE));
        }
        mbarrier_init(received, 1);
        fence_proxy_async();
        fence_mbarrier_init();
        mbarrier_arrive_expect(received, SUMS_BYTES - (SUMS_BYTES >> split_bits));  // the others' sums
    }
    __syncthreads();
    cluster_arrive_relaxed();
    griddepcontrol_launch_dependents();
    // That all blocks have started is waited for before one writes to another's memory.
    if (sharers > 1) cluster_wait();

    // In the end this block finishes `share` rows, each by 8 threads: a thread takes some turns.
    constexpr int TURNS = div_ceil(ROWS, MULTIPLIERS / 8);
    const int share = ROWS >> split_bits, valid = min(share, num_rows - first_row - rank * share);
    const int column = threadIdx.x % 8 * 8;
    const auto for_each_row = [&](auto f) {  // f(turn, the row's number among those of the block)
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const int i = turn * (MULTIPLIERS / 8) + threadIdx.x / 8;
            if (i < valid) f(turn, i);
        }
    };

    float c[ROWS / 8][4] = {};  // y^T: rows are outputs
    float squares[TURNS] = {};  // this thread's part of them, by turn
    if (threadIdx.x == MULTIPLIERS) {
        const int first_row_of_w = sharer * (OUTPUTS >> log2_of_power(sharers));  // what it fetches for all sharers
        const int own_output = first_row_of_w < OUTPUTS / 2 ? first_output + first_row_of_w
                                                            : second_output + first_row_of_w - OUTPUTS / 2;
        int all_sharers = 0;
        for (int i = 0; i < sharers; i++) all_sharers |= 1 << (i * split + rank);
        const auto load_w = [&](int step, int stage) {
            const uint32_t place = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
            const int column = (first_step + step) * COLUMNS;
            mbarrier_arrive_expect(barrier, STAGE_BYTES);
            if (sharers == 1) {
                copy_box(place, w_map, column, first_output, barrier);
                copy_box(place + HALF_BYTES, w_map, column, second_output, barrier);
            } else {
                copy_box_to(all_sharers, place + first_row_of_w * SWIZZLE_ROW, w_map, column, own_output, barrier);
            }
        };
        const auto load_x = [&](int step, int stage) {
            const uint32_t place = ring + stage * STAGE_BYTES + 2 * HALF_BYTES;
            copy_box(place, x_map, (first_step + step) * COLUMNS, first_row, full + 8 * stage);
        };
        const int ahead = min(stages, count);
        for (int i = 0; i < ahead; i++) load_w(i, i);
        griddepcontrol_wait();  // W is nobody's output, x is
        for (int i = 0; i < ahead; i++) load_x(i, i);
        for (int i = ahead, stage = 0, parity = 0; i < count; i++) {
            mbarrier_wait(empty + 8 * stage, parity);
            load_w(i, stage);
            load_x(i, stage);
            if (++stage == stages) stage = 0, parity ^= 1;
        }
    } else {
        griddepcontrol_wait();
        if (warp < MULTIPLIERS / WARP_SIZE && x_squares != nullptr) {  // they come with the first x
            for_each_row([&](int turn, int i) {
                const int parts = div_ceil(in_features, OUTPUTS);
                const float* of_row = x_squares + (first_row + rank * share + i) * parts;
#pragma unroll 4
                for (int part = threadIdx.x % 8; part < parts; part += 8) squares[turn] += of_row[part];
            });
        }
    }
    __syncwarp();
    if (warp < MULTIPLIERS / WARP_SIZE) {
        int stage = 0, parity = 0;
        uint32_t last_empty = 0;  // of the blocks that fill this one's ring, a lane each
        for (int i = 0; i < count; i++) {
            const uint32_t place = ring + stage * STAGE_BYTES;
            mbarrier_wait(full + 8 * stage, parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < COLUMNS / 16; k++) {
                wgmma<T>(c, matrix_descriptor(place + warp / 4 * HALF_BYTES + k * 32),
                         matrix_descriptor(place + 2 * HALF_BYTES + k * 32), true);
            }
            wgmma_commit();
            wgmma_wait<1>();
            // Only as long as the ring is refilled: who ends may not be written to any more.
            if (i > 0 && i + stages <= count && lane < sharers) {
                if constexpr (MAY_SHARE) {
                    mbarrier_arrive_cluster(last_empty);
                } else {
                    mbarrier_arrive(last_empty);
                }
            }
            last_empty = empty + 8 * stage;
            if (MAY_SHARE) last_empty = cluster_address(last_empty, lane < sharers ? lane * split + rank : 0);
            if (++stage == stages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        pin(c);
    }

    // ---- the sums of the blocks that share the columns: each gets a part of the rows, [split][share][SUM_ROW] ----
    const int others = max(stages * STAGE_BYTES, SUMS_BYTES);
    float* sums = reinterpret_cast<float*>(shared);
    constexpr int AHEAD = TURNS < 2 ? TURNS : 2;  // as many as registers allow
    decltype(prepare(0, 0)) prepared[AHEAD];
    if (sharers == 1) cluster_wait();
    if (warp < MULTIPLIERS / WARP_SIZE) {
        named_barrier<MULTIPLIERS>(1);  // nobody multiplies from the ring any more
        float* own = sums + warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float* place = own + (i * 8 + lane % 4 * 2 + j) * SUM_ROW;
                place[0] = c[i][j];
                place[8] = c[i][2 + j];
            }
        }
        begin(column);
        for_each_row([&](int turn, int i) {
            if (turn < AHEAD) prepared[turn] = prepare(first_row + rank * share + i, column);
        });
        fence_proxy_async();
        named_barrier<MULTIPLIERS>(1);
        if (threadIdx.x < split && threadIdx.x != rank) {
            const int to = sharer * split + threadIdx.x, bytes = SUMS_BYTES >> split_bits;
            copy_to_cluster(cluster_address(ring + others + rank * bytes, to), ring + threadIdx.x * bytes, bytes,
                            cluster_address(received, to));
        }
        mbarrier_wait(received, 0);
    }
    __syncwarp();
    cluster_arrive_relaxed();  // this block has received all that others sent

    if (warp < MULTIPLIERS / WARP_SIZE) {
        for_each_row([&](int turn, int i) {
            float first[8] = {}, second[8] = {};
#pragma unroll 2
            for (int r = 0; r < split; r++) {
                const float* place = sums + (r * share + i) * SUM_ROW + column;
                if (r != rank) place += others / sizeof(float);
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const auto a = Vec<float>::load(place + j), b = Vec<float>::load(place + OUTPUTS / 2 + j);
#pragma unroll
                    for (int e = 0; e < 4; e++) first[j + e] += a[e], second[j + e] += b[e];
                }
            }
            if (x_squares != nullptr) {
                const float scale = fast_rsqrt(sum_of_eight(squares[turn]) / in_features + eps);
#pragma unroll
                for (int j = 0; j < 8; j++) first[j] *= scale, second[j] *= scale;
            }
            const int row = first_row + rank * share + i;
            finish(row, column, first, second, turn < AHEAD ? prepared[turn] : prepare(row, column));
        });
    }
    __syncwarp();
    cluster_wait();  // and others all that it sent
#endif
}

// 8 elements of both halves of a block's outputs.
template <typename T>
struct Residuals {
    Vec<T> halves[2];
};

// residual, total, norm [out_features] and total_squares: all or none.
template <typename T, int ROWS>
__global__ void __launch_bounds__(THREADS, 2) gemm_sm90(
    T* y, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const T* __restrict__ bias,
    const float* x_squares, float eps, const T* residual, T* total, const T* __restrict__ norm, float* total_squares,
    int num_rows, int out_features, int in_features, int stages) {
    const int tile = blockIdx.x >> log2_of_power(cluster_shape().x), first_output = tile * OUTPUTS;
    if (residual != nullptr && threadIdx.x < 2) {  // from memory it may come late, and nothing should wait for it
        prefetch_l2(norm + min(first_output + static_cast<int>(threadIdx.x) * 64, out_features - 8));
    }
    Vec<T> weights[2];  // the norm's
    product<T, ROWS>(
        x_map, w_map, first_output, first_output + OUTPUTS / 2, blockIdx.y * ROWS, num_rows, in_features, stages,
        x_squares, eps,
        [&](int column) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int output = first_output + column + half * (OUTPUTS / 2);
                if (norm != nullptr && output < out_features) weights[half] = Vec<T>::load_readonly(norm + output);
            }
        },
        [&](int row, int column) {
            Residuals<T> residuals;
            const int64_t place = static_cast<int64_t>(row) * out_features + first_output + column;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int more = half * (OUTPUTS / 2);
                if (residual == nullptr || first_output + column + more >= out_features) continue;
                residuals.halves[half] = Vec<T>::load(residual + place + more);
            }
            return residuals;
        },
        [&](int row, int column, const float(&first)[8], const float(&second)[8], const Residuals<T>& residuals) {
            float squares = 0;
            const auto store = [&](int half, const float(&sums)[8]) {
                const int output = first_output + column + half * (OUTPUTS / 2);
                if (output >= out_features) return;
                const int64_t place = static_cast<int64_t>(row) * out_features + output;
                Vec<T> result;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    result[j] = from_float<T>(bias != nullptr ? sums[j] + to_float(bias[output + j]) : sums[j]);
                }
                if (residual != nullptr) {
                    Vec<T> sum;
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        sum[j] = from_float<T>(to_float(result[j]) + to_float(residuals.halves[half][j]));
                        squares += to_float(sum[j]) * to_float(sum[j]);
                        result[j] = from_float<T>(to_float(sum[j]) * to_float(weights[half][j]));
                    }
                    sum.store(total + place);
                }
                result.store(y + place);
            };
            store(0, first);
            store(1, second);
            if (residual != nullptr) {
                squares = sum_of_eight(squares);
                if (column == 0) total_squares[row * div_ceil(out_features, OUTPUTS) + tile] = squares;
            }
        });
}

// y [num_rows, out_features / 2] = silu(first half) * second half, both rounded to T before.
template <typename T, int ROWS>
__global__ void __launch_bounds__(THREADS, 2) gemm_swiglu_sm90(
    T* y, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const T* __restrict__ bias,
    const float* x_squares, float eps, int num_rows, int out_features, int in_features, int stages) {
    const int tile = blockIdx.x >> log2_of_power(cluster_shape().x), first_output = tile * (OUTPUTS / 2);
    const int num_outputs = out_features / 2;
    product<T, ROWS>(
        x_map, w_map, first_output, num_outputs + first_output, blockIdx.y * ROWS, num_rows, in_features, stages,
        x_squares, eps, [](int column) {}, [](int row, int column) { return 0; },
        [&](int row, int column, const float(&gates)[8], const float(&ups)[8], int) {
            const int output = first_output + column;
            if (output >= num_outputs) return;
            Vec<T> result;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float gate = gates[j], up = ups[j];
                if (bias != nullptr) {
                    gate += to_float(bias[output + j]);
                    up += to_float(bias[num_outputs + output + j]);
                }
                result[j] = from_float<T>(silu(to_float(from_float<T>(gate))) * to_float(from_float<T>(up)));
            }
            result.store(y + static_cast<int64_t>(row) * num_outputs + output);
        });
}
