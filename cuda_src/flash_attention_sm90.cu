// flash_attention.cu's function (formula and shapes are there) with Hopper's asynchronous tensor cores, in the
// manner of FlashAttention-3 (Shah et al., 2024). sm_90a only.
//
// Who does what: one block a multiprocessor fetches tiles of 128 rows (a query token and head each) from a counter
// until none is left, the longest of each sequence first. Four warps load: each looks up the cache slots of a
// quarter of a tile's keys and copies them by cp.async into a ring of stages; full and empty barriers tie them to
// two warpgroups that multiply 64 rows each. A warpgroup starts S = Q K^T for the next keys and O += P V for the
// last ones together, and computes the softmax of S while O is still under way; and the two take turns in starting,
// so that one's softmax falls into the other's products. Where a batch has fewer tiles than there are
// multiprocessors, several blocks share the keys of a tile, and the last to finish merges their results.
//
// Registers: the loading warps give theirs up (88 remain) to the multiplying ones (208). Bytes: K and V pass from
// L2 into shared memory once for 128 rows, which at 600 TFLOP/s is 4.7 TB/s.
//
// H200, bf16, D = 128, 32/8 heads, cache blocks of 16, causal FLOPs (FlashAttention-3 in the same setting):
//   4 x 4096: 1.00 ms, 550 TFLOP/s (600)   16 x 1024: 0.350 ms, 393 (410)
//   1 x 16384: 3.65 to 4.1 ms, 530 to 603 (609), from run to run
//   4 x 4096, D = 64, 32/8: 0.709 ms, 388   4 x 4096, D = 256, 16/4: 0.99 ms, 555
// Before and beside it, 4 x 4096 unless said:
//   loading warps that hand slots around by shuffles: 1.59 ms, they were too slow; by shared memory: 1.02 ms
//   turns between the warpgroups: 0.997 ms; O rescaled while S is being multiplied, not before: 1.011 ms
//   O rescaled always, not only when a maximum rises: the same, but D = 64 0.738 ms
//   no block shared: 64 tokens behind 8128: 129 us; shared: 29 us
#include "mma.cuh"
#include "softmax_state.cuh"
#include "wgmma.cuh"

// inline: elsewhere than on Hopper the kernel is empty, and the compiler would warn of constants that nobody uses.
inline constexpr int WARPGROUP = 4 * WARP_SIZE;
inline constexpr int CONSUMERS = 2;  // warpgroups that multiply, 64 rows each
inline constexpr int BLOCK_M = 64 * CONSUMERS;
inline constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
inline constexpr int LOADER_WARPS = 4;  // a warpgroup too, because registers are handed over between warpgroups
inline constexpr int LOADERS = LOADER_WARPS * WARP_SIZE;
inline constexpr int FIRST_LOADER = CONSUMERS * WARPGROUP;  // thread
inline constexpr int THREADS = FIRST_LOADER + LOADERS;
inline constexpr int STAGES = 5;          // tiles of keys or values in shared memory
inline constexpr int SLOT_TILES = 4;      // key tiles whose cache slots are known at a time
inline constexpr int MIN_PART_TILES = 4;  // key tiles that are worth a block of their own
inline constexpr int LOAD_BARRIER = 1, TURN_BARRIER = 2, MERGE_BARRIER = TURN_BARRIER + CONSUMERS;  // named barriers

// One tile of queries: what the loading warp tells the others.
struct Tile {
    int num_kv_tiles;  // 0: there is no more work
    int head;
    int q_start;       // the sequence's first row of q
    int first_row;     // of the sequence's rows (query token, head of the group)
    int last_row;
    int first_newest;  // the newest key that first_row sees, and
    int num_keys;      // the end of those that last_row sees, counted from the first key of this part
    int num_parts;     // blocks that share the keys of these queries
    int first_result;  // number of the first one's partial result
    int part;          // which of them this is
};

// Copies ROWS rows of D elements, whose numbers (in units of `stride` bytes) are in shared memory, into tiles of 64
// elements that lie `tile_stride` bytes apart; rows from num_valid on become zeros. A lane copies one 16-byte column
// of neighbouring rows, and LANES lanes copy a row together.
template <int ROWS, int D, typename T>
__device__ inline void copy_rows(const T* source, uint32_t stride, const uint4* numbers, int num_valid, uint32_t tile,
                                 int tile_stride) {
    constexpr int LANES = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32, LANE_ROWS = ROWS * LANES / WARP_SIZE;
    const int lane = threadIdx.x % WARP_SIZE, column = lane % LANES, first = lane / LANES * LANE_ROWS;
    if (column >= D / 8) return;
    const char* from = reinterpret_cast<const char*>(source + column * 8);
    tile += column / 8 * tile_stride + first * SWIZZLE_ROW;
    num_valid -= first;
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i += 4) {
        const uint4 four = numbers[(first + i) / 4];
        const uint32_t number[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int place = column % 8 ^ (first + i + k) % 8;
            cp_async_16(tile + (i + k) * SWIZZLE_ROW + place * 16, from + static_cast<uint64_t>(number[k]) * stride,
                        i + k < num_valid);
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 1)
    flash_attention_sm90(T* __restrict__ out, const T* __restrict__ q, const T* __restrict__ k_cache,
                         const T* __restrict__ v_cache, const int* __restrict__ cu_seqlens_q,
                         const int* __restrict__ seq_lens, const int* __restrict__ block_tables,
                         uint8_t* __restrict__ partials, int* __restrict__ arrivals, int* __restrict__ work_counters,
                         int num_sequences, int max_blocks, int block_size,
                         int num_kv_heads, int group_size, float scale, int window) {
#ifdef HAS_WGMMA
    constexpr int BLOCK_N = D <= 128 ? 128 : 64;                  // keys of a tile
    constexpr int COLUMN_TILES = D <= 64 ? 1 : D <= 128 ? 2 : 4;  // 64-element tiles beside one another
    constexpr int N_PRODUCTS = D <= 128 ? 1 : 2;                  // products for all columns of O
    constexpr int O_TILES = 8 * COLUMN_TILES / N_PRODUCTS;        // 8-column fragments of each
    constexpr int S_TILES = BLOCK_N / 8;
    constexpr int STAGE_BYTES = COLUMN_TILES * BLOCK_N * SWIZZLE_ROW;

    struct Shared {
        uint8_t q[COLUMN_TILES][BLOCK_M][SWIZZLE_ROW];
        uint8_t stages[STAGES][COLUMN_TILES][BLOCK_N][SWIZZLE_ROW];
        uint4 row_numbers[LOADER_WARPS][SLOT_TILES + 1][8];  // where the rows that a warp loads are found
        uint64_t full[STAGES], empty[STAGES], q_full, q_empty;
        Tile tiles[2];  // of even and odd rounds: the next one is announced before all are done with this one
        int next_work;
        bool is_last[CONSUMERS];
    };
    extern __shared__ __align__(8 * SWIZZLE_ROW) uint8_t dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    const uint32_t q_tile = shared_address(shared.q), stages = shared_address(shared.stages);
    const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
    const uint32_t q_full = shared_address(&shared.q_full), q_empty = shared_address(&shared.q_empty);

    const int lane = threadIdx.x % WARP_SIZE;
    const int warp = __shfl_sync(FULL_MASK, threadIdx.x / WARP_SIZE, 0);  // uniform, and known to be
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(full + 8 * i, LOADERS);
            mbarrier_init(empty + 8 * i, CONSUMER_WARPS);
        }
        mbarrier_init(q_full, LOADERS + 1);
        mbarrier_init(q_empty, CONSUMER_WARPS);
        fence_proxy_async();
    }
    __syncthreads();

    // The row of q and of out that row r of a sequence is.
    const auto token_row = [&](const Tile& tile, int r) {
        return ((tile.q_start + r / group_size) * num_kv_heads + tile.head) * group_size + r % group_size;
    };

    griddepcontrol_wait();
    griddepcontrol_launch_dependents();

    if (warp >= CONSUMER_WARPS) {
        // ---- the loading warps: each a quarter of the rows ----
        register_limit_lower<D <= 128 ? 88 : 56>();
        constexpr int Q_ROWS = BLOCK_M / LOADER_WARPS, KV_ROWS = BLOCK_N / LOADER_WARPS;
        static_assert(Q_ROWS <= WARP_SIZE && KV_ROWS <= WARP_SIZE);
        const int loader = warp - CONSUMER_WARPS;
        uint4* slots = shared.row_numbers[loader][0];
        uint4* q_rows = shared.row_numbers[loader][SLOT_TILES];

        const auto num_tiles = [&](int i) {
            const int q_len = i < num_sequences ? cu_seqlens_q[i + 1] - cu_seqlens_q[i] : 0;
            return q_len > 1 ? div_ceil(q_len * group_size, BLOCK_M) : 0;
        };
        // Where there are fewer tiles of queries than blocks, several blocks share the keys of one.
        int total_tiles = 0;
        for (int i = lane; i < num_sequences; i += WARP_SIZE) total_tiles += num_tiles(i);
        total_tiles = __reduce_add_sync(FULL_MASK, total_tiles);
        const int max_parts = max(1u, gridDim.x / max(1, total_tiles * num_kv_heads));

        const auto next_work = [&] {
            if (threadIdx.x == FIRST_LOADER) shared.next_work = gridDim.x + atomicAdd(&work_counters[0], 1);
            named_barrier<LOADERS>(LOAD_BARRIER);
            const int work = shared.next_work;
            named_barrier<LOADERS>(LOAD_BARRIER);
            return work;
        };
        int base = 0, tiles_before_base = 0;  // sequences before `base` have this many tiles
        int load_count = 0, round = 0;
        for (int work = blockIdx.x;; work = next_work()) {
            // Find the sequence, 32 at a time: `work` only grows.
            const int item = work / (num_kv_heads * max_parts);
            Tile tile = {};
            int kv_begin = 0;
            const int* block_table = block_tables;
            for (; base < num_sequences; base += WARP_SIZE) {
                const int own = num_tiles(base + lane);
                int end = own;
#pragma unroll
                for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
                    const int before = __shfl_up_sync(FULL_MASK, end, offset);
                    if (lane >= offset) end += before;
                }
                end += tiles_before_base;
                const unsigned behind = __ballot_sync(FULL_MASK, end > item);
                if (behind) {
                    const int found = __ffs(behind) - 1, sequence = base + found;
                    tile.head = work / max_parts % num_kv_heads;
                    tile.q_start = cu_seqlens_q[sequence];
                    const int q_len = cu_seqlens_q[sequence + 1] - tile.q_start;
                    // The longest tile first: the last of the sequence.
                    tile.first_row = (__shfl_sync(FULL_MASK, end, found) - 1 - item) * BLOCK_M;
                    tile.last_row = min(tile.first_row + BLOCK_M, q_len * group_size) - 1;
                    const int context = seq_lens[sequence] - q_len;
                    const int first_position = context + tile.first_row / group_size;
                    const int last_position = context + tile.last_row / group_size;
                    kv_begin = max(0, first_position - window + 1);

                    const int num_kv_tiles = div_ceil(last_position + 1 - kv_begin, BLOCK_N);
                    tile.num_parts = min(max_parts, max(1, num_kv_tiles / MIN_PART_TILES));
                    tile.part = work % max_parts;
                    tile.first_result = work - tile.part;
                    const int first_tile = num_kv_tiles * tile.part / tile.num_parts;
                    tile.num_kv_tiles = num_kv_tiles * (tile.part + 1) / tile.num_parts - first_tile;
                    kv_begin += first_tile * BLOCK_N;
                    tile.first_newest = first_position - kv_begin;
                    tile.num_keys = last_position + 1 - kv_begin;
                    block_table += static_cast<int64_t>(sequence) * max_blocks;
                    break;
                }
                tiles_before_base = __shfl_sync(FULL_MASK, end, WARP_SIZE - 1);
            }
            if (tile.part > 0 && tile.part >= tile.num_parts) continue;

            // ---- queries ----
            mbarrier_wait(q_empty, (round & 1) ^ 1);
            if (threadIdx.x == FIRST_LOADER) {
                shared.tiles[round & 1] = tile;
                mbarrier_arrive(q_full);
            }
            if (tile.num_kv_tiles > 0) {
                const int first = tile.first_row + loader * Q_ROWS, row = first + lane;
                reinterpret_cast<int*>(q_rows)[lane] = row <= tile.last_row ? token_row(tile, row) : 0;
                __syncwarp();
                copy_rows<Q_ROWS, D>(q, D * sizeof(T), q_rows, tile.last_row + 1 - first,
                          q_tile + loader * Q_ROWS * SWIZZLE_ROW, BLOCK_M * SWIZZLE_ROW);
            }
            mbarrier_arrive_after_cp_async(q_full);
            round++;
            if (tile.num_kv_tiles == 0) break;

            // ---- keys and values, in the order of their use: K0, K1, V0, K2, V1, ... ----
            const auto find_slots = [&](int kv_tile) {
                const int index = kv_tile * BLOCK_N + loader * KV_ROWS + lane, key = kv_begin + index;
                const bool valid = lane < KV_ROWS && index < tile.num_keys;
                const int slot = valid ? block_table[key / block_size] * block_size + key % block_size : 0;
                reinterpret_cast<int*>(slots + kv_tile % SLOT_TILES * 8)[lane] = slot;
                __syncwarp();
            };
            const auto load = [&](const T* cache, int kv_tile) {
                const int stage = load_count % STAGES;
                mbarrier_wait(empty + 8 * stage, (load_count / STAGES & 1) ^ 1);
                copy_rows<KV_ROWS, D>(cache + tile.head * D, num_kv_heads * D * sizeof(T),
                          slots + kv_tile % SLOT_TILES * 8, tile.num_keys - kv_tile * BLOCK_N - loader * KV_ROWS,
                          stages + stage * STAGE_BYTES + loader * KV_ROWS * SWIZZLE_ROW, BLOCK_N * SWIZZLE_ROW);
                mbarrier_arrive_after_cp_async(full + 8 * stage);
                load_count++;
            };
            find_slots(0);
            load(k_cache, 0);
            for (int kv_tile = 1; kv_tile < tile.num_kv_tiles; kv_tile++) {
                find_slots(kv_tile);
                load(k_cache, kv_tile);
                load(v_cache, kv_tile - 1);
            }
            load(v_cache, tile.num_kv_tiles - 1);
        }
        // The last block to finish resets the work_counters for the next launch.
        if (threadIdx.x == FIRST_LOADER) {
            __threadfence();
            const int finished = atomicAdd(&work_counters[1], 1) + 1;
            if (finished == static_cast<int>(gridDim.x)) work_counters[0] = work_counters[1] = 0;
        }
    } else {
        // ---- the multiplying warpgroups ----
        register_limit_raise<D <= 128 ? 208 : 224>();
        const int pair = lane % 4 * 2;
        const int lane_row = threadIdx.x / WARP_SIZE * 16 + lane / 4;  // and the one 8 below, within the tile
        const uint32_t q_rows = q_tile + warp / 4 * (64 * SWIZZLE_ROW);
        const float scale_log2 = scale * LOG2_E;
        // The warpgroups take turns in starting products, so that one's softmax falls into the other's products.
        const int warpgroup = warp / 4, turn = TURN_BARRIER + warpgroup, other_turn = TURN_BARRIER + 1 - warpgroup;
        int use_count = 0;
        if (warpgroup == 1) named_barrier_arrive<2 * WARPGROUP>(other_turn);

        const auto wait_full = [&](int count) {
            mbarrier_wait(full + 8 * (count % STAGES), count / STAGES & 1);
            fence_proxy_async();
        };
        for (int round = 0;; round++) {
            mbarrier_wait(q_full, round & 1);
            fence_proxy_async();
            const Tile& tile = shared.tiles[round & 1];
            const int num_kv_tiles = tile.num_kv_tiles, first_newest = tile.first_newest, num_keys = tile.num_keys;
            if (num_kv_tiles == 0) break;

            float o[N_PRODUCTS][O_TILES][4] = {};
            float s[S_TILES][4];
            uint32_t p[BLOCK_N / 16][4];
            SoftmaxState softmax[2];  // of rows group and group + 8; `sum` only over this lane's keys
            float factor[2];          // for O, when the maxima have risen
            int newest_of_tile[2];    // key that the row sees, less this lane's first column
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = tile.first_row % group_size + lane_row + half * 8;
                newest_of_tile[half] = first_newest + r / group_size - pair;
            }

            const auto start_scores = [&](int count) {
                const uint32_t keys = stages + count % STAGES * STAGE_BYTES;
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    const uint32_t inside = k % 4 * 32;
                    wgmma<T>(s, matrix_descriptor(q_rows + k / 4 * (BLOCK_M * SWIZZLE_ROW) + inside),
                             matrix_descriptor(keys + k / 4 * (BLOCK_N * SWIZZLE_ROW) + inside), k > 0);
                }
                wgmma_commit();
            };
            const auto start_output = [&](int count) {
                const uint32_t values = stages + count % STAGES * STAGE_BYTES;
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < BLOCK_N / 16; k++) {
#pragma unroll
                    for (int n = 0; n < N_PRODUCTS; n++) {
                        const uint32_t columns = values + n * (2 * BLOCK_N * SWIZZLE_ROW);
                        wgmma<T>(o[n], p[k], matrix_descriptor(columns + k * 16 * SWIZZLE_ROW, BLOCK_N * SWIZZLE_ROW));
                    }
                }
                wgmma_commit();
            };
            const auto release = [&](int count) {
                if (lane == 0) mbarrier_arrive(empty + 8 * (count % STAGES));
            };
            const auto release_q = [&] {
                if (lane == 0) mbarrier_arrive(q_empty);
            };
            const auto weigh_scores = [&](int kv_tile) {  // S becomes P, not yet rounded
                const int first_key = kv_tile * BLOCK_N;
                if (first_key + BLOCK_N > first_newest + 1 || first_key < num_keys - window) {
                    const int newest[2] = {newest_of_tile[0] - first_key, newest_of_tile[1] - first_key};
                    hide_keys(s, newest, window);
                }
                raise(softmax, factor, s, scale_log2);
                weigh(s, softmax, scale_log2);
            };
            const auto scale_output = [&] {
                if (!any_change(factor)) return;
#pragma unroll
                for (int n = 0; n < N_PRODUCTS; n++) scale_rows(o[n], factor);
            };

            wait_full(use_count);
            start_scores(use_count);
            wgmma_wait<0>();
            pin(s);
            release(use_count);
            if (num_kv_tiles == 1) release_q();
            weigh_scores(0);
            round_weights<T>(p, s);
            if (num_kv_tiles > 1) wait_full(use_count + 1);
            for (int kv_tile = 1; kv_tile < num_kv_tiles; kv_tile++) {
                const int keys = use_count + 2 * kv_tile - 1, values = keys + 1;  // those of kv_tile, and kv_tile - 1
                named_barrier<2 * WARPGROUP>(turn);
                start_scores(keys);
                wait_full(values);
                start_output(values);
                named_barrier_arrive<2 * WARPGROUP>(other_turn);
                wgmma_wait<1>();
                pin(s);
                release(keys);
                if (kv_tile == num_kv_tiles - 1) release_q();
                weigh_scores(kv_tile);  // while the tensor cores work on O
                pin(s);
                if (kv_tile + 1 < num_kv_tiles) wait_full(keys + 2);
                wgmma_wait<0>();
#pragma unroll
                for (int n = 0; n < N_PRODUCTS; n++) pin(o[n]);
                release(values);
                scale_output();
                round_weights<T>(p, s);
            }
            use_count += 2 * num_kv_tiles;
            wait_full(use_count - 1);
            start_output(use_count - 1);
            wgmma_wait<0>();
#pragma unroll
            for (int n = 0; n < N_PRODUCTS; n++) pin(o[n]);
            release(use_count - 1);

            if (tile.num_parts > 1) {
                // The last to arrive merges the parts: as fragments, each thread its own.
                constexpr int PIECES = N_PRODUCTS * O_TILES;
                const int thread = threadIdx.x % WARPGROUP;
                const auto result_of = [&](int part) {  // float4 [PIECES + 1][WARPGROUP]
                    const int64_t number = (tile.first_result + part) * CONSUMERS + warpgroup;
                    return reinterpret_cast<float4*>(partials) + number * ((PIECES + 1) * WARPGROUP) + thread;
                };
                float4* result = result_of(tile.part);
#pragma unroll
                for (int i = 0; i < PIECES; i++) {
                    const float(&x)[4] = o[i / O_TILES][i % O_TILES];
                    result[i * WARPGROUP] = make_float4(x[0], x[1], x[2], x[3]);
                }
                result[PIECES * WARPGROUP] =
                    make_float4(softmax[0].max, softmax[0].sum, softmax[1].max, softmax[1].sum);
                named_barrier<WARPGROUP>(MERGE_BARRIER + warpgroup);
                if (thread == 0) {
                    __threadfence();  // who sees the arrival sees what the warpgroup wrote
                    int* arrived = &arrivals[tile.first_result * CONSUMERS + warpgroup];
                    shared.is_last[warpgroup] = atomicAdd(arrived, 1) == tile.num_parts - 1;
                    if (shared.is_last[warpgroup]) *arrived = 0;  // for the next launch
                    __threadfence();
                }
                named_barrier<WARPGROUP>(MERGE_BARRIER + warpgroup);
                if (!shared.is_last[warpgroup]) continue;
                for (int part = 0; part < tile.num_parts; part++) {
                    if (part == tile.part) continue;
                    __syncwarp();  // loads put before this point would cost registers that are not there
                    const float4* other = result_of(part);
                    const float4 states = __ldcg(&other[PIECES * WARPGROUP]);
                    const float other_max[2] = {states.x, states.z}, other_sum[2] = {states.y, states.w};
                    float weight[2];
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        factor[half] = softmax[half].raise(other_max[half]);
                        weight[half] = softmax[half].add(SoftmaxState{other_max[half], other_sum[half]});
                    }
#pragma unroll
                    for (int i = 0; i < PIECES; i++) {
                        const float4 bits = __ldcg(&other[i * WARPGROUP]);
                        const float x[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            float& own = o[i / O_TILES][i % O_TILES][e];
                            own = own * factor[e / 2] + weight[e / 2] * x[e];
                        }
                    }
                }
            }

#pragma unroll
            for (int half = 0; half < 2; half++) {
                softmax[half].sum = warp_reduce_sum<4>(softmax[half].sum);
                const float inverse = softmax[half].inverse_sum();
                const int row = tile.first_row + lane_row + half * 8;
                if (row > tile.last_row) continue;
                T* out_row = out + static_cast<int64_t>(token_row(tile, row)) * D + pair;
#pragma unroll
                for (int n = 0; n < N_PRODUCTS; n++) {
#pragma unroll
                    for (int i = 0; i < O_TILES; i++) {
                        const int column = (n * O_TILES + i) * 8;
                        if (column < D) {
                            *reinterpret_cast<uint32_t*>(out_row + column) =
                                pack<T>(o[n][i][2 * half] * inverse, o[n][i][2 * half + 1] * inverse);
                        }
                    }
                }
            }
        }
    }
#endif
}
