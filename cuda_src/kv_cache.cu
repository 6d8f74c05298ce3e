// Copies into and within the paged KV cache. Values are moved, never read as numbers, so the kernels know only
// units U of 16 bytes, or of 2 where rows are not whole units, and serve every data type.
//
//   reshape_and_cache: cache row slot_mapping[t] = row t of k and v; -1 is padding, nothing is written
//   copy_blocks:       target block dst = source block src, for each pair (src, dst); where source and target are one
//                      cache, no dst may be another pair's src. Either may lie in pinned host memory.
//
// Shapes: k, v [tokens, row]; k_cache, v_cache [blocks, block_size, row] with row = Hkv * D; pairs [n, 2].
// reshape_and_cache: one block a token and cache (blockIdx.y: k or v). copy_blocks: one block a pair and cache.
// Bytes: reads and writes each row once. rope.cu writes the cache of the models here on its way; these two serve
// what comes without rotation and the copies of shared blocks.
#include "common.cuh"

template <typename U>
__global__ void __launch_bounds__(256) reshape_and_cache(
    const void* k, const void* v, void* k_cache, void* v_cache, const int32_t* slot_mapping, int units_per_row) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int64_t slot = slot_mapping[blockIdx.x];
    if (slot < 0) return;
    const U* source = static_cast<const U*>(blockIdx.y ? v : k) + int64_t(blockIdx.x) * units_per_row;
    U* target = static_cast<U*>(blockIdx.y ? v_cache : k_cache) + slot * units_per_row;
    for (int i = threadIdx.x; i < units_per_row; i += blockDim.x) target[i] = source[i];
}

template <typename U>
__global__ void __launch_bounds__(256) copy_blocks(
    const void* k_source, const void* v_source, void* k_target, void* v_target, const int32_t* pairs,
    int units_per_block) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int64_t source_block = pairs[2 * blockIdx.x], target_block = pairs[2 * blockIdx.x + 1];
    const U* source = static_cast<const U*>(blockIdx.y ? v_source : k_source) + source_block * units_per_block;
    U* target = static_cast<U*>(blockIdx.y ? v_target : k_target) + target_block * units_per_block;
    for (int i = threadIdx.x; i < units_per_block; i += blockDim.x) target[i] = source[i];
}
