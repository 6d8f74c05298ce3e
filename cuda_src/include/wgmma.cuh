// Hopper's asynchronous tensor-core products and the barriers that order them. sm_90a only.
//
// A warpgroup (4 warps) multiplies 64 rows at once; warp w holds rows 16 w to 16 w + 15 of the result, in the layout
// of mma.cuh's C fragments, and of A where A comes from registers. Shared-memory operands are read by the tensor
// cores themselves, from tiles of rows of 128 bytes (64 16-bit values) in which the 16-byte piece number c of row r
// lies at place c ^ (r % 8): the "128-byte swizzle", without which all pieces of a column would be in one bank.
// Tiles start at multiples of 1024 bytes; wider matrices are several tiles beside one another.
#pragma once

#include "common.cuh"

constexpr int SWIZZLE_ROW = 128;  // bytes

// Describes a matrix in global memory to the copy engine (CUtensorMap, made by the host): a `const __grid_constant__`
// parameter of the kernel.
struct alignas(64) TensorMap {
    uint8_t bytes[128];
};

#if __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1

// ---- barriers in shared memory --------------------------------------------------------------------------------

// A phase of the barrier completes with its `count`-th arrival; phases alternate in parity, starting with 0.
__device__ inline void mbarrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at a barrier of any block of the cluster, see cluster_address. Says that something has been read: what this
// thread has written need not be visible there.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Barriers that this thread has initialised are ready for the cluster, once it has met at a cluster barrier.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives when all cp.async of this thread so far have written their data.
__device__ inline void mbarrier_arrive_after_cp_async(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more from the copy engine.
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the phase of the given parity to complete.
__device__ inline void mbarrier_wait(uint32_t barrier, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// What ordinary instructions (cp.async too) have written to shared memory becomes visible to the tensor cores.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barrier number `id` (1 to 15; 0 is __syncthreads) of THREADS threads: to meet there, or to arrive and go on.
template <int THREADS>
__device__ inline void named_barrier(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
template <int THREADS>
__device__ inline void named_barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// Registers of a thread may be handed from one warpgroup to another: the sum over the block cannot grow.
template <int REGISTERS>
__device__ inline void register_limit_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void register_limit_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- the tensor memory accelerator --------------------------------------------------------------------------------

__device__ inline void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box of rows, from `row` and `column` on, to shared memory, swizzled; then the barrier gets the box's
// bytes. What lies outside the matrix is zero. Called by one thread.
__device__ inline void copy_box(uint32_t destination, const TensorMap& map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same for a map with three dimensions.
__device__ inline void copy_box(uint32_t destination, const TensorMap& map, int column, int row, int layer,
                                uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(layer), "r"(barrier)
        : "memory");
}

// Copies from this block's shared memory to any of the cluster's, at whose barrier `bytes` then arrive.
__device__ inline void copy_to_cluster(uint32_t destination, uint32_t source, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "r"(source), "r"(bytes), "r"(barrier)
                 : "memory");
}

// copy_box for several blocks of the cluster, whose numbers are the bits of `blocks`: each gets the box at its own
// `destination`, and its own barrier gets the bytes.
__device__ inline void copy_box_to(int blocks, uint32_t destination, const TensorMap& map, int column, int row,
                                   uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(destination),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
        : "memory");
}

// ---- products -------------------------------------------------------------------------------------------------

// Describes an operand to the tensor cores: where it starts (in a tile's first 8 rows) and how far the next 8 rows are.
// `tile_stride`: bytes to the tile beside it, for operands whose rows run along the columns of the result.
__device__ inline uint64_t matrix_descriptor(uint32_t address, int tile_stride = 16) {
    constexpr uint64_t GROUP_STRIDE = 8 * SWIZZLE_ROW, SWIZZLE_128 = 1ull << 62;
    const uint64_t start = (address & 0x3ffff) >> 4, stride = tile_stride >> 4;
    return start | stride << 16 | GROUP_STRIDE >> 4 << 32 | SWIZZLE_128;
}

// Registers that a product reads or writes are handed over by wgmma_fence, and are ours again after wgmma_wait.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ inline void wgmma_wait() {  // until at most N of the latest groups are still running
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accesses to registers of a running product across this point.
template <int N>
__device__ inline void pin(float (&c)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
    }
}

template <typename T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

// A result of 8 TILES columns is 4 TILES registers, operands number 0 to 4 TILES - 1 of the instruction.
#define C1(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define C2(i) C1(i), C1(i + 1)
#define C4(i) C2(i), C2(i + 2)
#define C8(i) C4(i), C4(i + 4)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define TO_9 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define REGISTERS_8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define REGISTERS_16 TO_9 "%10, %11, %12, %13, %14, %15}"
#define REGISTERS_32 TO_9 TEN(1) TEN(2) "%30, %31}"
#define REGISTERS_48 TO_9 TEN(1) TEN(2) TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47}"
#define REGISTERS_64 TO_9 TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63}"

// c = A B^T, or c += A B^T: A [64, 16], B [8 TILES, 16], both tiles of rows along the summed dimension.
#define ROWS_AS(TYPE, N, REGISTERS, A, B, ACCUMULATE, ...)                                                   \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #ACCUMULATE ", 0; wgmma.mma_async.sync.aligned.m64n" #N  \
                 "k16.f32." TYPE "." TYPE " " REGISTERS ", %" #A ", %" #B ", p, 1, 1, 0, 0; }"               \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define WGMMA_ROWS(TILES, N, REGISTERS, A, B, ACCUMULATE, ...)                                               \
    template <typename T>                                                                                    \
    __device__ inline void wgmma(float(&c)[TILES][4], uint64_t a, uint64_t b, bool accumulate) {             \
        if constexpr (IS_BF16<T>) {                                                                          \
            ROWS_AS("bf16", N, REGISTERS, A, B, ACCUMULATE, __VA_ARGS__);                                    \
        } else {                                                                                             \
            ROWS_AS("f16", N, REGISTERS, A, B, ACCUMULATE, __VA_ARGS__);                                     \
        }                                                                                                    \
    }
WGMMA_ROWS(2, 16, REGISTERS_8, 8, 9, 10, C2(0))
WGMMA_ROWS(4, 32, REGISTERS_16, 16, 17, 18, C4(0))
WGMMA_ROWS(8, 64, REGISTERS_32, 32, 33, 34, C8(0))
WGMMA_ROWS(12, 96, REGISTERS_48, 48, 49, 50, C8(0), C4(8))
WGMMA_ROWS(16, 128, REGISTERS_64, 64, 65, 66, C8(0), C8(8))

// c += A B: A [64, 16] from registers, B [16, 8 TILES] as tiles of rows along the columns of c.
#define COLUMNS_AS(TYPE, N, REGISTERS, A0, A1, A2, A3, B, ...)                                               \
    asm volatile("{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " " REGISTERS ", {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 1; }" \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_COLUMNS(TILES, N, REGISTERS, A0, A1, A2, A3, B, ...)                                           \
    template <typename T>                                                                                    \
    __device__ inline void wgmma(float(&c)[TILES][4], const uint32_t(&a)[4], uint64_t b) {                   \
        if constexpr (IS_BF16<T>) {                                                                          \
            COLUMNS_AS("bf16", N, REGISTERS, A0, A1, A2, A3, B, __VA_ARGS__);                                \
        } else {                                                                                             \
            COLUMNS_AS("f16", N, REGISTERS, A0, A1, A2, A3, B, __VA_ARGS__);                                 \
        }                                                                                                    \
    }
WGMMA_COLUMNS(8, 64, REGISTERS_32, 32, 33, 34, 35, 36, C8(0))
WGMMA_COLUMNS(16, 128, REGISTERS_64, 64, 65, 66, 67, 68, C8(0), C8(8))

#undef C1
#undef C2
#undef C4
#undef C8
#undef TEN
#undef TO_9
#undef REGISTERS_8
#undef REGISTERS_16
#undef REGISTERS_32
#undef REGISTERS_48
#undef REGISTERS_64
#undef ROWS_AS
#undef WGMMA_ROWS
#undef COLUMNS_AS
#undef WGMMA_COLUMNS

#endif
