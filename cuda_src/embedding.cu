// Embedding: out[t, :] = table[ids[t], :]; an id -1 - r stands for previous[r], a token drawn in the step before.
//
// Shapes: ids [tokens]; previous [rows] or null; table [vocab_size, hidden_size]; out [tokens, hidden_size].
// One block a token; each thread copies vectors of SIZE elements (SIZE = 1 where rows are not whole vectors).
// Bytes: reads and writes each row once.
//
// Measured (H200, bf16, launches of one graph): 1 x 1024 0.80 us, 256 x 4096 1.60 us, 16384 x 4096 66.5 us, 4.0 TB/s.
#include "common.cuh"

template <typename T, int SIZE>
__global__ void __launch_bounds__(256) embedding(
    const int32_t* ids, const int32_t* previous, const T* __restrict__ table, T* out, int hidden_size) {
    using V = Vec<T, SIZE>;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    int id = ids[blockIdx.x];
    if (id < 0) id = previous[-1 - id];
    const T* source = table + int64_t(id) * hidden_size;
    T* target = out + int64_t(blockIdx.x) * hidden_size;
    for (int i = threadIdx.x * SIZE; i < hidden_size; i += blockDim.x * SIZE)
        V::load_readonly(source + i).store(target + i);
}
