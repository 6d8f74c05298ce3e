// Attention of decoding sequences, one query each, over the paged KV cache: flash-decoding (Dao et al., 2023).
//
//   out[b, h] = sum_j softmax_j(scale q[b, h] . k[b, j, h / G]) v[b, j, h / G],   j over b's last `window` keys
//
// Shapes: q, out [tokens, Hq, D]; k_cache, v_cache [blocks, block_size, Hkv, D]; block_tables [B, max_blocks];
// G = Hq / Hkv. Sequence b's query is row cu_seqlens_q[b]; sequences with no or several queries are left alone.
//
// With ROPE the kernel takes the place of rope.cu, too, for steps in which every sequence has one new token: q is then
// the QKV projection [B, (Hq + 2 Hkv) D], rope_table [positions, D], the new token's position seq_len - 1, slot_mapping
// [B] where its key and value are cached (-1: nowhere). A block makes the q heads that it needs; who has the newest
// keys of a sequence makes k and v. No sequence may see another one's new key. So all other keys and values can be
// loaded while the kernel in front still runs.
//
// Who does what: the keys of each sequence and KV head are cut into tiles of 16 WARPS, all tiles of the batch are laid
// end to end, and each block gets an equal share of them, whatever the lengths (stream-K; Osama et al., 2023): the
// host needs to know none of them, and one long sequence among short ones keeps no one waiting. To begin with a
// sequence and head counts as PIECE_COST tiles more, so that blocks with many short ones have no more to do than
// others. A block reads each key once for all G query heads. Its warps work alone, each with its own ring of 16-key
// tiles in shared memory (cp.async), on S^T = K Q^T and O^T = V^T P^T: the keys are the 16 rows of an mma, the heads
// its 8 columns, so little is wasted when G is 4. A block's warps merge when a sequence and head is done; blocks that
// share one leave partial results, and the last of them to arrive merges.
//
// Bytes: K and V once, 4 D Hkv a key in 16 bits; partial results add 2 (D + 2) floats a head at most twice a block.
//
// H200, bf16, 8 KV heads of 128, cache blocks of 16 in random order, cold L2, graph of several launches (batch x
// context), us; beside it what the bytes take at 4.32 TB/s:
//                              256 x 279   256 x 558   256 x (100 to 1000)   256 x 2000   64 x 558   16 x 1000
//   16 query heads, ROPE          82.5       151.4            151.1             501.5        44.6       24.9
//     PIECE_COST 1                84.0       150.2            152.1             502.6        46.2       26.4
//     PIECE_COST 0                81.8       151.6            157.7             502.9        48.8       24.4
//     2 warps, 6 blocks an SM     81.9       151.8            150.9             505.1        47.0       27.4
//   rope.cu, the kernel before    94.2       156.2            160.1             524.3        50.3       30.9
//   32 query heads, ROPE                                      154.7                          45.7
//   the bytes                     67.7       135.4            133.8             485.5        33.9       15.2
// With 30 padding sequences beside 130 of 100 to 1000: 83.6 (91.2 before); they are skipped.
// Earlier versions, without ROPE and PIECE_COST, launches not overlapping, us:
//   1 x 128: 5.9  1 x 1024: 8.3  1 x 8192: 16.9  1 x 32768: 43.3  64 x 2048: 137.7  256 x 1024: 265  256 x 2048: 508
//   two passes over the partial results, 8 at a time, a fence in every thread: 1 x 1024 8.5, 256 x 1024 269
//   one pass, 64-bit division to find a block's share: 1 x 1024 9.3, 1 x 8192 22.8
//   3 blocks a multiprocessor for small batches too: 1 x 8192 20.5
//   3 stages, 2 blocks a multiprocessor: 256 x 1024 274; 4 stages, 1 block: 294
//   at least two tiles a block: 1 x 128 5.2, but 1 x 384 7.4 instead of 6.4
//   the next piece's first tile loaded while a piece is merged: no gain
// Time stamps (256 x 600, 160 us, 5.2 pieces a block): to begin with a piece takes 6.5 us and to end it 1.9, as memory
// that is kept busy answers late: 25 MB are under way, 5.8 us at 4.4 TB/s. From context 600 to 2000 each byte costs its
// share of 4.39 TB/s; 16 us are left over, 10 with 16 to 64 sequences. Half the blocks end 5 to 8 % before the last.
//   the last sixth to twelfth of all tiles in small parts, for the blocks that are done first: 256 x 600 159 to 163 us
//     (157.9 without), 64 x (200 to 1050) 49 to 51 (45.8)
//   every warp with a share, q and results of its own, no barrier, the next piece's first tiles loaded before a piece
//     is merged: 2.3 instead of 5.2 pieces, but 256 x 600 164.7 us, 64 x (200 to 1050) 53.4
//   2 blocks a multiprocessor: 256 x 600 183.6 us; with shared memory for no third one: a decode step of Qwen3-0.6B
//     with 256 sequences of 200 to 1000 tokens 6.54 ms instead of 5.72, with 64 of them 2.52 instead of 2.09
//   one block a multiprocessor, in which a warp keeps the copy engine filling a ring of 184 KiB across all pieces, one
//     makes query heads ahead, and 6 or 8 compute: 256 x 600 162.9 and 165.5 us (161.3 on that machine), 64 x (200 to
//     1050) 48.1 and 48.9 (46.1). So what a piece costs is not that loading pauses
//   half of the batch beside the other half, on a stream of its own: 256 sequences 5.77 ms, 192 4.79 (4.55)
//   each block asking for its first 1, 2 or 4 tiles of the next layer, into the L2 cache, as it ends: a step of 256
//     sequences 0.05, 0.10, 0.21 ms longer
//   ROPE with the position and the norms' weights read for each piece: a decode step of Qwen3-0.6B with 256 sequences
//     of 279 tokens 3.70 ms instead of 3.53, since what a piece waits for came one after the other
#include "decode_warp.cuh"
#include "ragged.cuh"
#include "rope_heads.cuh"

constexpr int WARP_KEYS = 16;  // keys of a warp in a tile: the M of an mma
constexpr int STAGES = 2;       // tiles in shared memory
constexpr int PIECE_COST = 2;   // of beginning with a sequence and head, in tiles
constexpr int LONG_SHARE = 16;  // tiles a block: with that much to do for each, all blocks work

template <typename T, int D, int WARPS, int N_TILES, bool ROPE>
__global__ void __launch_bounds__(WARPS * WARP_SIZE, D <= 128 && N_TILES == 1 ? 12 / WARPS : 2)
    paged_attention(T* out, const T* q, T* k_cache, T* v_cache, const int* __restrict__ cu_seqlens_q,
                    const int* __restrict__ seq_lens, const int* __restrict__ block_tables,
                    const float* __restrict__ rope_table, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
                    const int* __restrict__ slot_mapping, uint8_t* __restrict__ partials,
                    int* __restrict__ arrivals, int few_blocks, int num_sequences,
                    int max_blocks, int block_size, int num_kv_heads, int group_size, float eps, float scale,
                    int window) {
    constexpr int THREADS = WARPS * WARP_SIZE, TILE_KEYS = WARPS * WARP_KEYS;
    constexpr int HEADS = 8 * N_TILES;                       // query heads of a block, some may be padding
    constexpr int ROW = D + 8;                               // padded rows, so that ldmatrix meets no bank twice
    constexpr int HALF_STAGE = WARP_KEYS * ROW * sizeof(T);  // bytes of a warp's keys, or values, of one tile
    constexpr int WARP_BYTES = STAGES * 2 * HALF_STAGE;
    // A partial result, in shared or global memory: SoftmaxState [HEADS], then float [HEADS][O_ROW].
    constexpr int O_ROW = D + 4;
    constexpr int STATE_BYTES = HEADS * sizeof(SoftmaxState), O_ROW_BYTES = O_ROW * sizeof(float);
    constexpr int RESULT_BYTES = STATE_BYTES + HEADS * O_ROW_BYTES;
    constexpr int COLUMNS = div_ceil(HEADS * D / 4, THREADS);  // of 4 elements, that a thread merges
    static_assert(D % 16 == 0 && RESULT_BYTES <= WARP_BYTES);

    extern __shared__ __align__(16) uint8_t shared[];  // [WARPS][STAGES][keys, values][WARP_KEYS][ROW]
    __shared__ bool is_last;
    __shared__ __align__(16) T q_shared[ROPE ? HEADS : 1][ROW];
    __shared__ __align__(16) T new_kv[2][ROPE ? D : 1];

    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int group = lane / 4, pair = lane % 4 * 2;
    uint8_t* warp_shared = shared + warp * WARP_BYTES;  // the tiles, and when they are done the warp's result
    const uint32_t stages = shared_address(warp_shared);

    // ---- this block's share of all tiles, which follow one another by sequence, then head, then key ----
    const int head_parts = div_ceil(group_size, HEADS);
    const int num_heads = num_kv_heads * head_parts;  // blocks that read a key: one a KV head, unless groups are large
    const auto num_units = [&](int i) {               // of one head: tiles, and what it takes to begin; 1 for padding
        const bool decodes = ROPE || cu_seqlens_q[i + 1] - cu_seqlens_q[i] == 1;
        const int tiles = div_ceil(min(seq_lens[i], window), TILE_KEYS);
        return !decodes ? 0 : tiles > 0 ? tiles + PIECE_COST : 1;
    };
    int share;  // units of a block; those of block b begin at b share
    const RaggedPlace place = find_ragged<THREADS>(
        num_sequences, [&](int i) { return num_units(i) * num_heads; },
        [&](int total) {
            // A small batch goes to few_blocks: they keep the memory as busy, and leave less to merge.
            share = max(div_ceil(total, static_cast<int>(gridDim.x)), min(div_ceil(total, few_blocks), LONG_SHARE));
            return min(static_cast<int>(blockIdx.x) * share, total);
        });
    const int begin = blockIdx.x * share, end = min(begin + share, place.total);

    griddepcontrol_launch_dependents();
    RopeLane<T, D <= 128 ? D : 128> rope(ROPE ? q_norm : nullptr, k_norm);
    bool waited = !ROPE;  // so far only lengths have been read, which no kernel of the step writes
    if (waited) griddepcontrol_wait();

    int sequence = place.sequence, item = place.item;
    for (int next = begin; next < end;) {
        // ---- one piece of work: tiles [first_tile, first_tile + count) of one sequence and head ----
        const int units = num_units(sequence), head = item / units, first_unit = item % units;
        const int piece_units = min(units - first_unit, end - next);
        const int first_tile = max(0, first_unit - PIECE_COST);
        const int count = first_unit + piece_units - PIECE_COST - first_tile;  // below 1 for a piece without a tile
        const int kv_head = head / head_parts, first_member = head % head_parts * HEADS;
        const int members = min(HEADS, group_size - first_member);
        const int64_t token = ROPE ? sequence : cu_seqlens_q[sequence];
        const int64_t q_row = (token * num_kv_heads + kv_head) * group_size + first_member;
        const int seq_len = seq_lens[sequence], cached_len = ROPE ? seq_len - 1 : seq_len;
        const int warp_begin = max(0, seq_len - window) + first_tile * TILE_KEYS + warp * WARP_KEYS;
        const int* block_table = block_tables + static_cast<int64_t>(sequence) * max_blocks;
        const auto go_on = [&] {  // to the next piece
            next += piece_units;
            item += piece_units;
            if (item == units * num_heads) {
                item = 0;
                do sequence++;
                while (next < end && num_units(sequence) == 0);
            }
        };
        if (seq_len == 0) {  // padding
            if (!waited) griddepcontrol_wait();
            waited = true;
            for (int i = threadIdx.x; i < members * (D / 8); i += THREADS) {
                *reinterpret_cast<uint4*>(out + q_row * D + i * 8) = make_uint4(0, 0, 0, 0);
            }
        }
        if (seq_len == 0 || count < 1) {
            go_on();
            continue;
        }

        // Lanes 0 to 15, and again 16 to 31, know the cache slots of the warp's keys in a tile; -1 without one.
        const auto find_slot = [&](int tile) {
            const int key = warp_begin + tile * TILE_KEYS + lane % WARP_KEYS;
            if (tile >= count || key >= cached_len) return -1;
            return block_table[key / block_size] * block_size + key % block_size;
        };
        const auto load = [&](int tile, int lane_slot) {
            const uint32_t stage = stages + tile % STAGES * (2 * HALF_STAGE);
#pragma unroll
            for (int kv = 0; kv < 2; kv++) {  // two groups: the scores need not wait for the values
                const T* cache = kv == 0 ? k_cache : v_cache;
#pragma unroll
                for (int i = 0; i < WARP_KEYS * (D / 8) / WARP_SIZE; i++) {
                    const unsigned chunk = i * WARP_SIZE + lane;
                    const int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
                    const int slot = __shfl_sync(FULL_MASK, lane_slot, row);
                    const int64_t offset = (static_cast<int64_t>(slot) * num_kv_heads + kv_head) * D + column;
                    cp_async_16(stage + kv * HALF_STAGE + (row * ROW + column) * sizeof(T), cache + offset, slot >= 0);
                }
                cp_async_commit();
            }
        };

        int slots[STAGES];
#pragma unroll
        for (int i = 0; i < STAGES; i++) slots[i] = find_slot(i);
#pragma unroll
        for (int i = 0; i < STAGES; i++) load(i, slots[i]);
        int slot_ahead = find_slot(STAGES);

        const int newest = seq_len - 1 - warp_begin;  // from the warp's first key on: where the newest one is
        if constexpr (ROPE) {
            rope.load_position(rope_table, seq_len - 1);
            const int num_q_heads = num_kv_heads * group_size;
            const bool has_newest = first_unit + piece_units == units;
            const int64_t slot = first_member == 0 ? slot_mapping[token] : -1;
            if (!waited) griddepcontrol_wait();  // the keys and values were written by earlier steps
            waited = true;
            make_heads<T, D, div_ceil(HEADS + 2, WARPS), WARPS, ROW>(
                rope, q + token * (num_q_heads + 2 * num_kv_heads) * D, kv_head * group_size + first_member, members,
                has_newest, kv_head, num_q_heads, num_kv_heads, eps, &q_shared[0][0], &new_kv[0][0], k_cache, v_cache,
                slot, warp);
            __syncthreads();
        }

        uint32_t q_b[D / 16][N_TILES][2];  // Q^T as B fragments; padding heads are zero
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int member = n * 8 + group, column = k * 16 + i * 8 + pair;
                    const T* p = ROPE ? &q_shared[ROPE ? member : 0][column] : q + (q_row + member) * D + column;
                    q_b[k][n][i] = member < members ? *reinterpret_cast<const uint32_t*>(p) : 0;
                }
            }
        }

        const float scale_log2 = scale * LOG2_E;
        DecodeResult<D, N_TILES> result;

        // Where this lane's row of an ldmatrix lies: of keys as they are, of values transposed.
        const uint32_t k_lane = ((lane % 16) * ROW + lane / 16 * 8) * sizeof(T);
        const uint32_t v_lane = ((lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 8) * sizeof(T);

        for (int tile = 0; tile < count; tile++) {
            // With ROPE the newest key and value come from this block, not from the cache.
            const auto insert_newest = [&](int kv) {
                const int row = newest - tile * TILE_KEYS;
                if (!ROPE || row < 0 || row >= WARP_KEYS) return;
                T* keys = reinterpret_cast<T*>(warp_shared + (tile % STAGES * 2 + kv) * HALF_STAGE);
                if (lane < D / 8) {
                    *reinterpret_cast<uint4*>(keys + row * ROW + lane * 8) =
                        *reinterpret_cast<const uint4*>(&new_kv[kv][ROPE ? lane * 8 : 0]);
                }
                __syncwarp();
            };
            cp_async_wait<2 * STAGES - 1>();
            __syncwarp();  // the keys are there
            insert_newest(0);

            // S^T = K Q^T, in two chains of half the length
            float s[N_TILES][2][4] = {};
            const uint32_t stage = stages + tile % STAGES * (2 * HALF_STAGE);
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                uint32_t a[4];
                ldmatrix_x4(a, stage + k_lane + k * 16 * sizeof(T));
#pragma unroll
                for (int n = 0; n < N_TILES; n++) mma<T>(s[n][k % 2], a, q_b[k][n][0], q_b[k][n][1]);
            }

            const int first_key = warp_begin + tile * TILE_KEYS;
            uint32_t p[N_TILES][2];
            result.template weigh<T>(p, s, lane, scale_log2, [&](int row) { return first_key + row < seq_len; });

            cp_async_wait<2 * STAGES - 2>();
            __syncwarp();  // the values are there
            insert_newest(1);

            result.template add_values<T>(p, [&](int m) { return stage + HALF_STAGE + v_lane + m * 16 * sizeof(T); });
            __syncwarp();  // all lanes are done with the stage
            load(tile + STAGES, slot_ahead);
            slot_ahead = find_slot(tile + STAGES + 1);
        }

        // ---- merge the warps, through the shared memory that the keys and values have left ----
        cp_async_wait<0>();
        __syncwarp();
        result.sum_up();
        result.store(reinterpret_cast<SoftmaxState*>(warp_shared), reinterpret_cast<float*>(warp_shared + STATE_BYTES),
                     O_ROW, lane);
        __syncthreads();

        PartialResult merged[COLUMNS];
        const auto for_each_column = [&](auto f) {  // f(this thread's i-th result, its head, its first element)
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                const int column = i * THREADS + threadIdx.x;
                if (column < members * (D / 4)) f(merged[i], column / (D / 4), column % (D / 4) * 4);
            }
        };
        const auto merge = [&](int num_results, int stride) {  // results in shared memory, `stride` bytes apart
            for_each_column([&](PartialResult& own, int member, int d) {
                const auto state = [&](int k) { return reinterpret_cast<SoftmaxState*>(shared + k * stride)[member]; };
                const uint8_t* o_column = shared + STATE_BYTES + member * O_ROW_BYTES + d * sizeof(float);
                float top = state(0).max;
#pragma unroll 4
                for (int k = 1; k < num_results; k++) top = fmaxf(top, state(k).max);
                own.raise(top);
#pragma unroll 4
                for (int k = 0; k < num_results; k++) {
                    own.add(state(k), *reinterpret_cast<const float4*>(o_column + k * stride));
                }
            });
        };
        const auto write_out = [&] {
            for_each_column([&](const PartialResult& own, int member, int d) {
                const float inverse = own.softmax.inverse_sum();
                *reinterpret_cast<uint2*>(out + (q_row + member) * D + d) = make_uint2(
                    pack<T>(own.o.x * inverse, own.o.y * inverse), pack<T>(own.o.z * inverse, own.o.w * inverse));
            });
        };
        merge(WARPS, WARP_BYTES);

        // ---- merge the blocks that share this sequence and head: first_block to last_block ----
        const int tiles_begin = next - first_unit + PIECE_COST;  // where the tiles of this sequence and head begin
        const int first_block = tiles_begin / share, last_block = (tiles_begin + units - PIECE_COST - 1) / share;
        if (first_block == last_block) {
            write_out();
        } else {
            // At most the first and the last piece of a block are shared: it has two places for partial results.
            const auto result_of = [&](int block) {
                return partials + (2 * block + (block * share < tiles_begin)) * static_cast<int64_t>(RESULT_BYTES);
            };
            uint8_t* partial = result_of(blockIdx.x);
            for_each_column([&](const PartialResult& own, int member, int d) {
                if (d == 0) reinterpret_cast<SoftmaxState*>(partial)[member] = own.softmax;
                *reinterpret_cast<float4*>(partial + STATE_BYTES + member * O_ROW_BYTES + d * sizeof(float)) = own.o;
            });
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();  // who sees the arrival sees what the block wrote
                is_last = atomicAdd(&arrivals[first_block], 1) == last_block - first_block;
                if (is_last) arrivals[first_block] = 0;  // for the next launch
                __threadfence();
            }
            __syncthreads();
            if (is_last) {
                // As many results at a time as fit into shared memory, so that few trips to the L2 cache are made.
                const int used_bytes = STATE_BYTES + members * O_ROW_BYTES;
                const int capacity = WARPS * WARP_BYTES / used_bytes;
                for (PartialResult& own : merged) own = PartialResult();
                for (int block = first_block; block <= last_block; block += capacity) {
                    const int count = min(capacity, last_block + 1 - block);
                    for (int k = warp; k < count; k += WARPS) {
                        const uint8_t* from = result_of(block + k);
                        for (int byte = lane * 16; byte < used_bytes; byte += WARP_SIZE * 16) {
                            cp_async_16(shared_address(shared + k * used_bytes + byte), from + byte, true);
                        }
                    }
                    cp_async_commit();
                    cp_async_wait<0>();
                    __syncthreads();
                    merge(count, used_bytes);
                    __syncthreads();
                }
                write_out();
            }
        }

        go_on();
        __syncthreads();  // the results in shared memory have been read
    }
    if (!waited) griddepcontrol_wait();
}
