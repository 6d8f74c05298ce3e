// SwiGLU's activation (Shazeer, 2020) on the merged projection: out = silu(gate) * up, silu(g) = g / (1 + exp(-g)).
//
// Shapes: gate_up [rows, 2 * intermediate_size], the gate half first; out [rows, intermediate_size].
// Each thread makes SIZE neighbouring outputs of one row (one vector; SIZE = 1 where rows are not whole vectors);
// blocks_per_row blocks share a row.
// Bytes: reads gate_up once, writes half as much.
//
// Measured (H200, bf16, launches of one graph; activations of few rows in L2, of many in memory):
//   rows x intermediate_size   1 x 3072   64 x 3072   256 x 12288   16384 x 3072      8192 x 12288
//                               0.93 us     1.70 us       5.91 us   71.5 us, 4.2 TB/s   140 us, 4.3 TB/s
// What lost: a division rounded to the last bit (16384 x 3072: 167 us, bound by arithmetic); streaming loads (74.1 us);
// blocks of 256 threads (the same).
#include "common.cuh"

template <typename T, int SIZE>
__global__ void __launch_bounds__(256) silu_and_mul(
    const T* gate_up, T* out, int intermediate_size, int blocks_per_row) {
    using V = Vec<T, SIZE>;
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();
    const int64_t row = blockIdx.x / blocks_per_row;
    const int column = (blockIdx.x % blocks_per_row * blockDim.x + threadIdx.x) * SIZE;
    if (column >= intermediate_size) return;

    const T* gate = gate_up + row * 2 * intermediate_size + column;
    V g = V::load(gate);
    const V u = V::load(gate + intermediate_size);
#pragma unroll
    for (int j = 0; j < SIZE; ++j) g[j] = from_float<T>(silu(to_float(g[j])) * to_float(u[j]));
    g.store(out + row * intermediate_size + column);
}
