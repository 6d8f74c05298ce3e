// What stands between the QKV projection and attention, in one pass: split, per-head RMSNorm of q and k (Qwen3),
// rotary embedding (Su et al., 2021) and the write of k and v into the paged cache.
//
//   rotation, first and second half of a head turning together (GPT-NeoX, HF checkpoints), i < D / 2:
//     out[i]         = x[i] * cos[i]         - x[i + D / 2] * sin[i]
//     out[i + D / 2] = x[i + D / 2] * cos[i] + x[i] * sin[i]
//
// Shapes: qkv [tokens, (Hq + 2 Hkv) D]; rope_table [positions, D] float, D / 2 cosines then D / 2 sines; q_norm and
// k_norm [D] or null; q_out [tokens, Hq, D]; k_cache, v_cache [blocks * block_size, Hkv, D], row slot_mapping[token]
// (-1: padding, nothing is written).
// One block a token. LANES neighbouring threads make one head at a time: a thread holds the same vectors of SIZE
// elements from the first and the second half, so that rotation needs no exchange. Cosines, sines and norm weights
// stay in its registers from head to head.
// Bytes: reads qkv once and writes as much; a table row a token.
//
// Measured (H200, bf16, launches of one graph; activations of few rows in L2, of many in memory), D = 128, with norms:
//   tokens                       1        64       256       1024   16384
//   16 query and 8 KV heads   1.80 us          -  3.19 us   7.60 us  81.9 us, 3.3 TB/s
//   32 query and 8 KV heads   1.96 us    2.61 us  3.70 us   10.4 us   118 us, 3.4 TB/s
// What lost: all heads at once with many tokens (16384, 32 heads: 177 us; blocks of 64 threads it is), a few at once
// with few (one token, 32 heads: 4.32 us with 64 threads); loading one head ahead (16384: 132 us, since registers
// rise from 74 to 103; one token: 1.90 us); no pdl (one token, 32 heads: 2.23 us).
#include "common.cuh"

// The widest vector, in elements, of which `n` is a multiple.
constexpr int vector_size(int n, int widest) {
    while (n % widest != 0) widest /= 2;
    return widest;
}

constexpr int power_of_two_from(int n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}

template <typename T, int D>
__global__ void __launch_bounds__(512) rope_store_kv(
    const T* qkv, const int32_t* positions, const float* __restrict__ rope_table, const T* __restrict__ q_norm,
    const T* __restrict__ k_norm, T* q_out, T* k_cache, T* v_cache, const int32_t* slot_mapping, int num_q_heads,
    int num_kv_heads, float eps) {
    constexpr int HALF = D / 2;
    constexpr int SIZE = vector_size(HALF, 16 / sizeof(T));
    constexpr int VECTORS = HALF / SIZE;  // in half a head
    constexpr int LANES = VECTORS < WARP_SIZE ? power_of_two_from(VECTORS) : WARP_SIZE;
    constexpr int STEPS = div_ceil(VECTORS, LANES);
    using V = Vec<T, SIZE>;
    using F = Vec<float, SIZE < 4 ? SIZE : 4>;

    const int lane = threadIdx.x % LANES;
    const int token = blockIdx.x;
    V q_weight[2][STEPS], k_weight[2][STEPS];  // [half][step]
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int i = (s * LANES + lane) * SIZE;
        if (i >= HALF) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (q_norm) q_weight[half][s] = V::load_readonly(q_norm + half * HALF + i);
            if (k_norm) k_weight[half][s] = V::load_readonly(k_norm + half * HALF + i);
        }
    }
    griddepcontrol_launch_dependents();
    griddepcontrol_wait();

    const int64_t slot = slot_mapping[token];
    const float* cosines = rope_table + int64_t(positions[token]) * D;
    float cos[STEPS][SIZE], sin[STEPS][SIZE];
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
        const int i = (s * LANES + lane) * SIZE;
        if (i >= HALF) break;
#pragma unroll
        for (int j = 0; j < SIZE; j += F::SIZE) {
            const F c = F::load_readonly(cosines + i + j), n = F::load_readonly(cosines + HALF + i + j);
#pragma unroll
            for (int k = 0; k < F::SIZE; ++k) cos[s][j + k] = c[k], sin[s][j + k] = n[k];
        }
    }

    const int num_heads = num_q_heads + 2 * num_kv_heads;
    const int heads_at_once = blockDim.x / LANES;
    for (int first = 0; first < num_heads; first += heads_at_once) {  // the same count in all lanes: they shuffle
        const int head = first + threadIdx.x / LANES;
        const int kv_head = head < num_q_heads + num_kv_heads ? head - num_q_heads : head - num_q_heads - num_kv_heads;
        const bool is_q = head < num_q_heads;
        const bool is_v = head >= num_q_heads + num_kv_heads;
        const bool active = head < num_heads && (is_q || slot >= 0);

        const T* source = qkv + (int64_t(token) * num_heads + head) * D;
        V x[2][STEPS];
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int i = (s * LANES + lane) * SIZE;
            if (!active || i >= HALF) break;
            x[0][s] = V::load(source + i);
            x[1][s] = V::load(source + HALF + i);
#pragma unroll
            for (int j = 0; j < SIZE; ++j)
                sum += to_float(x[0][s][j]) * to_float(x[0][s][j]) + to_float(x[1][s][j]) * to_float(x[1][s][j]);
        }
        const float scale = fast_rsqrt(warp_reduce_sum<LANES>(sum) / D + eps);
        if (!active) continue;

        T* target = is_q   ? q_out + (int64_t(token) * num_q_heads + head) * D
                    : is_v ? v_cache + (slot * num_kv_heads + kv_head) * D
                           : k_cache + (slot * num_kv_heads + kv_head) * D;
        const bool normed = is_q ? q_norm != nullptr : !is_v && k_norm != nullptr;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int i = (s * LANES + lane) * SIZE;
            if (i >= HALF) break;
            if (normed) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const V w = is_q ? q_weight[half][s] : k_weight[half][s];
#pragma unroll
                    for (int j = 0; j < SIZE; ++j)
                        x[half][s][j] = from_float<T>(to_float(x[half][s][j]) * scale * to_float(w[j]));
                }
            }
            if (!is_v) {
#pragma unroll
                for (int j = 0; j < SIZE; ++j) {
                    const float a = to_float(x[0][s][j]), b = to_float(x[1][s][j]);
                    x[0][s][j] = from_float<T>(a * cos[s][j] - b * sin[s][j]);
                    x[1][s][j] = from_float<T>(b * cos[s][j] + a * sin[s][j]);
                }
            }
            x[0][s].store(target + i);
            x[1][s].store(target + HALF + i);
        }
    }
}
