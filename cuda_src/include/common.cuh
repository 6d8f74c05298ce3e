// Device primitives that every kernel includes: types, conversions, reductions, vectors.
//
// NVRTC compiles without host headers, so <cstdint>, <cmath> and friends are not there; what is needed of
// them stands below. Keep this file lean: it is compiled once per kernel instance.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using fp16 = __half;
using bf16 = __nv_bfloat16;

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;
constexpr float INF = __builtin_bit_cast(float, 0x7f800000);

// ---- integers -----------------------------------------------------------------------------------------------

template <typename I>
__device__ constexpr I div_ceil(I a, I b) {
    return (a + b - 1) / b;
}

// The exponent of a power of two.
__device__ inline int log2_of_power(int x) { return 31 - __clz(x); }

// The smallest multiple of `alignment` that is not less than `a`.
template <typename I>
__device__ constexpr I align_up(I a, I alignment) {
    return div_ceil(a, alignment) * alignment;
}

// ---- conversions: all arithmetic is float, T is only how a value is stored ------------------------------------

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(fp16 x) { return __half2float(x); }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest even, as NumPy's astype does.
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline fp16 from_float<fp16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// ---- scalar mathematics -------------------------------------------------------------------------------------

__device__ inline float fast_rsqrt(float x) { return rsqrtf(x); }  // within 2 ulp

// x * sigmoid(x), within 5 ulp. The rounded division would make silu_and_mul wait for arithmetic instead of memory.
// It gives -0 where exp(-x) exceeds 2^126, which is the value to within 2e-36.
__device__ inline float silu(float x) { return __fdividef(x, 1.0f + expf(-x)); }

// ---- reductions: every thread gets the result -----------------------------------------------------------------

// Sum over WIDTH neighbouring lanes (a power of two); the butterfly leaves it in each of them.
template <int WIDTH = WARP_SIZE>
__device__ inline float warp_reduce_sum(float x) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
    return x;
}

template <int WIDTH = WARP_SIZE>
__device__ inline float warp_reduce_max(float x) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// Sum over the block, which is one-dimensional and a whole number of warps. Each warp folds the warps' partial
// sums by itself: that broadcasts the result without a second trip through shared memory.
__device__ inline float block_reduce_sum(float x) {
    __shared__ float partial[WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE;
    x = warp_reduce_sum(x);
    if (blockDim.x == WARP_SIZE) return x;
    __syncthreads();  // a slow warp may still read `partial` of an earlier call
    if (lane == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    return warp_reduce_sum(lane < blockDim.x / WARP_SIZE ? partial[lane] : 0.0f);
}

__device__ inline float block_reduce_max(float x) {
    __shared__ float partial[WARP_SIZE];
    const int lane = threadIdx.x % WARP_SIZE;
    x = warp_reduce_max(x);
    if (blockDim.x == WARP_SIZE) return x;
    __syncthreads();
    if (lane == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    return warp_reduce_max(lane < blockDim.x / WARP_SIZE ? partial[lane] : -INF);
}

// ---- vectors --------------------------------------------------------------------------------------------------

template <int BYTES>
struct BitsOf;
template <>
struct BitsOf<16> { using type = uint4; };
template <>
struct BitsOf<8> { using type = uint2; };
template <>
struct BitsOf<4> { using type = uint32_t; };
template <>
struct BitsOf<2> { using type = uint16_t; };

// N values of T that one instruction loads or stores, by default 16 bytes, the widest. Addresses are multiples of
// the vector's size.
template <typename T, int N = 16 / sizeof(T)>
struct alignas(sizeof(T) * N) Vec {
    static constexpr int SIZE = N;
    using Bits = typename BitsOf<sizeof(T) * N>::type;
    T data[N];

    __device__ T& operator[](int i) { return data[i]; }
    __device__ const T& operator[](int i) const { return data[i]; }

    __device__ static Vec load(const T* p) { return from_bits(*reinterpret_cast<const Bits*>(p)); }
    // For memory that nothing writes while the kernel runs: may go through the non-coherent cache.
    __device__ static Vec load_readonly(const T* p) { return from_bits(__ldg(reinterpret_cast<const Bits*>(p))); }
    // For memory read once: the first to be evicted from the caches.
    __device__ static Vec load_streaming(const T* p) { return from_bits(__ldcs(reinterpret_cast<const Bits*>(p))); }

    __device__ void store(T* p) const { *reinterpret_cast<Bits*>(p) = to_bits(); }
    __device__ void store_streaming(T* p) const { __stcs(reinterpret_cast<Bits*>(p), to_bits()); }

    __device__ static Vec from_bits(Bits bits) {
        Vec v;
        *reinterpret_cast<Bits*>(v.data) = bits;
        return v;
    }
    __device__ Bits to_bits() const { return *reinterpret_cast<const Bits*>(data); }
};

// Asks for 128 bytes of memory, into the L2 cache.
__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- programmatic dependent launch (Hopper and later) -----------------------------------------------------------
//
// A kernel launched with Kernel(..., pdl=True) may start while the kernel before it is still finishing. Until
// griddepcontrol_wait() returns it must neither read what earlier kernels of the step wrote nor write what they may
// read: only weights, tables, and keys and values of earlier steps may be loaded before. Every such kernel calls it in
// all threads, also when it has nothing to wait for itself, because the kernel after it relies on it for everything
// further back. No pointer to what an earlier kernel writes may be `const` and `__restrict__`: that promises the
// compiler that the values never change, and it moves their loads to the front, or through the non-coherent cache.
//
// A kernel may call griddepcontrol_launch_dependents() before it waits, so that its successor has its weights loaded in
// time; then several kernels are under way at once. embedding.cu, the first of a step, calls it only after its wait:
// nothing of a step starts before all earlier work has ended.

__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as all blocks of this one have called this or ended.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
