// What stands between the QKV and the output projection of a decode step, in one launch: split, q/k norm, rotary
// embedding, cache write (all as in rope.cu) and attention over the paged cache (as in paged_attention.cu), for few
// sequences with one new token each.
//
// Shapes: qkv [B, (Hq + 2 Hkv) D]; out [B, Hq D]; k_cache, v_cache [blocks, block_size, Hkv, D]; rope_table [positions,
// D]; slot_mapping, seq_lens [B]; block_tables [B, max_blocks]. G = Hq / Hkv is at most 8, D at most 128. seq_lens
// counts the new token, whose position is seq_len - 1; slot -1 (padding) is not written. No sequence may see another
// one's new key.
//
// Why: with one sequence of some hundred tokens, attention is a chain of latencies. So
//   - keys and values of earlier steps are loaded before griddepcontrol_wait, while the QKV projection still runs;
//   - each block makes the q heads that it needs by itself; one of them makes k and v too, puts them into its tile in
//     shared memory and into the cache, so nobody waits for the cache;
//   - the blocks that share a sequence and KV head are a cluster: they merge through the first one's shared memory, not
//     through global memory and an atomic counter.
//
// Who does what: grid [CLUSTER, Hkv, B]. Tiles of 16 keys go round the cluster's blocks, then their warps. A warp makes
// a head of q (or k, v) at a time, then works on its tiles alone, with its own ring of STAGES tiles.
//
// Bytes: K and V once, 4 D Hkv a key in 16 bits.
//
// H200, bf16, 16 query and 8 KV heads of 128, cache blocks of 16 in random order, graph of many launches, us (rope.cu
// and the paged_attention.cu of then in brackets), by cluster, warps and stages:
//   batch x context    8, 8, 1    8, 8, 2    8, 4, 1    4, 8, 1    4, 4, 2    2, 8, 1   apart
//   1 x 256              3.31       3.51       3.15       2.95       2.83       3.04    (6.57)
//   1 x 1024             4.04       4.63       4.74       5.01       5.97       7.64    (8.57)
//   1 x 4096            10.2        8.93      12.4       13.0       19.0       21.1    (13.3)
//   1 x 16384           32.9       27.7       41.3       41.3       68.5       72.8    (27.9)
//   2 x 1024             5.86       9.15       5.71       5.94       6.90       8.14    (9.84)
//   2 x 8192            26.8       32.4       28.5       28.1       38.3       39.9    (26.7)
//   4 x 256              7.87      11.2        4.43       4.23       3.99       3.67    (7.83)
//   4 x 1024            11.9       15.1        7.36       7.65       8.11       9.57    (11.3)
//   4 x 8192            46.4       51.9       51.2       50.0       52.0       49.1    (40.2)
//   8 x 1024                                  14.6                  11.1       12.0    (15.9)
//   8 x 4096                                  45.2                  41.6       39.9    (43.9)
// So it is for short and middling contexts; a long one would want more blocks than a cluster has, and gets them from
// paged_attention.cu only in larger batches, since the host does not know lengths when a graph is captured.
// Clusters of 16 (1 x 4096: 8.45, 1 x 256: 4.07) need a GPU with as many free multiprocessors in one place.
// 166 registers instead of 128: the same.
#include "cluster.cuh"
#include "decode_warp.cuh"
#include "rope_heads.cuh"

constexpr int TILE = 16;  // keys of a warp at a time: the M of an mma
constexpr int HEADS = 8;  // query heads of a block, the N of an mma; some may be padding

template <typename T, int D, int CLUSTER, int WARPS, int STAGES>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(WARPS * WARP_SIZE, 16 / WARPS) decode_attention(
    T* out, const T* qkv, T* k_cache, T* v_cache, const float* __restrict__ rope_table, const T* __restrict__ q_norm,
    const T* __restrict__ k_norm, const int* __restrict__ slot_mapping,
    const int* __restrict__ seq_lens, const int* __restrict__ block_tables, int max_blocks, int block_size,
    int num_kv_heads, int group_size, float eps, float scale, int window) {
    constexpr int THREADS = WARPS * WARP_SIZE;
    constexpr int ROW = D + 8;                          // padded rows, so that ldmatrix meets no bank twice
    constexpr int HALF_STAGE = TILE * ROW * sizeof(T);  // bytes of a warp's keys, or values, of one tile
    constexpr int WARP_BYTES = STAGES * 2 * HALF_STAGE;
    // A partial result: SoftmaxState [HEADS], then float [heads][O_ROW].
    constexpr int O_ROW = D + 4, STATE_BYTES = HEADS * sizeof(SoftmaxState), O_ROW_BYTES = O_ROW * sizeof(float);
    constexpr int COLUMNS = div_ceil(HEADS * D / 4, THREADS);  // of 4 elements, that a thread merges
    static_assert(D % 16 == 0 && D / 4 <= WARP_SIZE && STATE_BYTES + HEADS * O_ROW_BYTES <= WARP_BYTES);

    extern __shared__ __align__(16) uint8_t shared[];  // [WARPS][STAGES][keys, values][TILE][ROW], then the results
    __shared__ __align__(16) T q_shared[HEADS][ROW];
    __shared__ __align__(16) T new_kv[2][D];

    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int group = lane / 4, pair = lane % 4 * 2;
    const int rank = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z;
    uint8_t* warp_shared = shared + warp * WARP_BYTES;  // the tiles, and when they are done the warp's result
    const uint32_t stages = shared_address(warp_shared);

    // ---- this warp's tiles: number rank + CLUSTER warp, and every (CLUSTER WARPS)-th after it ----
    const int seq_len = seq_lens[sequence], first_key = max(0, seq_len - window), num_keys = seq_len - first_key;
    const int first_tile = rank + CLUSTER * warp, num_tiles = div_ceil(num_keys, TILE);
    const int count = div_ceil(max(0, num_tiles - first_tile), CLUSTER * WARPS);
    const int* block_table = block_tables + static_cast<int64_t>(sequence) * max_blocks;

    // Lanes 0 to 15, and again 16 to 31, know the cache slots of the keys in a tile; -1 from the newest key on.
    const auto find_slot = [&](int i) {
        const int key = first_key + (first_tile + i * (CLUSTER * WARPS)) * TILE + lane % TILE;
        return i < count && key < seq_len - 1 ? block_table[key / block_size] * block_size + key % block_size : -1;
    };
    const auto load = [&](int i, int lane_slot) {
        const uint32_t stage = stages + i % STAGES * (2 * HALF_STAGE);
        constexpr int CHUNKS = TILE * (D / 8) / WARP_SIZE;
        int64_t offsets[CHUNKS];
#pragma unroll
        for (int kv = 0; kv < 2; kv++) {  // two groups: the scores need not wait for the values
            const T* cache = kv == 0 ? k_cache : v_cache;
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                const unsigned chunk = j * WARP_SIZE + lane;
                const int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
                if (kv == 0) {
                    const int64_t slot = __shfl_sync(FULL_MASK, lane_slot, row);
                    offsets[j] = (slot * num_kv_heads + kv_head) * D + column;  // negative if there is no slot
                }
                const uint32_t place = stage + kv * HALF_STAGE + (row * ROW + column) * sizeof(T);
                cp_async_16(place, cache + offsets[j], offsets[j] >= 0);
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

    // ---- q, k and v of the new token ----
    const int newest = num_keys - 1, newest_tile = newest / TILE;
    const bool has_newest = num_keys > 0 && newest_tile % CLUSTER == rank;  // this block makes k and v, too
    const int num_q_heads = num_kv_heads * group_size;
    const int64_t new_slot = slot_mapping[sequence];
    RopeLane<T, D> rope(q_norm, k_norm);
    rope.load_position(rope_table, max(0, seq_len - 1));
    cluster_arrive();
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();  // so far only lengths, weights and keys and values of earlier steps have been read

    make_heads<T, D, div_ceil(HEADS + 2, WARPS), WARPS, ROW>(
        rope, qkv + static_cast<int64_t>(sequence) * (num_q_heads + 2 * num_kv_heads) * D, kv_head * group_size,
        group_size, has_newest, kv_head, num_q_heads, num_kv_heads, eps, &q_shared[0][0], &new_kv[0][0], k_cache,
        v_cache, new_slot, warp);
    __syncthreads();

    // Q^T as B fragments; padding heads are zero.
    uint32_t q_b[D / 16][2];
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const T* p = &q_shared[group][k * 16 + i * 8 + pair];
            q_b[k][i] = group < group_size ? *reinterpret_cast<const uint32_t*>(p) : 0;
        }
    }

    // ---- the tiles ----
    const float scale_log2 = scale * LOG2_E;
    DecodeResult<D, 1> result;
    const uint32_t k_lane = ((lane % 16) * ROW + lane / 16 * 8) * sizeof(T);
    const uint32_t v_lane = ((lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 8) * sizeof(T);

    for (int i = 0; i < count; i++) {
        const int tile = first_tile + i * (CLUSTER * WARPS);
        const uint32_t stage = stages + i % STAGES * (2 * HALF_STAGE);
        // The newest key and value come from this block, not from the cache.
        const auto insert_newest = [&](int kv) {
            if (tile != newest_tile) return;
            T* place = reinterpret_cast<T*>(warp_shared + (i % STAGES * 2 + kv) * HALF_STAGE) + newest % TILE * ROW;
            if (lane < D / 8) {
                *reinterpret_cast<uint4*>(place + lane * 8) = *reinterpret_cast<const uint4*>(&new_kv[kv][lane * 8]);
            }
            __syncwarp();
        };
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();  // the keys are there
        insert_newest(0);

        // S^T = K Q^T, in two chains of half the length
        float s[1][2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4];
            ldmatrix_x4(a, stage + k_lane + k * 16 * sizeof(T));
            mma<T>(s[0][k % 2], a, q_b[k][0], q_b[k][1]);
        }
        uint32_t p[1][2];
        result.template weigh<T>(p, s, lane, scale_log2, [&](int row) { return tile * TILE + row < num_keys; });
        cp_async_wait<2 * STAGES - 2>();
        __syncwarp();  // the values are there
        insert_newest(1);
        result.template add_values<T>(p, [&](int m) { return stage + HALF_STAGE + v_lane + m * 16 * sizeof(T); });
        __syncwarp();  // all lanes are done with the stage
        load(i + STAGES, slot_ahead);
        slot_ahead = find_slot(i + STAGES + 1);
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
            if (column < group_size * (D / 4)) f(merged[i], column / (D / 4), column % (D / 4) * 4);
        }
    };
    const auto merge = [&](const uint8_t* results, int num_results, int stride) {  // `stride` bytes apart
        for_each_column([&](PartialResult& own, int member, int d) {
            own = PartialResult();
            const auto state = [&](int k) {
                return reinterpret_cast<const SoftmaxState*>(results + k * stride)[member];
            };
            const uint8_t* o_column = results + STATE_BYTES + member * O_ROW_BYTES + d * sizeof(float);
            float top = state(0).max;
#pragma unroll
            for (int k = 1; k < num_results; k++) top = fmaxf(top, state(k).max);
            own.raise(top);
#pragma unroll
            for (int k = 0; k < num_results; k++) {
                own.add(state(k), *reinterpret_cast<const float4*>(o_column + k * stride));
            }
        });
    };
    merge(shared, WARPS, WARP_BYTES);

    // ---- merge the blocks of the cluster, in the first one's shared memory ----
    cluster_wait();  // all blocks have started
    if constexpr (CLUSTER > 1) {
        const int result_bytes = STATE_BYTES + group_size * O_ROW_BYTES;
        const uint32_t place = cluster_address(shared_address(shared + WARPS * WARP_BYTES + rank * result_bytes), 0);
        for_each_column([&](const PartialResult& own, int member, int d) {
            const float2 state = make_float2(own.softmax.max, own.softmax.sum);
            if (d == 0) cluster_store(place + member * sizeof(SoftmaxState), state);
            cluster_store(place + STATE_BYTES + member * O_ROW_BYTES + d * sizeof(float), own.o);
        });
        cluster_arrive();
        cluster_wait();
        if (rank > 0) return;
        merge(shared + WARPS * WARP_BYTES, CLUSTER, result_bytes);
    }
    for_each_column([&](const PartialResult& own, int member, int d) {
        const float inverse = own.softmax.inverse_sum();
        const int64_t head = static_cast<int64_t>(sequence) * num_q_heads + kv_head * group_size + member;
        *reinterpret_cast<uint2*>(out + head * D + d) =
            make_uint2(pack<T>(own.o.x * inverse, own.o.y * inverse), pack<T>(own.o.z * inverse, own.o.w * inverse));
    });
}
