// RMSNorm (Zhang & Sennrich, 2019), alone and with the residual addition in front of it.
//
//   rms_norm:      out = x / sqrt(mean(x^2) + eps) * weight
//   add_rms_norm:  residual = x + residual, rounded to T;  x = rms_norm(residual): both in place
//
// Shapes: x, residual, out [rows, hidden_size]; weight [hidden_size].
// One block a row. Thread t keeps vectors t, t + blockDim.x, ... (VECTORS of them) of the row in registers, so that
// each element is read once: the sum of squares is folded over the block, then the row is scaled and written.
// VECTORS = 0 is the way for rows that are not whole vectors or longer than the registers of a block: element by
// element, reading the row a second time (from the caches).
// Bytes: rms_norm reads and writes the row once each; add_rms_norm does so with two rows.
//
// Measured (H200, bf16, launches of one graph; activations of few rows in L2, of many in memory):
//   rows x hidden_size      1 x 4096   64 x 4096   256 x 4096   16384 x 1024   16384 x 4096       8192 x 8192
//   rms_norm                 1.12 us     1.76 us      2.62 us        20.8 us   66 us, 4.07 TB/s       68.2 us
//   add_rms_norm             1.28 us     2.02 us      3.56 us        33.7 us  135 us, 3.97 TB/s      134.4 us
// What lost: more than one vector a thread for few rows (1 x 4096: 1.28 us with two), one for many (16384 x 4096:
// 77.9 us); no pdl (1 x 4096: 1.67 us); a warp a row (rms_norm of 16384 x 1024 17.9 us, but add_rms_norm, which the
// models run 50 times as often, no faster).
#include "common.cuh"

template <typename T, int VECTORS, bool ADD>
__device__ inline void normalize_vectors(
    const T* x, T* residual, const T* weight, T* out, int hidden_size, float eps) {
    using V = Vec<T>;
    const int num_vectors = hidden_size / V::SIZE;
    V w[VECTORS], row[VECTORS], r[VECTORS];

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int v = i * blockDim.x + threadIdx.x;
        if (v < num_vectors) w[i] = V::load_readonly(weight + v * V::SIZE);
    }
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {  // all loads first: they wait for memory together
        const int v = i * blockDim.x + threadIdx.x;
        if (v < num_vectors) {
            row[i] = V::load(x + v * V::SIZE);
            if (ADD) r[i] = V::load(residual + v * V::SIZE);
        }
    }

    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int v = i * blockDim.x + threadIdx.x;
        if (v >= num_vectors) break;
        if (ADD) {
#pragma unroll
            for (int j = 0; j < V::SIZE; ++j)
                row[i][j] = from_float<T>(to_float(row[i][j]) + to_float(r[i][j]));
            row[i].store(residual + v * V::SIZE);
        }
#pragma unroll
        for (int j = 0; j < V::SIZE; ++j) sum += to_float(row[i][j]) * to_float(row[i][j]);
    }
    const float scale = fast_rsqrt(block_reduce_sum(sum) / hidden_size + eps);

#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int v = i * blockDim.x + threadIdx.x;
        if (v >= num_vectors) break;
#pragma unroll
        for (int j = 0; j < V::SIZE; ++j)
            row[i][j] = from_float<T>(to_float(row[i][j]) * scale * to_float(w[i][j]));
        row[i].store(out + v * V::SIZE);
    }
}

template <typename T, bool ADD>
__device__ inline void normalize_elements(
    const T* x, T* residual, const T* weight, T* out, int hidden_size, float eps) {
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    float sum = 0.0f;
    for (int i = threadIdx.x; i < hidden_size; i += blockDim.x) {
        float value = to_float(x[i]);
        if (ADD) {
            residual[i] = from_float<T>(value + to_float(residual[i]));
            value = to_float(residual[i]);
        }
        sum += value * value;
    }
    const float scale = fast_rsqrt(block_reduce_sum(sum) / hidden_size + eps);
    for (int i = threadIdx.x; i < hidden_size; i += blockDim.x) {
        const float value = to_float(ADD ? residual[i] : x[i]);
        out[i] = from_float<T>(value * scale * to_float(weight[i]));
    }
}

template <typename T, int VECTORS>
__global__ void __launch_bounds__(VECTORS <= 2 ? 1024 : 512) rms_norm(
    const T* x, const T* __restrict__ weight, T* out, int hidden_size, float eps) {
    const int64_t row = int64_t(blockIdx.x) * hidden_size;
    if constexpr (VECTORS > 0)
        normalize_vectors<T, VECTORS, false>(x + row, nullptr, weight, out + row, hidden_size, eps);
    else
        normalize_elements<T, false>(x + row, nullptr, weight, out + row, hidden_size, eps);
}

template <typename T, int VECTORS>
__global__ void __launch_bounds__(VECTORS <= 2 ? 1024 : 512) add_rms_norm(
    T* x, T* residual, const T* __restrict__ weight, int hidden_size, float eps) {
    const int64_t row = int64_t(blockIdx.x) * hidden_size;
    if constexpr (VECTORS > 0)
        normalize_vectors<T, VECTORS, true>(x + row, residual + row, weight, x + row, hidden_size, eps);
    else
        normalize_elements<T, true>(x + row, residual + row, weight, x + row, hidden_size, eps);
}
