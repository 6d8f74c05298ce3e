// y = x W^T + b by Hopper's tensor cores for some rows; gemm_swiglu_sm90 makes silu(first half of y) * second half.
//
// Shapes: x [num_rows, in_features]; W [out_features, in_features], both with rows of whole 16-byte vectors; y
// [num_rows, out_features], out_features a multiple of 8. T has 16 bits; sums are float, rounded to T once.
//
// Who does what: a block makes 128 outputs for ROWS rows of x; the blocks of a cluster share the columns. One thread
// lets the copy engine fill a ring with W and x, 64 columns a stage; two warpgroups multiply 64 outputs each. W is the
// A of the product and x its B, which may be narrow: y^T = W x^T wastes little on small batches. In the end each block
// of the cluster adds up the sums of its part of the rows, and a thread finishes 8 neighbouring outputs and the 8 that
// are 64 further on: with SwiGLU the ups of these gates.
//
// A block starts while the kernel in front still runs (pdl), and fills its ring with W meanwhile.
//
// Bytes: W once for each ROWS rows of x; x once for each 128 outputs, from the L2 cache.
//
// H200, bf16, rms_norm and product in turn, the weights of 28 (10 for the last three) layers after one another in one
// graph, us a pair; cuBLASLt, or gemv.cu up to 8 rows, in brackets (with silu_and_mul where it says SwiGLU):
//                              8 rows         16             32             64            128            256
//   1024 x 2048             4.82 (4.39)   4.65 (4.98)   5.34 (8.07)   6.38 (8.16)   7.60 (8.51)   8.59 (9.05)
//   1024 x 3072             4.83 (5.92)   5.38 (6.70)   6.36 (8.73)   7.66 (8.98)   8.94 (9.31)   10.4 (10.7)
//   6144 x 1024, SwiGLU     6.18 (7.32)   6.51 (7.42)   7.00 (9.12)   8.02 (9.32)   8.96 (9.32)   12.0 (11.1)
//   4096 x 4096             13.6 (12.8)   13.6 (15.4)   14.2 (16.1)   14.3 (15.1)   18.8 (17.1)   21.3 (20.4)
//   24576 x 4096, SwiGLU    53.9 (59.0)   53.2 (53.1)   52.6 (53.7)   56.1 (55.6)   68.6 (60.0)    116 (78.5)
//   4096 x 12288            29.0 (30.1)   31.3 (31.3)   31.6 (32.4)   31.9 (34.5)   45.1 (37.1)   52.6 (48.7)
//   (rms_norm alone: 1.1 to 1.4, in the last row 2.1 to 4.8)
//
// Where the time goes (time stamps; 1024 x 2048, 128 rows by 64, 4 blocks a cluster): 0.4 us from the wait to the first
// x, 1.8 multiplying (0.23 a step: shared memory is written and read at its full rate), 1.5 for the cluster's sums,
// the rest between the kernels. Beyond 128 rows the L2 cache has to send W to several blocks; a cluster that shares it
// (multicast) would mend that.
// Tried (1024 x 2048, 128 rows): each block reading its part of the sums from the others' shared memory, instead of
// getting it, 8.35; with that, rms_norm letting this kernel start only after its own wait 8.68, and then half the ring,
// two blocks a multiprocessor, 8.96; wgmma_wait<2> the same.
#include "cluster.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

constexpr int OUTPUTS = 128;  // of a block: twice the M of a wgmma
constexpr int MULTIPLIERS = 256, THREADS = MULTIPLIERS + WARP_SIZE;

// The sums of x W^T for rows first_row.. of x and outputs first_output.. and second_output.. (64 each). For each row,
// each of 8 threads calls
//     finish(row, column, first, second)
// once, in one of the cluster's blocks, with the sums of the 8 outputs from first_output + column and from
// second_output + column on.
// Shared memory: sums, float [ROWS][OUTPUTS + 4]; then, at a multiple of 1024, the ring of `stages`.
template <typename T, int ROWS, typename Finish>
__device__ inline void product(const TensorMap& x_map, const TensorMap& w_map, int first_output, int second_output,
                               int first_row, int num_rows, int in_features, int stages, Finish finish) {
#ifdef HAS_WGMMA
    constexpr int COLUMNS = 64, MAX_STAGES = 16;  // of a step: a swizzled row
    constexpr int SUM_ROW = OUTPUTS + 4;          // floats, padded, so that fragments meet no bank twice
    constexpr int HALF_BYTES = OUTPUTS / 2 * SWIZZLE_ROW, STAGE_BYTES = 2 * HALF_BYTES + ROWS * SWIZZLE_ROW;
    extern __shared__ __align__(16) float sums[];
    __shared__ __align__(8) uint64_t barriers[2][MAX_STAGES];

    const uint32_t ring = align_up(shared_address(sums + ROWS * SUM_ROW), 1024u);
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    const int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
    const int rank = cluster_rank(), num_ranks = cluster_size();  // a power of two, at most ROWS
    const int num_steps = div_ceil(in_features, COLUMNS);
    const int first_step = num_steps * rank / num_ranks, count = num_steps * (rank + 1) / num_ranks - first_step;

    if (threadIdx.x == MULTIPLIERS) {
        prefetch_tensor_map(w_map);
        prefetch_tensor_map(x_map);
        for (int i = 0; i < stages; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, MULTIPLIERS / WARP_SIZE);
        }
        fence_proxy_async();
    }
    __syncthreads();
    cluster_arrive();  // that all blocks have started is waited for before they write to one another
    griddepcontrol_launch_dependents();

    float c[ROWS / 8][4] = {};  // y^T: rows are outputs
    if (threadIdx.x == MULTIPLIERS) {
        const auto load_w = [&](int step, int stage) {
            const uint32_t place = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
            mbarrier_arrive_expect(barrier, STAGE_BYTES);
            copy_box(place, w_map, (first_step + step) * COLUMNS, first_output, barrier);
            copy_box(place + HALF_BYTES, w_map, (first_step + step) * COLUMNS, second_output, barrier);
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
    }
    __syncwarp();
    if (warp < MULTIPLIERS / WARP_SIZE) {
        int stage = 0, parity = 0, last_stage = 0;
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
            if (i > 0 && lane == 0) mbarrier_arrive(empty + 8 * last_stage);
            last_stage = stage;
            if (++stage == stages) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        pin(c);
    }

    // ---- the cluster's sums: each block gets a share of the rows from all of them, [num_ranks][share][SUM_ROW] ----
    const int share = ROWS / num_ranks, share_bits = 31 - __clz(share);
    cluster_wait();
    if (warp < MULTIPLIERS / WARP_SIZE) {
        const uint32_t own = shared_address(sums + rank * share * SUM_ROW + warp * 16 + lane / 4);
#pragma unroll
        for (int i = 0; i < ROWS / 8; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int row = i * 8 + lane % 4 * 2 + j;
                const uint32_t place = own + (row & (share - 1)) * (SUM_ROW * sizeof(float));
                const uint32_t there = cluster_address(place, row >> share_bits);
                cluster_store(there, c[i][j]);
                cluster_store(there + 8 * sizeof(float), c[i][2 + j]);
            }
        }
    }
    cluster_arrive();
    cluster_wait();

    if (warp < MULTIPLIERS / WARP_SIZE) {
        const int column = threadIdx.x % 8 * 8, valid = min(share, num_rows - first_row - rank * share);
        for (int i = threadIdx.x / 8; i < valid; i += MULTIPLIERS / 8) {
            float first[8] = {}, second[8] = {};
            const float* place = sums + i * SUM_ROW + column;
#pragma unroll 2
            for (int r = 0; r < num_ranks; r++, place += share * SUM_ROW) {
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const auto a = Vec<float>::load(place + j), b = Vec<float>::load(place + OUTPUTS / 2 + j);
#pragma unroll
                    for (int e = 0; e < 4; e++) first[j + e] += a[e], second[j + e] += b[e];
                }
            }
            finish(first_row + rank * share + i, column, first, second);
        }
    }
#endif
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(THREADS, 2) gemm_sm90(
    T* y, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
    const T* __restrict__ bias, int num_rows, int out_features, int in_features, int stages) {
    const int first_output = blockIdx.x / cluster_size() * OUTPUTS;
    product<T, ROWS>(
        x_map, w_map, first_output, first_output + OUTPUTS / 2, blockIdx.y * ROWS, num_rows, in_features, stages,
        [&](int row, int column, const float(&first)[8], const float(&second)[8]) {
            const auto store = [&](int output, const float(&sums)[8]) {
                if (output >= out_features) return;
                Vec<T> result;
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    result[j] = from_float<T>(bias != nullptr ? sums[j] + to_float(bias[output + j]) : sums[j]);
                }
                result.store(y + static_cast<int64_t>(row) * out_features + output);
            };
            store(first_output + column, first);
            store(first_output + column + OUTPUTS / 2, second);
        });
}

// y [num_rows, out_features / 2] = silu(first half) * second half, both rounded to T before.
template <typename T, int ROWS>
__global__ void __launch_bounds__(THREADS, 2) gemm_swiglu_sm90(
    T* y, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const T* __restrict__ bias,
    int num_rows, int out_features, int in_features, int stages) {
    const int num_outputs = out_features / 2, first_output = blockIdx.x / cluster_size() * (OUTPUTS / 2);
    product<T, ROWS>(
        x_map, w_map, first_output, num_outputs + first_output, blockIdx.y * ROWS, num_rows, in_features, stages,
        [&](int row, int column, const float(&gates)[8], const float(&ups)[8]) {
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
