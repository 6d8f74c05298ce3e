// CARD
#include "mma.cuh"

// ---- tensor cores: 16-bit types, up to 16 rows of x --------------------------------------------------------------

// Eight neighbouring 16-bit values: `valid` or zeros.
template <typename T>
__device__ inline uint4 load_chunk(const T* p, bool valid) {
    return valid ? __ldg(reinterpret_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0);
}

template <typename T, typename Out, int TILES, int WARPS, int UNROLL, bool WIDE>
__global__ void __launch_bounds__(WARPS * WARP_SIZE) gemv_mma(
    Out* __restrict__ y, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
    int num_rows, int out_features, int in_features) {
    constexpr int STEP = 32;              // columns of a warp's chunk of the weight: 4 lanes, 8 values each
    constexpr int OUTPUTS = 8 * TILES;    // weight rows of a block
    constexpr int MAX_ROWS = WIDE ? 16 : 8;
    __shared__ float partial[WARPS][MAX_ROWS][OUTPUTS];

    griddepcontrol_launch_dependents();
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

template <typename T, typename Out, int ROWS, int SIZE>
__global__ void __launch_bounds__(256) gemv(
    Out* __restrict__ y, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
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
            const V v = V::load_readonly(x_rows[r] + k);
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
