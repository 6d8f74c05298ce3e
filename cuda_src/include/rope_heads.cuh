// Query, key and value heads of one new token, made by a warp at a time from the QKV projection's row: RMSNorm of q and
// k (Qwen3, optional) and rotary embedding, with the roundings of rope.cu. For attention kernels, which then need no
// other kernel between the projection and themselves.
//
// A lane has elements 2 lane and 2 lane + 1 of each half of a head; lanes from D / 4 on have none.
#pragma once

#include "mma.cuh"

// What a lane needs of the norms' weights, q_norm and k_norm [D] or null, and of a token's position.
template <typename T, int D>
struct RopeLane {
    static_assert(D % 8 == 0 && D / 4 <= WARP_SIZE);
    uint32_t q_weights[2] = {}, k_weights[2] = {};  // by half
    float2 cos = {}, sin = {};
    int lane;
    bool active, has_norm;

    __device__ RopeLane(const T* q_norm, const T* k_norm)
        : lane(threadIdx.x % WARP_SIZE), active(lane < D / 4), has_norm(q_norm != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (!active || !has_norm) continue;
            const int i = half * (D / 2) + 2 * lane;
            q_weights[half] = __ldg(reinterpret_cast<const uint32_t*>(q_norm + i));
            k_weights[half] = __ldg(reinterpret_cast<const uint32_t*>(k_norm + i));
        }
    }

    // rope_table [positions, D]: D / 2 cosines, D / 2 sines.
    __device__ void load_position(const float* rope_table, int position) {
        if (!active) return;
        const float* cosines = rope_table + static_cast<int64_t>(position) * D + 2 * lane;
        cos = __ldg(reinterpret_cast<const float2*>(cosines));
        sin = __ldg(reinterpret_cast<const float2*>(cosines + D / 2));
    }

    // Norm and rotation of a head of q or k, both halves of it; called by all lanes of the warp.
    __device__ void apply(uint32_t (&x)[2], bool is_q, float eps) const {
        float2 first = unpack<T>(x[0]), second = unpack<T>(x[1]);
        if (has_norm) {
            const float squares = first.x * first.x + second.x * second.x + first.y * first.y + second.y * second.y;
            const float factor = fast_rsqrt(warp_reduce_sum(squares) / D + eps);
            const float2 w0 = unpack<T>(is_q ? q_weights[0] : k_weights[0]);
            const float2 w1 = unpack<T>(is_q ? q_weights[1] : k_weights[1]);
            first = unpack<T>(pack<T>(first.x * factor * w0.x, first.y * factor * w0.y));
            second = unpack<T>(pack<T>(second.x * factor * w1.x, second.y * factor * w1.y));
        }
        x[0] = pack<T>(first.x * cos.x - second.x * sin.x, first.y * cos.y - second.y * sin.y);
        x[1] = pack<T>(second.x * cos.x + first.x * sin.x, second.y * cos.y + first.y * sin.y);
    }
};

// Makes some of these: the `members` query heads from first_head on, then, where with_kv, the key and the value of
// kv_head. Of them, numbered from 0, a warp makes `task`, task + STRIDE and so on, COUNT at most: q to q_shared
// [members][ROW], k and v to new_kv [2][D] and, unless slot is -1, to the cache's row `slot`. token: the row of the
// projection, [num_q_heads + 2 num_kv_heads][D].
template <typename T, int D, int COUNT, int STRIDE, int ROW>
__device__ inline void make_heads(const RopeLane<T, D>& rope, const T* token, int first_head, int members,
                                  bool with_kv, int kv_head, int num_q_heads, int num_kv_heads, float eps, T* q_shared,
                                  T* new_kv, T* k_cache, T* v_cache, int64_t slot, int task) {
    const int lane = rope.lane;
    const int num_tasks = with_kv ? members + 2 : members;
    uint32_t heads[COUNT][2] = {};
#pragma unroll
    for (int n = 0; n < COUNT; n++) {  // all loads first: they wait for memory together
        const int i = task + n * STRIDE;
        const int head = i < members ? first_head + i : num_q_heads + (i - members) * num_kv_heads + kv_head;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (i >= num_tasks || !rope.active) continue;
            heads[n][half] = *reinterpret_cast<const uint32_t*>(token + head * D + half * (D / 2) + 2 * lane);
        }
    }
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
        const int i = task + n * STRIDE;
        if (i >= num_tasks) break;  // the same for the whole warp
        const bool is_q = i < members, is_v = i > members;
        if (!is_v) rope.apply(heads[n], is_q, eps);
        if (!rope.active) continue;
        T* target = is_q ? q_shared + i * ROW : new_kv + is_v * D;
        T* cached = (is_v ? v_cache : k_cache) + (slot * num_kv_heads + kv_head) * D;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int element = half * (D / 2) + 2 * lane;
            *reinterpret_cast<uint32_t*>(target + element) = heads[n][half];
            if (!is_q && slot >= 0) *reinterpret_cast<uint32_t*>(cached + element) = heads[n][half];
        }
    }
}
