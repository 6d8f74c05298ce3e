// Thread block clusters (Hopper and later): blocks that run at the same time and write to one another's shared memory.
// On older architectures the functions are there so that code compiles; only clusters of one block make sense.
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ < 900
#undef __cluster_dims__
#define __cluster_dims__(...)
#endif

// Where the shared-memory address of an object of this block lies in the cluster's block number `rank`.
__device__ inline uint32_t cluster_address(uint32_t address, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
#else
    return address;
#endif
}

__device__ inline void cluster_store(uint32_t address, float2 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y) : "memory");
#endif
}

__device__ inline void cluster_store(uint32_t address, float4 value) {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
#endif
}

// How many blocks this block's cluster has along x and y, and which of them it is; ranks count along x first. A launch
// without clusters makes clusters of one.
__device__ inline int2 cluster_shape() {
    int2 shape = {1, 1};
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(shape.x));
    asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(shape.y));
#endif
    return shape;
}
__device__ inline int2 cluster_place() {
    int2 place = {0, 0};
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(place.x));
    asm("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(place.y));
#endif
    return place;
}

// A barrier of all threads of the cluster, in two halves. What was written before arriving is seen after waiting.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// For threads that have written nothing that others read.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
