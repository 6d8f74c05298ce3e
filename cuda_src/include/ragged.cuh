// Work of a ragged batch, laid end to end, and found again by a block that knows only its number.
//
// Each sequence contributes count(i) >= 0 items: tiles of queries, tiles of keys. The host cannot know these
// without waiting for the device, and a grid over (longest sequence) x (sequences) would be mostly empty blocks.
// Instead each block adds up the counts itself: a few hundred nanoseconds for a few hundred sequences.
#pragma once

#include "common.cuh"

struct RaggedPlace {
    int sequence;  // the item's sequence,
    int item;      // its number therein,
    int total;     // and the items of the whole batch
};

// The place of item number pick(total). If that is not below total, only `total` is meaningful. Called by all
// threads of a block of at most MAX_THREADS.
template <int MAX_THREADS, typename Count, typename Pick>
__device__ inline RaggedPlace find_ragged(int num_sequences, Count count, Pick pick) {
    __shared__ int warp_sums[MAX_THREADS / WARP_SIZE];
    __shared__ int2 found;
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;

    // Each thread owns a run of neighbouring sequences; `end` becomes the items up to the end of its run.
    const int run = div_ceil(num_sequences, static_cast<int>(blockDim.x));
    const int first = min(static_cast<int>(threadIdx.x) * run, num_sequences);
    const int last = min(first + run, num_sequences);
    int own = 0;
    for (int i = first; i < last; i++) own += count(i);
    int end = own;
#pragma unroll
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const int before = __shfl_up_sync(FULL_MASK, end, offset);
        if (lane >= offset) end += before;
    }
    if (lane == WARP_SIZE - 1) warp_sums[warp] = end;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < MAX_THREADS / WARP_SIZE; w++) {
        if (w * WARP_SIZE >= blockDim.x) break;
        if (w < warp) end += warp_sums[w];
        total += warp_sums[w];
    }

    const int wanted = pick(total);
    int item = wanted - (end - own);
    if (item >= 0 && item < own) {
        int i = first;
        for (; item >= count(i); i++) item -= count(i);
        found = make_int2(i, item);
    }
    __syncthreads();
    return {found.x, found.y, total};
}
