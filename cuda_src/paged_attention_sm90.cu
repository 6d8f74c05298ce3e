// Attention of decoding sequences on Hopper, for large batches: what paged_attention.cu does with ROPE, with keys and
// values fetched by the copy engine.
//
//   out[b, h] = sum_j softmax_j(scale q[b, h] . k[b, j, h / G]) v[b, j, h / G],   j over b's last `window` keys
//
// Shapes, and how q, k and v are made of qkv: as there. D is 64 or 128, block_size a multiple of 16, and G at most 8.
//
// 16 tokens of a cache block lie together in memory with all their heads: [16][Hkv][D]. Who fetches one head of them
// touches 256 bytes here and there, which costs the memory bandwidth and energy. So a block of threads takes all heads
// of its keys (up to 8), a warp each, and one more warp lets the copy engine fetch the keys, or the values, of 16
// tokens and all heads in one box: 32 KiB with 8 heads of 128. It lies in shared memory as [head, 64 elements each]
// [16 tokens][64], swizzled, so that a warp finds its rows 128 bytes apart.
//
// The 16-key tiles of the batch are laid end to end, and each block gets an equal share of them, whatever the lengths
// (stream-K; Osama et al., 2023). The fetching warp goes from one sequence to the next without waiting for what is
// computed, as far as the ring goes. The others compute S^T = K Q^T and O^T = V^T P^T as in paged_attention.cu, without
// a barrier between them: each has a head of its own. Blocks that share a sequence leave partial results, and of their
// warps with a head the last to arrive merges them.
//
// The ring is as short as it can be without leaving room for another block: a multiprocessor that has room for one
// while the kernel in front ends may get it, and others none.
//
// Bytes: K and V once, 4 D Hkv a key; partial results add 16 (D + 4) bytes a head at most twice a block.
//
// H200, bf16, 8 KV heads of 128, cache blocks of 16 in random order, launched again and again for half a second, us and
// mJ a launch; beside it paged_attention.cu on the same machine, and a plain read of as many bytes:
//                           256 x 608      256 x 288      128 x 608      64 x 608      32 x 304      16 x 1008
//   16 query heads        162.6, 103.6   83.9, 51.5     87.7, 53.9     50.6, 28.0    18.8, 8.3     29.2, 13.1
//     paged_attention.cu  168.0, 124.6   87.2, 62.0     89.1, 63.1     47.6, 32.4    14.2, 8.5     24.6, 13.8
//   32 query heads        162.7, 105.2
//     paged_attention.cu  171.6, 118.4
//   a read                149.1, 109.2
// To begin and to end takes some 5 us more than there, where blocks of one launch begin beside those of the last.
//
// Who reads how (671 MB of keys and values in random blocks of 16; us and mJ; nothing computed):
//   a plain read, in order 147 to 152, 84 to 109 by machine
//   a warp with 16 rows of a head, 256 bytes each, its neighbours with the head's next tiles 161, 103 to 111
//   the same, its neighbours with the other heads of the same rows 154, 100
//   cp.async.bulk, 32 KiB at a time 148, 81; 2 KiB 159, 92; 256 bytes 566, for the copy engine takes 28 ns for each
//   boxes of 64 elements x 16 rows x 16, as here 154, 98; with 256 bytes fetched into L2 at a time 162, 101
// Tried:
//   cp.async by each warp for its head, no fetching warp: 256 x 608 170 to 179 us (163), 64 x 608 48 to 56
//   in paged_attention.cu, a row with one cp.async.bulk: 164.2 (163.1), 118 mJ (113)
//   q, k and v of the next piece asked for a piece ahead, and shared pieces first so that little is merged in the end:
//     no change
//   3 slots, so that two blocks fit on a multiprocessor: 157.4 us alone, but nano with Qwen3-0.6B fell from 27,150 to
//     22,900 tok/s: blocks that start while the kernel in front ends do not spread evenly
// Tried within a layer of Qwen3-0.6B, from the QKV to the down projection, us with 256 sequences of 608 in the mean:
//   6 slots instead of 4: 202.4 instead of 201.4
//   room for a block of the QKV product, which then has half of the shared memory, so that this kernel begins beside
//     it: 205.9 instead of 203.0, since a ring half as long costs the product more; and for the output projection 207.1
//   both halves of the batch in branches of the graph, attention of the one beside products of the other: 202.1 at best
//     instead of 203.0; 64 sequences of 900 95.2 (90.0), a layer of Qwen3-8B 514 (350). Products crawl where the memory
//     has so much to fetch, and each reads its weight twice
//   the fetching warp, when it is done, asks for the first 1, 2 or 4 tiles of each block in the next layer to come into
//     L2: 204.4, 206.4, 209.4 instead of 203.5; a kernel of its own does so beside the QKV product: no change
#include "decode_warp.cuh"
#include "ragged.cuh"
#include "rope_heads.cuh"
#include "wgmma.cuh"

constexpr int MAX_WARPS = 8;  // that compute

// A part of a block's share: `count` tiles of a sequence, from first_key on.
struct Piece {
    int next, end;  // units of the batch: where this piece begins, and where the block's share ends
    int sequence, first_unit, units, of_sequence;  // this piece's units, and how many its sequence has
    int count, seq_len, first_key;
};

template <typename T, int D>
__global__ void __launch_bounds__((MAX_WARPS + 1) * WARP_SIZE)
    paged_attention_sm90(T* out, const T* qkv, const __grid_constant__ TensorMap k_map,
                         const __grid_constant__ TensorMap v_map, T* k_cache, T* v_cache,
                         const int* __restrict__ seq_lens, const int* __restrict__ block_tables,
                         const float* __restrict__ rope_table, const T* __restrict__ q_norm,
                         const T* __restrict__ k_norm, const int* __restrict__ slot_mapping,
                         uint8_t* __restrict__ partials, int* __restrict__ arrivals, int num_sequences, int max_blocks,
                         int block_size, int num_kv_heads, int group_size, int slots, float eps, float scale,
                         int window) {
#ifdef HAS_WGMMA
    constexpr int TILE_KEYS = 16;                          // the M of an mma
    constexpr int MAX_SLOTS = 20;                          // of the ring, each for the keys or the values of a tile
    constexpr int PIECE_COST = 1;                          // of beginning with a sequence, in tiles
    constexpr int MAX_GROUP_SIZE = 8;                      // the N of an mma: query heads, some may be padding
    constexpr int HEAD_BYTES = TILE_KEYS * D * sizeof(T);  // of a slot
    constexpr int COLUMN_BYTES = TILE_KEYS * SWIZZLE_ROW;  // of 64 elements of a head
    constexpr int ROW = D + 8;                             // padded rows of q
    constexpr int RESULT = (D / 16 + 1) * WARP_SIZE;       // float4 of a partial result
    static_assert(D % 64 == 0 && D <= 128);

    // The ring [slots][heads][D / 64][TILE_KEYS][64]; each warp's q [G][ROW], and its new key and value [2][D].
    extern __shared__ __align__(1024) uint8_t shared[];
    __shared__ __align__(8) uint64_t barriers[2][MAX_SLOTS];

    const int num_warps = blockDim.x / WARP_SIZE - 1, lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const uint32_t ring = shared_address(shared);
    const uint32_t full = shared_address(barriers[0]), empty = shared_address(barriers[1]);
    const int slot_bytes = num_warps * HEAD_BYTES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < slots; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, num_warps);
        }
        fence_mbarrier_init();
        fence_proxy_async();
    }

    // ---- this block's share of all tiles, which follow one another by sequence, then key ----
    const auto first_key_of = [&](int seq_len) { return max(0, seq_len - window) / TILE_KEYS * TILE_KEYS; };
    const auto num_units = [&](int i) {  // tiles, and what it takes to begin; 1 for padding
        const int seq_len = seq_lens[i];
        return seq_len > 0 ? div_ceil(seq_len - first_key_of(seq_len), TILE_KEYS) + PIECE_COST : 1;
    };
    int share;  // units of a block; those of block b begin at b share
    const RaggedPlace place = find_ragged<(MAX_WARPS + 1) * WARP_SIZE>(num_sequences, num_units, [&](int total) {
        share = div_ceil(total, static_cast<int>(gridDim.x));
        return min(static_cast<int>(blockIdx.x) * share, total);
    });
    const auto describe = [&](Piece& piece) {
        piece.of_sequence = num_units(piece.sequence);
        piece.units = min(piece.of_sequence - piece.first_unit, piece.end - piece.next);
        piece.seq_len = seq_lens[piece.sequence];
        const int first_tile = max(0, piece.first_unit - PIECE_COST);
        piece.first_key = first_key_of(piece.seq_len) + first_tile * TILE_KEYS;
        piece.count = piece.seq_len == 0 ? 0 : max(0, piece.first_unit + piece.units - PIECE_COST - first_tile);
    };
    const auto go_on = [&](Piece& piece) {  // a piece that is not the last ends with its sequence
        piece.next += piece.units;
        piece.first_unit = 0;
        piece.sequence++;
        if (piece.next < piece.end) describe(piece);
    };
    const int begin = blockIdx.x * share;
    Piece piece = {begin, min(begin + share, place.total), place.sequence, place.item};
    if (piece.next < piece.end) describe(piece);
    griddepcontrol_launch_dependents();

    if (warp == num_warps) {
        // ---- the warp that fetches what earlier steps have written: it need not wait for the kernel in front ----
        for (int slot = 0, parity = 1; piece.next < piece.end; go_on(piece)) {
            const int* block_table = block_tables + static_cast<int64_t>(piece.sequence) * max_blocks;
            for (int tile = 0; tile < piece.count; tile += WARP_SIZE) {
                const int key = piece.first_key + (tile + lane) * TILE_KEYS;
                const int row = tile + lane < piece.count
                                    ? block_table[key / block_size] * block_size + key % block_size
                                    : 0;
                for (int i = 0; i < min(WARP_SIZE, piece.count - tile); i++) {
                    const int first_row = __shfl_sync(FULL_MASK, row, i);
#pragma unroll
                    for (int kv = 0; kv < 2; kv++) {
                        if (lane == 0) {
                            mbarrier_wait(empty + 8 * slot, parity);
                            mbarrier_arrive_expect(full + 8 * slot, slot_bytes);
                            copy_box(ring + slot * slot_bytes, kv == 0 ? k_map : v_map, 0, first_row,
                                     blockIdx.y * num_warps * (D / 64), full + 8 * slot);
                        }
                        if (++slot == slots) slot = 0, parity ^= 1;
                    }
                }
            }
        }
        return;
    }

    // ---- a warp that computes: all query heads of one KV head ----
    const int group = lane / 4, pair = lane % 4 * 2;
    const int kv_head = blockIdx.y * num_warps + warp;
    T* own_q = reinterpret_cast<T*>(shared + slots * slot_bytes) + warp * (group_size * ROW + 2 * D);
    T* new_kv = own_q + group_size * ROW;
    // This lane's row of an ldmatrix of Q: padding heads are the last one again.
    const uint32_t q_lane = shared_address(own_q + min(lane % 8, group_size - 1) * ROW + lane / 8 * 8);
    RopeLane<T, D> rope(q_norm, k_norm);
    griddepcontrol_wait();

    const float scale_log2 = scale * LOG2_E;
    // This lane's row of an ldmatrix, of keys as they are, of values transposed, and its first 16 bytes therein.
    const int k_row = lane % 16, v_row = lane % 8 + lane / 16 * 8;
    const int k_chunk = (lane / 16 ^ lane % 8) * 16, v_chunk = (lane / 8 % 2 ^ lane % 8) * 16;
    const auto column_offset = [](int chunk, int k) {  // of 16 columns from k 16 on
        return k / 4 * COLUMN_BYTES + (chunk ^ k % 4 * 32);
    };

    int slot = 0, parity = 0;
    for (; piece.next < piece.end; go_on(piece)) {
        const int sequence = piece.sequence, seq_len = piece.seq_len;
        const int64_t q_row = (static_cast<int64_t>(sequence) * num_kv_heads + kv_head) * group_size;
        if (seq_len == 0) {  // padding
            for (int i = lane; i < group_size * (D / 8); i += WARP_SIZE) {
                *reinterpret_cast<uint4*>(out + q_row * D + i * 8) = make_uint4(0, 0, 0, 0);
            }
        }
        if (piece.count == 0) continue;

        __syncwarp();  // what the last piece had in shared memory has been read
        rope.load_position(rope_table, seq_len - 1);
        const bool has_newest = piece.first_unit + piece.units == piece.of_sequence;
        const int num_q_heads = num_kv_heads * group_size;
        const T* token = qkv + static_cast<int64_t>(sequence) * (num_q_heads + 2 * num_kv_heads) * D;
        const int64_t new_slot = slot_mapping[sequence];
        make_heads<T, D, MAX_GROUP_SIZE + 2, 1, ROW>(rope, token, kv_head * group_size, group_size, has_newest,
                                                     kv_head, num_q_heads, num_kv_heads, eps, own_q, new_kv, k_cache,
                                                     v_cache, new_slot, 0);
        __syncwarp();

        DecodeResult<D, 1> result;
        const int first_visible = max(0, seq_len - window);
        int first_key = piece.first_key;
        for (int tile = 0; tile < piece.count; tile++, first_key += TILE_KEYS) {
            const bool is_partial = first_key < first_visible || first_key + TILE_KEYS >= seq_len;
            const auto is_visible = [&](int row) {
                return first_key + row >= first_visible && first_key + row < seq_len;
            };
            uint8_t* place;
            const auto wait_for_slot = [&] {
                mbarrier_wait(full + 8 * slot, parity);
                place = shared + slot * slot_bytes + warp * HEAD_BYTES;
            };
            const auto release_slot = [&] {
                if (is_partial) fence_proxy_async();  // it has been written to
                __syncwarp();
                if (lane == 0) mbarrier_arrive(empty + 8 * slot);
                if (++slot == slots) slot = 0, parity ^= 1;
            };
            // Of the last tile, and the first of a window: the newest key and value come from this warp, not from the
            // cache, and values that nobody may see become zero: even what is not a number must weigh nothing.
            const auto complete = [&](int kv) {
                for (int i = lane; i < TILE_KEYS * (D / 8); i += WARP_SIZE) {
                    const int row = i % TILE_KEYS, column = i / TILE_KEYS;
                    const bool is_newest = first_key + row == seq_len - 1;
                    if (!is_newest && (kv == 0 || is_visible(row))) continue;
                    const uint4 zero = make_uint4(0, 0, 0, 0);
                    *reinterpret_cast<uint4*>(place + column / 8 * COLUMN_BYTES + row * SWIZZLE_ROW +
                                              (column % 8 ^ row % 8) * 16) =
                        is_newest ? reinterpret_cast<const uint4*>(new_kv + kv * D)[column] : zero;
                }
                __syncwarp();
            };

            wait_for_slot();
            if (is_partial) complete(0);
            // S^T = K Q^T, in two chains of half the length
            float s[1][2][4] = {};
            const uint32_t keys = shared_address(place) + k_row * SWIZZLE_ROW;
#pragma unroll
            for (int k = 0; k < D / 16; k += 2) {
                uint32_t a[4], b[4];
                ldmatrix_x4(b, q_lane + k * 16 * sizeof(T));
                ldmatrix_x4(a, keys + column_offset(k_chunk, k));
                mma<T>(s[0][0], a, b[0], b[1]);
                ldmatrix_x4(a, keys + column_offset(k_chunk, k + 1));
                mma<T>(s[0][1], a, b[2], b[3]);
            }
            release_slot();

            uint32_t p[1][2];
            result.template weigh<T>(p, s, lane, scale_log2, is_visible);

            wait_for_slot();
            if (is_partial) complete(1);
            const uint32_t values = shared_address(place) + v_row * SWIZZLE_ROW;
            result.template add_values<T>(p, [&](int m) { return values + column_offset(v_chunk, m); });
            release_slot();
        }

        // ---- merge the blocks that share this sequence: first_block to last_block ----
        const int tiles_begin = piece.next - piece.first_unit + PIECE_COST;  // where the sequence's tiles begin
        const int last_tile = tiles_begin + piece.of_sequence - PIECE_COST - 1;
        const int first_block = tiles_begin / share, last_block = last_tile / share;
        if (first_block != last_block) {
            const auto number_of = [&](int block) { return (blockIdx.y * gridDim.x + block) * num_warps + warp; };
            // At most the first and the last piece of a block are shared: it has two places for partial results.
            const auto result_of = [&](int block) {
                const int64_t number = 2 * number_of(block) + (block * share < tiles_begin);
                return reinterpret_cast<float4*>(partials) + number * RESULT + lane;
            };
            const bool has_heads = pair < group_size;  // other lanes have padding
            if (has_heads) {
                float4* own = result_of(blockIdx.x);
#pragma unroll
                for (int m = 0; m < D / 16; m++) {
                    const float(&o)[4] = result.o[m][0];
                    own[m * WARP_SIZE] = make_float4(o[0], o[1], o[2], o[3]);
                }
                const SoftmaxState(&states)[2] = result.softmax[0];
                own[D / 16 * WARP_SIZE] = make_float4(states[0].max, states[0].sum, states[1].max, states[1].sum);
            }
            __syncwarp();
            bool is_last = false;
            if (lane == 0) {
                __threadfence();  // who sees the arrival sees what the warp wrote
                int* arrived = &arrivals[number_of(first_block)];
                is_last = atomicAdd(arrived, 1) == last_block - first_block;
                if (is_last) *arrived = 0;  // for the next launch
                __threadfence();
            }
            if (!__shfl_sync(FULL_MASK, is_last, 0)) continue;
            result = DecodeResult<D, 1>();  // in the order of blocks, whoever does it: the same sums each time
#pragma unroll 1
            for (int block = first_block; block <= last_block && has_heads; block++) {
                const float4* other = result_of(block);
                const float4 states = __ldcg(other + D / 16 * WARP_SIZE);
                float4 o[D / 16];
#pragma unroll
                for (int m = 0; m < D / 16; m++) o[m] = __ldcg(other + m * WARP_SIZE);
                result.raise(0, 0, states.x);
                result.raise(0, 1, states.z);
                const float first = result.softmax[0][0].add({states.x, states.y});
                const float second = result.softmax[0][1].add({states.z, states.w});
#pragma unroll
                for (int m = 0; m < D / 16; m++) {
                    float(&sum)[4] = result.o[m][0];
                    sum[0] += first * o[m].x, sum[1] += second * o[m].y;
                    sum[2] += first * o[m].z, sum[3] += second * o[m].w;
                }
            }
            __syncwarp();
        }
        result.sum_up();
        const float inverse[2] = {result.softmax[0][0].inverse_sum(), result.softmax[0][1].inverse_sum()};
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float(&o)[4] = result.o[m][0];
                const uint32_t two = movmatrix_trans(pack<T>(o[2 * half] * inverse[0], o[2 * half + 1] * inverse[1]));
                if (group >= group_size) continue;
                *reinterpret_cast<uint32_t*>(out + (q_row + group) * D + m * 16 + half * 8 + pair) = two;
            }
        }
    }
#endif
}
