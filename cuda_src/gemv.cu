// y = x W^T + b for few rows: x [num_rows, in_features], W [out_features, in_features], y [num_rows, out_features].
//
// The time is that of reading W once. Sums are float; T is the type of x, W and b, Out that of y.
//
// gemv_mma (16-bit types, up to 16 rows, rows of whole 16-byte vectors): tensor cores, so that 16 rows cost hardly more
// than one. y^T is computed as products m16n8k16 whose A is x (16 rows, the missing ones zero) and whose B is 8 rows of
// W. A lane loads 16 bytes of its row of W and 16 of its rows of x at the same columns: 8 values, two products. Which
// columns a product calls its k-th does not matter as long as A and B agree, so nothing is rearranged. A block has
// 8 TILES outputs; its WARPS warps take steps of 32 columns in turn and add up their sums in shared memory at the end.
//
// gemv (any type and size): a warp for each output, ROWS rows at once, SIZE values a load.
//
// Both may start before the kernel in front has ended (pdl). gemv_mma then loads its first part of W while it waits,
// so W must not be what that kernel writes.
//
// H200, bf16, replayed from a graph, cold L2, us for 1 / 8 / 16 rows, beside cuBLASLt's best heuristic:
//
//   out x in         tile, M <= 8   gemv_mma              cuBLASLt              TB/s of W at 1 row
//   4096 x 1024      2, 8, 4        3.13 / 3.59 / 3.97    4.97 / 4.99 / 5.03    2.7
//   1024 x 2048      1, 16, 4       2.52 / 2.91 / 3.40    10.1 / 5.59 / 5.60    1.7
//   6144 x 1024      1, 8, 2        4.53 / 5.01 / 5.09    5.90 / 5.65 / 5.69    2.8
//   1024 x 3072      1, 16, 4       3.65 / 4.05 / 4.95    6.75 / 6.77 / 6.97    1.7
//   6144 x 4096      1, 8, 2        15.1 / 16.5 / 27.4    16.2 / 16.0 / 16.2    3.3
//   4096 x 4096      2, 16, 2       10.2 / 11.2 / 13.1    12.8 / 12.8 / 12.9    3.3
//   24576 x 4096     1, 16, 4       52.3 / 57.0 / 70.4    49.9 / 54.0 / 50.0    3.8
//   4096 x 12288     2, 16, 2       27.9 / 29.9 / 34.1    30.4 / 30.3 / 29.1    3.6
//   151936 x 1024    1, 8, 2        72.5 / 78.2 / 82.4    74.9 / 77.9 / 79.0    4.3
//
// float32, gemv, 1 / 4 / 8 rows: 4096 x 1024 6.2 / 6.9 / 12.8 (cuBLASLt 7.1 / 8.9 / 13.4); 24576 x 4096 95 / 112 / 201
// (112 / 144 / 229); 1024 x 3072 9.4 / 13.4 / 14.7 (5.8 / 15.8 / 19.2).
//
// Tried: a grid of 1 to 4 blocks a multiprocessor that walks over the outputs and loads across their borders: 4.12 us
// for 6144 x 1024, no better or slower elsewhere. gemv with 16-byte loads for bf16 and one row: 14.9, 51.9 and 28.7 us
// for 6144 x 4096, 24576 x 4096 and 4096 x 12288, but 4.1 and 5.6 for 1024 x 2048 and 1024 x 3072, and twice that for
// 8 rows. Without pdl, tile 2, 8, 2: 4.61 instead of 4.06 us for 4096 x 1024.
#include "mma.cuh"

// ---- tensor cores: 16-bit types, up to 16 rows of x --------------------------------------------------------------

// Eight neighbouring 16-bit values, or zeros. An ordinary load: the kernel in front may still write x when this one
// starts, which loads through the read-only cache (__ldg, or of a const __restrict__ pointer) do not allow.
template <typename T>
__device__ inline uint4 load_chunk(const T* p, bool valid) {
    return valid ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
}

// UNROLL steps of a warp are loaded while the UNROLL before are multiplied. WIDE: more than 8 rows.
template <typename T, typename Out, int TILES, int WARPS, int UNROLL, bool WIDE>
__global__ void __launch_bounds__(WARPS * WARP_SIZE) gemv_mma(
    Out* y, const T* x, const T* __restrict__ weight, const T* __restrict__ bias,
    int num_rows, int out_features, int in_features) {
    constexpr int STEP = 32;  // columns a warp takes at once: 4 lanes, 8 values each
    constexpr int OUTPUTS = 8 * TILES;
    constexpr int MAX_ROWS = WIDE ? 16 : 8;
    __shared__ float partial[WARPS][MAX_ROWS][OUTPUTS];

    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int group = lane / 4, pair = lane % 4 * 2, first_output = blockIdx.x * OUTPUTS;

    // Rows beyond the last are loaded as the last; their results are not stored.
    const T* weight_rows[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const int output = min(first_output + 8 * tile + group, out_features - 1);
        weight_rows[tile] = weight + static_cast<int64_t>(output) * in_features;
    }
    const auto column = [&](int step) { return step * STEP + lane % 4 * 8; };
    const auto load_weights = [&](int first_step, uint4 (&w)[UNROLL][TILES]) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int k = column(first_step + u * WARPS);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                w[u][tile] = k < in_features ? __ldcs(reinterpret_cast<const uint4*>(weight_rows[tile] + k))
                                             : make_uint4(0, 0, 0, 0);
            }
        }
    };

    float sums[TILES][4] = {};
    uint4 w[UNROLL][TILES];
    load_weights(warp, w);
    griddepcontrol_wait();  // the weights are nobody's output, x is
    griddepcontrol_launch_dependents();
    for (int step = warp; step * STEP < in_features; step += UNROLL * WARPS) {
        uint4 next[UNROLL][TILES];
        load_weights(step + UNROLL * WARPS, next);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int k = column(step + u * WARPS);
            const uint4 a = load_chunk(x + group * in_features + k, group < num_rows && k < in_features);
            uint4 b = make_uint4(0, 0, 0, 0);
            if (WIDE) b = load_chunk(x + (group + 8) * in_features + k, group + 8 < num_rows && k < in_features);
            const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                mma<T>(sums[tile], first, w[u][tile].x, w[u][tile].y);
                mma<T>(sums[tile], second, w[u][tile].z, w[u][tile].w);
            }
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) w[u][tile] = next[u][tile];
        }
    }

#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int i = 0; i < (WIDE ? 4 : 2); ++i) {
            partial[warp][group + i / 2 * 8][8 * tile + pair + i % 2] = sums[tile][i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_rows * OUTPUTS; i += WARPS * WARP_SIZE) {
        const int row = i / OUTPUTS, output = i % OUTPUTS;
        if (first_output + output >= out_features) continue;
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; ++v) sum += partial[v][row][output];
        if (bias != nullptr) sum += to_float(bias[first_output + output]);
        y[static_cast<int64_t>(row) * out_features + first_output + output] = from_float<Out>(sum);
    }
}

// ---- any type and size ---------------------------------------------------------------------------------------------

// Blocks in y take ROWS rows each.
template <typename T, typename Out, int ROWS, int SIZE>
__global__ void __launch_bounds__(256) gemv(
    Out* y, const T* x, const T* __restrict__ weight, const T* __restrict__ bias,
    int num_rows, int out_features, int in_features) {
    using V = Vec<T, SIZE>;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int lane = threadIdx.x % WARP_SIZE;
    const int output = (blockIdx.x * blockDim.x + threadIdx.x) / WARP_SIZE;
    const int first_row = blockIdx.y * ROWS;
    if (output >= out_features) return;
    const T* weight_row = weight + static_cast<int64_t>(output) * in_features;
    const T* x_rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        x_rows[r] = x + static_cast<int64_t>(min(first_row + r, num_rows - 1)) * in_features;
    }

    float sums[ROWS] = {};
#pragma unroll 4
    for (int k = lane * SIZE; k < in_features; k += WARP_SIZE * SIZE) {
        const V w = V::load_streaming(weight_row + k);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const V v = V::load(x_rows[r] + k);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) sums[r] += to_float(w[i]) * to_float(v[i]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float sum = warp_reduce_sum(sums[r]);
        if (bias != nullptr) sum += to_float(bias[output]);
        if (lane == r && first_row + r < num_rows) {
            y[static_cast<int64_t>(first_row + r) * out_features + output] = from_float<Out>(sum);
        }
    }
}
