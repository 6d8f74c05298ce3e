// y = h W^T + b for up to 8 rows, with what stands around a projection in a decoder layer:
//
//   h = x, or with NORM: s = x + residual, rounded to T; h = s / sqrt(mean(s^2) + eps) * norm_weight, rounded to T
//   y, or with SWIGLU: silu(first half of y) * second half, both rounded to T before
//
// Shapes: x, residual, sum (s, written by block 0; null without residual) [num_rows, in_features]; W [out_features,
// in_features], rows of whole 16-byte vectors; y [num_rows, out_features], half as wide with SWIGLU. T has 16 bits.
//
// A decode step is a chain of such kernels, each of which may take less time than a launch and a trip to memory. So a
// block starts while the kernel in front still runs (pdl) and loads what it can of W meanwhile, into a ring in shared
// memory: in small models all that it needs. Then it waits for x, makes h (every block for itself: that is cheaper than
// a launch), and multiplies.
//
// Who does what: a block takes neighbouring tiles of 8 HALVES outputs (with SWIGLU 8 gates and their 8 ups). Its WARPS
// warps split the columns; a lane copies 16 bytes of W into its own places in the ring (cp.async), so nobody waits for
// anybody until the warps' sums are added up. Products are m16n8k16 on tensor cores, A being W and B being h^T, whose
// 8 columns are the rows of x, over again where there are fewer; the k-th column of a product may be any, as long as A
// and B agree, so nothing is rearranged. With SWIGLU rows 0 to 7 of A are gates, 8 to 15 ups.
//
// Bytes: W once; x, and the residual with NORM, once a block, from the L2 cache.
//
// H200, bf16, launches with the weights of 28 or 36 layers in turn, replayed as a graph, us a launch; beside them
// add_rms_norm, gemv.cu and silu_and_mul apart:
//                                          1 row          2              4              8
//   norm, 4096 x 1024                  4.45 (4.50)    4.40 (4.60)    4.48 (4.63)    5.44 (4.76)
//         1024 x 2048                  2.78 (2.55)    2.92 (2.58)    3.13 (2.68)    3.76 (2.75)
//   norm, 6144 x 1024, SwiGLU          5.71 (6.60)    5.78 (6.81)    5.61 (6.87)    6.88 (7.16)
//         1024 x 3072                  3.40 (3.85)    3.67 (4.01)    3.86 (4.19)    5.10 (4.51)
//   norm, 6144 x 4096                 13.25 (16.2)   14.31 (16.5)   16.6 (17.0)    20.4 (17.8)
//         4096 x 4096                  8.22 (9.78)    8.45 (10.1)    9.6 (10.3)    10.8 (10.6)
//   norm, 24576 x 4096, SwiGLU        48.0 (53.7)    48.9 (55.2)    51.4 (56.3)    55.6 (58.8)
//         4096 x 12288                24.4 (26.4)    25.2 (26.8)    26.8 (27.5)
//   Nothing to do (64 x 64)            1.5, with norm 2.1 (1.2, 2.0)
//
// Where the time goes: the kernel behind starts in time, and then its copies stand in the way. Until they have been
// handed to memory, loads and stores of both kernels queue behind them in the multiprocessor's one pipe for both:
// time stamps show that multiplying and adding up takes 1.1 us instead of some tenths, and that the kernel behind is
// released 0.7 to 2.3 us after the last block has ended, the later the more it is loading. Therefore the registers
// that the norm takes are not limited: two blocks on a multiprocessor, one loading, were slower.
//
// Tried (us for a step of Qwen3-0.6B, one row, attention and logits included; the same day's best 620, apart 770):
// weights fetched after the wait 814. 8 warps 643, two such blocks a multiprocessor 631. Blocks of 16 warps limited to
// 64 registers 657. A kernel in front also telling the L2 cache what comes next but one (cp.async.bulk.prefetch):
// 695 instead of 657. Copies throttled to 64 KiB under way 653. A division of L1 and shared memory that neighbouring
// kernels do not share 679 instead of 643: they then run one after the other. Norm and residual in registers instead
// of shared memory is not to be had for rows of any length. The copy engine (cp.async.bulk, an mbarrier, one warp that
// loads), so that copies leave the load and store pipe alone: predicted 350 to 450, measured 694 against 626 in that
// run (644 with the weights fetched late, so it does not overlap more; the 8B shape 5516 against 4125 for 4 rows).
#include "mma.cuh"

constexpr int WARPS = 16, THREADS = WARPS * WARP_SIZE;
constexpr int CHUNK = 32;   // columns that a warp takes with one load: 4 lanes, 8 values each
constexpr int CHUNKS = 2;   // neighbouring chunks of a step
constexpr int BUFFERS = 4;  // tiles whose sums are added up over the warps together

// The ring has STAGES steps of 8 HALVES outputs, or fewer where a block has no more to do.
// 2^row_bits: num_rows, rounded up; steps: of a warp, for one tile.
template <typename T, typename Out, int HALVES, int STAGES, bool NORM, bool SWIGLU>
__global__ void __launch_bounds__(THREADS) fused_gemv(
    Out* y, T* sum, const T* x, const T* residual, const T* __restrict__ norm_weight, const T* __restrict__ weight,
    const T* __restrict__ bias, int num_rows, int row_bits, int out_features,
    int in_features, int steps, int tiles_per_block, float eps) {
    static_assert(!SWIGLU || HALVES == 2);
    constexpr int OUTPUTS = SWIGLU ? 8 : 8 * HALVES;  // of a tile
    constexpr int BATCH = 4;                        // vectors of x that wait for memory together
    using V = Vec<T>;
    extern __shared__ __align__(16) uint8_t shared[];
    __shared__ __align__(16) float squares_of_warps[8][WARPS];

    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int group = lane / 4, quad = lane % 4;
    const int rows = 1 << row_bits, row = group & (rows - 1);
    const int num_outputs = SWIGLU ? out_features / 2 : out_features;
    const int first_tile = blockIdx.x * tiles_per_block;
    const int last_tile = min(first_tile + tiles_per_block, div_ceil(num_outputs, OUTPUTS));

    // Shared memory: the ring [stages][CHUNKS][HALVES][THREADS], x [chunks][rows][4], the norm's weight [chunks][4],
    // all in units of 16 bytes; the sums of the warps, float [BUFFERS][WARPS][rows][8 HALVES].
    uint4* ring = reinterpret_cast<uint4*>(shared);
    uint4* x_shared = ring + min(STAGES, tiles_per_block * steps) * (CHUNKS * HALVES * THREADS);
    uint4* norm_shared = x_shared + steps * (WARPS * CHUNKS * 4 << row_bits);
    float* partial = reinterpret_cast<float*>(norm_shared + (NORM ? steps * (WARPS * CHUNKS * 4) : 0));

    // The warp's i-th chunk of a row. Neighbouring warps read neighbouring chunks.
    const auto chunk_of = [&](int i) { return (i / CHUNKS * WARPS + warp) * CHUNKS + i % CHUNKS; };

    int load_tile = first_tile, load_step = 0, load_slot = 0;
    const auto load_next = [&] {
        if (load_tile < last_tile) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                // Outputs beyond the last are loaded as the last; their results are not stored.
                const int output = min(load_tile * OUTPUTS + group + (SWIGLU ? 0 : 8 * half), num_outputs - 1);
                const int64_t weight_row = SWIGLU ? half * num_outputs + output : output;
#pragma unroll
                for (int c = 0; c < CHUNKS; ++c) {
                    const int k = chunk_of(load_step * CHUNKS + c) * CHUNK + quad * 8;
                    const uint4* slot = ring + ((load_slot * CHUNKS + c) * HALVES + half) * THREADS + threadIdx.x;
                    cp_async_16(shared_address(slot), weight + weight_row * in_features + k, k < in_features);
                }
            }
            if (++load_step == steps) load_step = 0, ++load_tile;
            if (++load_slot == STAGES) load_slot = 0;
        }
        cp_async_commit();
    };
    if (NORM) {
        for (int i = lane; i < steps * CHUNKS * 4; i += WARP_SIZE) {
            const int chunk = chunk_of(i / 4), k = chunk * CHUNK + i % 4 * 8;
            cp_async_16(shared_address(norm_shared + chunk * 4 + i % 4), norm_weight + k, k < in_features);
        }
    }
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) load_next();
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();  // the weights are nobody's output, x and the residual are

    // ---- x to shared memory: each warp the columns that it multiplies ----
    const int chunks = steps * CHUNKS, stride = 8 >> row_bits;
    float squares = 0.0f;
    for (int first = 0; first < chunks; first += BATCH * stride) {
        V values[BATCH], others[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (first + b * stride >= chunks) break;
            const int i = first + b * stride + (group >> row_bits), k = chunk_of(i) * CHUNK + quad * 8;
            const bool valid = i < chunks && k < in_features && row < num_rows;
            values[b] = others[b] = V::from_bits(make_uint4(0, 0, 0, 0));
            if (valid) values[b] = V::load(x + row * in_features + k);
            if (NORM && valid && residual != nullptr) others[b] = V::load(residual + row * in_features + k);
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (first + b * stride >= chunks) break;
            const int i = first + b * stride + (group >> row_bits), chunk = chunk_of(i), k = chunk * CHUNK + quad * 8;
            if (NORM) {
                if (residual != nullptr) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        values[b][j] = from_float<T>(to_float(values[b][j]) + to_float(others[b][j]));
                    }
                    if (blockIdx.x == 0 && i < chunks && row < num_rows && k < in_features) {
                        values[b].store(sum + row * in_features + k);
                    }
                }
#pragma unroll
                for (int j = 0; j < 8; ++j) squares += to_float(values[b][j]) * to_float(values[b][j]);
            }
            if (i < chunks) x_shared[(chunk * rows + row) * 4 + quad] = values[b].to_bits();
        }
    }

    // ---- the norm ----
    if constexpr (NORM) {
        for (int offset = 16; offset >= 4 << row_bits; offset /= 2) {
            squares += __shfl_xor_sync(FULL_MASK, squares, offset);
        }
        squares = warp_reduce_sum<4>(squares);
        if (lane < 4 << row_bits && quad == 0) squares_of_warps[row][warp] = squares;
        __syncthreads();
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; v += 4) {
            const float4 four = *reinterpret_cast<const float4*>(&squares_of_warps[row][v]);
            total += (four.x + four.y) + (four.z + four.w);
        }
        const float scale = fast_rsqrt(__fdividef(total, in_features) + eps);
        cp_async_wait<STAGES - 1>();
        __syncwarp();  // the norm's weight is there
        for (int i = group >> row_bits; i < chunks; i += stride) {
            const int chunk = chunk_of(i);
            uint4& place = x_shared[(chunk * rows + row) * 4 + quad];
            V value = V::from_bits(place);
            const V w = V::from_bits(norm_shared[chunk * 4 + quad]);
#pragma unroll
            for (int j = 0; j < 8; ++j) value[j] = from_float<T>(to_float(value[j]) * scale * to_float(w[j]));
            place = value.to_bits();
        }
    }
    __syncwarp();

    // ---- the product ----
    uint4 w[CHUNKS][HALVES];  // of one step, read from the ring while the step before is multiplied
    const auto read = [&](int slot) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                w[c][half] = ring[((slot * CHUNKS + c) * HALVES + half) * THREADS + threadIdx.x];
            }
        }
    };
    cp_async_wait<STAGES - 1>();
    read(0);
    float sums[2][4] = {};
    int slot = 0, step = 0, buffered = 0;
    for (int tile = first_tile; tile < last_tile;) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const uint4 b = x_shared[(chunk_of(step * CHUNKS + c) * rows + row) * 4 + quad];
            const uint4 low = w[c][0], high = HALVES == 2 ? w[c][HALVES - 1] : make_uint4(0, 0, 0, 0);
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            mma<T>(sums[0], first, b.x, b.y);
            mma<T>(sums[1], second, b.z, b.w);
        }
        load_next();  // to where this step's weights have been
        cp_async_wait<STAGES - 1>();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        const bool is_last = tile + 1 == last_tile && step + 1 == steps;
        if (!is_last) read(slot);
        if (++step < steps) continue;

        // The tile is done: leave the warp's sums; now and then, add up those of all warps.
        step = 0;
        ++tile;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int column = 2 * quad + e % 2, output = group + e / 2 * 8;
            if (column < rows && e / 2 < HALVES) {
                partial[((buffered * WARPS + warp) * rows + column) * (8 * HALVES) + output] = sums[0][e] + sums[1][e];
            }
            sums[0][e] = sums[1][e] = 0.0f;
        }
        if (++buffered < BUFFERS && !is_last) continue;
        __syncthreads();
        for (int i = threadIdx.x; i < buffered * OUTPUTS << row_bits; i += THREADS) {
            const int j = i % OUTPUTS, n = i / OUTPUTS & (rows - 1), buffer = i / OUTPUTS >> row_bits;
            const int output = (tile - buffered + buffer) * OUTPUTS + j;
            if (n >= num_rows || output >= num_outputs) continue;
            const auto add_up = [&](int place, int feature) {
                float totals[4] = {};
#pragma unroll
                for (int v = 0; v < WARPS; ++v) {
                    totals[v % 4] += partial[((buffer * WARPS + v) * rows + n) * (8 * HALVES) + place];
                }
                const float total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
                return bias != nullptr ? total + to_float(bias[feature]) : total;
            };
            float result = add_up(j, output);
            if (SWIGLU) {
                const float gate = to_float(from_float<T>(result));
                result = silu(gate) * to_float(from_float<T>(add_up(j + 8, num_outputs + output)));
            }
            y[static_cast<int64_t>(n) * num_outputs + output] = from_float<Out>(result);
        }
        buffered = 0;
        if (!is_last) __syncthreads();
    }
}
