// The tensor-core building blocks of sm_80 and later: one function per PTX instruction.
//
// A warp holds a matrix fragment spread over its 32 lanes. For the 16-bit m16n8k16 product C += A B, with
// group = lane / 4 and pair = 2 * (lane % 4), a lane holds (two 16-bit values a register):
//
//   A [16, 16]: a[0] = A[group][pair, +1]      a[1] = A[group + 8][pair, +1]
//               a[2] = A[group][pair + 8, +9]  a[3] = A[group + 8][pair + 8, +9]
//   B [16, 8]:  b[0] = B[pair, +1][group]      b[1] = B[pair + 8, +9][group]
//   C [16, 8]:  c[0], c[1] = C[group][pair, +1]     c[2], c[3] = C[group + 8][pair, +1]     (float)
//
// Two consequences carry the attention kernels: rounded to 16 bits, two neighbouring C fragments are an A
// fragment (so the probabilities P of one product feed the next from registers); and an 8 x 8 block of A or C
// transposed across the warp (movmatrix) is a register of B.
#pragma once

#include "common.cuh"

__device__ inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- global to shared memory, asynchronously --------------------------------------------------------------

// Copies 16 bytes without passing through registers or L1; where `valid` is false, `source` is not read and
// zeros are written.
__device__ inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes the group of copies issued by this thread since the last commit; a group may be empty.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's latest groups are still under way. Other threads see the data only
// after a barrier.
template <int N>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- shared memory to fragments ---------------------------------------------------------------------------

// Four 8 x 8 blocks of 16-bit values: lane 8 i + r gives the address of row r of block i (16 bytes); register i
// becomes block i with element [group][pair, +1] in each lane.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same with each block transposed: register i holds element [pair, +1][group] of block i.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// ---- registers ----------------------------------------------------------------------------------------------

// Transposes an 8 x 8 block of 16-bit values held across the warp.
__device__ inline uint32_t movmatrix_trans(uint32_t block) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(block));
    return transposed;
}

// Two floats rounded to T in one register, `low` in the lower half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<fp16>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// The two values of `pack`.
template <typename T>
__device__ inline float2 unpack(uint32_t bits) {
    const Vec<T, 2> v = Vec<T, 2>::from_bits(bits);
    return make_float2(to_float(v[0]), to_float(v[1]));
}

// ---- the product --------------------------------------------------------------------------------------------

// c += a b: m16n8k16, 16-bit inputs of type T, float accumulators.
template <typename T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
