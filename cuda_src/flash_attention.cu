// Attention of prompts, and of chunks of them behind a cached context, over the paged KV cache: FlashAttention-2
// (Dao, 2023) on the tensor cores of sm_80 and later; and the plain kernel for everything else.
//
//   out[t, h] = sum_j softmax_j(scale q[t, h] . k[j, h / G]) v[j, h / G],   pos(t) - window < j <= pos(t)
//
// Shapes: q, out [tokens, Hq, D]; k_cache, v_cache [blocks, block_size, Hkv, D]; block_tables [B, max_blocks];
// G = Hq / Hkv. Sequence b brings the tokens cu_seqlens_q[b] to cu_seqlens_q[b + 1]; the last has position
// seq_lens[b] - 1.
//
// Who does what (flash_attention): a block has 64 M_TILES rows, one a query token and head of a KV head's group,
// token by token; so a tile spans few tokens, and little of it lies beyond the diagonal. It walks over the keys
// that its rows see, BLOCK_N at a time; cp.async brings values while scores are computed, and the next keys while
// values are weighed. Each warp has 16 M_TILES rows of S, P and O in registers: with 32 rows each fragment of K and
// V read from shared memory feeds four products, with 16 shared memory would be the limit. Blocks are numbered such
// that the longest tiles of a sequence come first, and the heads of a tile together, for K and V to be found in L2.
//
// Bytes: K and V pass from L2 into shared memory once for 64 M_TILES rows. FLOPs: 4 D a row and visible key.
//
// H200, bf16, cache blocks of 16, causal FLOPs, 4 x 4096 tokens (Hopper itself uses flash_attention_sm90.cu):
//   D = 128, 32/8 heads: 1.78 ms, 310 TFLOP/s   D = 64, 32/8: 1.04 ms, 263   D = 96, 32/8: 1.51 ms, 274
//   D = 256, 16/4: 2.29 ms, 240
// These were measured with O scaled only where a maximum had risen, and BLOCK_N 128 for D = 64. Both spill registers
// on sm_100 and sm_120, so O is scaled always now, and BLOCK_N is 112.
// Before and beside it, TFLOP/s:
//   a ring of 2, 3, 4 tiles of keys and values, D = 128: 312, 307, 306; the second block hides what a longer one would
//   BLOCK_N 64 for D = 64: 241; 32 for D = 256: 215; 64 for D = 256: 245, but more shared memory than sm_86 has
#include "mma.cuh"
#include "ragged.cuh"
#include "softmax_state.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP_SIZE;

// ---- plain: one block a query and head, any head size, also decoding --------------------------------------------

// What the fast kernels compute, without tensor cores: each warp takes every WARPS-th group of keys, the lanes
// share a head's elements (element d in lane d % 32), and the warps' partial results merge in the end.
template <typename T, int LANE_D>
__global__ void __launch_bounds__(THREADS)
    plain_attention(T* __restrict__ out, const T* __restrict__ q, const T* __restrict__ k_cache,
                    const T* __restrict__ v_cache, const int* __restrict__ cu_seqlens_q,
                    const int* __restrict__ seq_lens, const int* __restrict__ block_tables, int num_sequences,
                    int max_blocks, int block_size, int num_kv_heads, int group_size, int head_dim, float scale,
                    int window) {
    constexpr int KEYS = 4;  // at a time, so that several loads are in flight
    __shared__ float warp_o[WARPS][LANE_D * WARP_SIZE];
    __shared__ SoftmaxState warp_states[WARPS];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int token = blockIdx.x, head = blockIdx.y;
    const int64_t q_row = (static_cast<int64_t>(token) * gridDim.y + head) * head_dim;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();

    // The sequence of this token: the last one that starts at or before it. Tokens after all sequences are padding.
    int sequence = 0;
    for (int end = num_sequences; end - sequence > 1;) {
        const int middle = (sequence + end) / 2;
        (cu_seqlens_q[middle] <= token ? sequence : end) = middle;
    }
    const int after = cu_seqlens_q[sequence + 1] - token;  // this token and those after it
    const int kv_end = after > 0 ? seq_lens[sequence] - after + 1 : 0;
    const int kv_begin = max(0, kv_end - window);
    const int* block_table = block_tables + static_cast<int64_t>(sequence) * max_blocks;

    // Lanes beyond the head's end repeat its last element, with a zero query: that spares the loop all branches.
    float q_lane[LANE_D], o[LANE_D] = {};
    int d[LANE_D];
#pragma unroll
    for (int i = 0; i < LANE_D; i++) {
        const bool inside = i * WARP_SIZE + lane < head_dim;
        d[i] = inside ? i * WARP_SIZE + lane : head_dim - 1;
        q_lane[i] = inside ? to_float(q[q_row + d[i]]) * (scale * LOG2_E) : 0.0f;
    }
    SoftmaxState softmax;
    for (int first = kv_begin + warp * KEYS; first < kv_end; first += WARPS * KEYS) {
        float score[KEYS], v[KEYS][LANE_D];
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            const int key = min(first + k, kv_end - 1);
            const int slot = block_table[key / block_size] * block_size + key % block_size;
            const int64_t row = (static_cast<int64_t>(slot) * num_kv_heads + head / group_size) * head_dim;
            score[k] = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE_D; i++) {
                score[k] += q_lane[i] * to_float(k_cache[row + d[i]]);
                v[k][i] = to_float(v_cache[row + d[i]]);
            }
        }
        float top = -INF;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            score[k] = warp_reduce_sum(score[k]);
            if (first + k >= kv_end) score[k] = -INF;
            top = fmaxf(top, score[k]);
        }
        const float factor = softmax.raise(top);
#pragma unroll
        for (int i = 0; i < LANE_D; i++) o[i] *= factor;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            const float weight = softmax.add(score[k]);
#pragma unroll
            for (int i = 0; i < LANE_D; i++) o[i] += weight * v[k][i];
        }
    }

#pragma unroll
    for (int i = 0; i < LANE_D; i++) warp_o[warp][i * WARP_SIZE + lane] = o[i];
    if (lane == 0) warp_states[warp] = softmax;
    __syncthreads();
    SoftmaxState merged;
    float weights[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) merged.raise(warp_states[w].max);
#pragma unroll
    for (int w = 0; w < WARPS; w++) weights[w] = merged.add(warp_states[w]);
    for (int e = threadIdx.x; e < head_dim; e += THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += weights[w] * warp_o[w][e];
        out[q_row + e] = from_float<T>(sum * merged.inverse_sum());
    }
}

// ---- tensor cores: sequences with two or more new tokens -------------------------------------------------------

// Calls f(row, column) for each 16-byte piece of a tile of ROWS rows of D elements, shared out among THREADS
// neighbouring threads such that a thread's pieces lie in one column and a fixed number of rows apart: its
// addresses then differ by constants.
template <int ROWS, int D, int THREADS, typename F>
__device__ inline void for_each_piece(int thread, F f) {
    constexpr int PIECES = D / 8;           // of a row
    constexpr int STEP = THREADS / PIECES;  // rows at a time
    const int first = thread / PIECES, column = thread % PIECES * 8;
#pragma unroll
    for (int row = 0; row < ROWS; row += STEP) {
        const bool mine = (THREADS % PIECES == 0 || first < STEP) && (ROWS % STEP == 0 || row + first < ROWS);
        if (mine) f(row + first, column);
    }
}

template <typename T, int D, int M_TILES, int BLOCK_N>
__global__ void __launch_bounds__(THREADS, 2)
    flash_attention(T* __restrict__ out, const T* __restrict__ q, const T* __restrict__ k_cache,
                    const T* __restrict__ v_cache, const int* __restrict__ cu_seqlens_q,
                    const int* __restrict__ seq_lens, const int* __restrict__ block_tables, int num_sequences,
                    int max_blocks, int block_size, int num_kv_heads, int group_size, float scale, int window) {
    constexpr int WARP_M = 16 * M_TILES;  // rows of a warp
    constexpr int BLOCK_M = WARPS * WARP_M;
    constexpr int ROW = D + 8;  // a padded row in shared memory: 8 rows in a column start in 8 different bank groups
    static_assert(D % 16 == 0 && BLOCK_N % 16 == 0 && BLOCK_N <= THREADS);

    extern __shared__ __align__(16) uint8_t shared[];
    T* q_tile = reinterpret_cast<T*>(shared);                        // [BLOCK_M][ROW]; the output in the end
    const uint32_t k_tile = shared_address(q_tile + BLOCK_M * ROW);  // [BLOCK_N][ROW]
    const uint32_t v_tile = k_tile + BLOCK_N * ROW * sizeof(T);      // [BLOCK_N][ROW]
    // Cache slots of the keys of even and of odd tiles: [2][BLOCK_N]
    int* key_slots = reinterpret_cast<int*>(q_tile + (BLOCK_M + 2 * BLOCK_N) * ROW);

    griddepcontrol_wait();
    griddepcontrol_launch_dependents();

    // ---- which queries ----
    const int head = blockIdx.x % num_kv_heads;
    const auto num_tiles = [&](int i) {
        const int q_len = cu_seqlens_q[i + 1] - cu_seqlens_q[i];
        return q_len > 1 ? div_ceil(q_len * group_size, BLOCK_M) : 0;
    };
    const int wanted = blockIdx.x / num_kv_heads;
    const RaggedPlace place = find_ragged<THREADS>(num_sequences, num_tiles, [&](int) { return wanted; });
    if (wanted >= place.total) return;

    const int q_start = cu_seqlens_q[place.sequence];
    const int q_len = cu_seqlens_q[place.sequence + 1] - q_start;
    const int first_row = (num_tiles(place.sequence) - 1 - place.item) * BLOCK_M;  // the longest tile first
    const int last_row = min(first_row + BLOCK_M, q_len * group_size) - 1;

    // ---- which keys: from the oldest that the first row sees to the newest that the last row sees ----
    const int context = seq_lens[place.sequence] - q_len;  // keys before the sequence's first new token
    const int kv_begin = max(0, context + first_row / group_size - window + 1);
    const int num_keys = context + last_row / group_size + 1 - kv_begin;
    // The newest key that a row of this tile sees, counted from kv_begin.
    const int first_newest = context + first_row / group_size - kv_begin, first_member = first_row % group_size;
    const auto newest_key = [&](int r) { return first_newest + (first_member + r) / group_size; };

    const int first_block = place.sequence * max_blocks;  // of the sequence, in block_tables
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const int group = lane / 4, pair = lane % 4 * 2;

    // The row of q and of out that row `r` of this tile is.
    const auto token_row = [&](int r) {
        const int token = (first_row + r) / group_size, member = (first_row + r) % group_size;
        return ((q_start + token) * num_kv_heads + head) * group_size + member;
    };

    // ---- loading ----
    const auto find_slot = [&](int kv_tile) {  // the cache slot of this thread's key in a tile; -1 beyond the keys
        const int i = kv_tile * BLOCK_N + static_cast<int>(threadIdx.x), key = kv_begin + i;
        const bool valid = threadIdx.x < BLOCK_N && i < num_keys;
        return valid ? block_tables[first_block + key / block_size] * block_size + key % block_size : -1;
    };
    const auto store_slot = [&](int kv_tile, int slot) {
        if (threadIdx.x < BLOCK_N) key_slots[kv_tile % 2 * BLOCK_N + threadIdx.x] = slot;
    };
    const auto load = [&](const T* cache, int kv_tile, uint32_t tile) {
        const int* slots = key_slots + kv_tile % 2 * BLOCK_N;
        for_each_piece<BLOCK_N, D, THREADS>(threadIdx.x, [&](int row, int column) {
            const int slot = slots[row];
            const int64_t offset = (static_cast<int64_t>(slot) * num_kv_heads + head) * D + column;
            cp_async_16(tile + (row * ROW + column) * sizeof(T), cache + offset, slot >= 0);
        });
        cp_async_commit();
    };

    store_slot(0, find_slot(0));
    for_each_piece<BLOCK_M, D, THREADS>(threadIdx.x, [&](int row, int column) {
        const bool valid = first_row + row <= last_row;
        const int64_t offset = static_cast<int64_t>(token_row(valid ? row : 0)) * D + column;
        cp_async_16(shared_address(q_tile + row * ROW + column), q + offset, valid);
    });
    __syncthreads();  // key_slots
    load(k_cache, 0, k_tile);

    // ---- the loop over keys ----
    const float scale_log2 = scale * LOG2_E;
    float o[M_TILES][D / 8][4] = {};
    SoftmaxState softmax[M_TILES][2];

    // Where this lane's row of an ldmatrix lies, for operands stored [row][k] (A), [column][k] (B) and [k][column].
    const uint32_t a_lane = ((lane % 16) * ROW + lane / 16 * 8) * sizeof(T);
    const uint32_t b_lane = ((lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 8) * sizeof(T);
    const uint32_t q_address = shared_address(q_tile + warp * WARP_M * ROW) + a_lane;
    const uint32_t k_address = k_tile + b_lane, v_address = v_tile + a_lane;

    for (int kv_tile = 0; kv_tile * BLOCK_N < num_keys; kv_tile++) {
        cp_async_wait<0>();
        __syncthreads();  // the keys are there, and everyone is done with the values before
        load(v_cache, kv_tile, v_tile);
        const int slot_ahead = find_slot(kv_tile + 1);  // arrives during the product

        // S = Q K^T
        float s[M_TILES][BLOCK_N / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[M_TILES][4];
#pragma unroll
            for (int m = 0; m < M_TILES; m++) ldmatrix_x4(a[m], q_address + (m * 16 * ROW + k * 16) * sizeof(T));
#pragma unroll
            for (int n = 0; n < BLOCK_N / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4(b, k_address + (n * 16 * ROW + k * 16) * sizeof(T));
#pragma unroll
                for (int m = 0; m < M_TILES; m++) {
                    mma<T>(s[m][2 * n], a[m], b[0], b[1]);
                    mma<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

        // Only tiles at the diagonal and at the window's edge have hidden keys.
        const int first_key = kv_tile * BLOCK_N;
        if (first_key + BLOCK_N > first_newest + 1 || first_key < num_keys - window) {
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                const int r = warp * WARP_M + m * 16 + group, from = first_key + pair;
                const int newest[2] = {newest_key(r) - from, newest_key(r + 8) - from};
                hide_keys(s[m], newest, window);
            }
        }
        uint32_t p[M_TILES][BLOCK_N / 16][4];
#pragma unroll
        for (int m = 0; m < M_TILES; m++) {
            float factor[2];
            raise(softmax[m], factor, s[m], scale_log2);
            scale_rows(o[m], factor);
            weigh(s[m], softmax[m], scale_log2);
            round_weights<T>(p[m], s[m]);
        }
        store_slot(kv_tile + 1, slot_ahead);

        cp_async_wait<0>();
        __syncthreads();  // the values are there, and everyone is done with the keys
        if (first_key + BLOCK_N < num_keys) load(k_cache, kv_tile + 1, k_tile);

        // O += P V
#pragma unroll
        for (int k = 0; k < BLOCK_N / 16; k++) {
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, v_address + (k * 16 * ROW + n * 16) * sizeof(T));
#pragma unroll
                for (int m = 0; m < M_TILES; m++) {
                    mma<T>(o[m][2 * n], p[m][k], b[0], b[1]);
                    mma<T>(o[m][2 * n + 1], p[m][k], b[2], b[3]);
                }
            }
        }
    }

    // ---- the result: through shared memory, each warp in its own rows of Q, to store 16 bytes at a time ----
    T* o_tile = q_tile + warp * WARP_M * ROW;
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            softmax[m][half].sum = warp_reduce_sum<4>(softmax[m][half].sum);
            const float inverse = softmax[m][half].inverse_sum();
            T* o_row = o_tile + (m * 16 + half * 8 + group) * ROW + pair;
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *reinterpret_cast<uint32_t*>(o_row + n * 8) =
                    pack<T>(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
            }
        }
    }
    __syncwarp();
    for_each_piece<WARP_M, D, WARP_SIZE>(lane, [&](int row, int column) {
        if (first_row + warp * WARP_M + row <= last_row) {
            T* to = out + static_cast<int64_t>(token_row(warp * WARP_M + row)) * D + column;
            Vec<T>::load(o_tile + row * ROW + column).store(to);
        }
    });
}
