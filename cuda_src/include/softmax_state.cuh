// Online softmax: what a thread must remember of the scores it has seen, and how two such memories merge.
//
// softmax(s) v = sum_j 2^(s_j - m) v_j / sum_j 2^(s_j - m), for any m; with m near the largest score nothing
// overflows (Milakov & Gimelshein, 2018). Scores are in units of log2: multiplied by log2(e), so that the
// exponential is the hardware's 2^x. Sums stay unnormalised until the very end, so partial results over
// disjoint keys merge by rescaling both to the larger m (flash-decoding; Dao et al., 2023).
#pragma once

#include "mma.cuh"

constexpr float LOG2_E = 1.44269504f;

// The maximum before the first key. Finite, while hidden keys have score -INF: so a difference of scores is never
// INF - INF, a hidden key weighs 2^-INF = 0, and what a row without any visible key has summed up is 0.
constexpr float LOWEST = -1e30f;

// 2^x in one instruction; results below 2^-126 are flushed to zero.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct alignas(8) SoftmaxState {
    float max = LOWEST;  // m, in units of log2
    float sum = 0.0f;    // sum_j 2^(s_j - m)

    // Raises m to at least `score`; returns the factor for everything accumulated so far.
    __device__ float raise(float score) {
        const float raised = fmaxf(max, score);
        const float factor = exp2_approx(max - raised);
        max = raised;
        sum *= factor;
        return factor;
    }

    // The weight of one more key, which must not exceed m.
    __device__ float add(float score) {
        const float weight = exp2_approx(score - max);
        sum += weight;
        return weight;
    }

    // Counts what was summed up over other keys, whose m must not exceed this one; returns its weight.
    __device__ float add(const SoftmaxState& other) {
        const float weight = exp2_approx(other.max - max);
        sum += weight * other.sum;
        return weight;
    }

    // 1 / sum, the last step of every average; 0 where there was no key.
    __device__ float inverse_sum() const { return sum > 0.0f ? 1.0f / sum : 0.0f; }
};

// Four columns of a result under way: sum_j 2^(s_j - m) v_j.
struct PartialResult {
    SoftmaxState softmax;
    float4 o = {};

    __device__ void raise(float score) {
        const float factor = softmax.raise(score);
        o = make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
    }

    // Adds a result over other keys, whose maximum must not exceed this one's.
    __device__ void add(const SoftmaxState& other, const float4& other_o) {
        const float weight = softmax.add(other);
        o.x += weight * other_o.x, o.y += weight * other_o.y, o.z += weight * other_o.z, o.w += weight * other_o.w;
    }
};

// ---- a tile of scores as C fragments (mma.cuh): rows group and group + 8, keys 8 n + pair and 8 n + pair + 1 -------

// Hides the keys after the query and those before its window. newest: the newest key that each of the two rows
// sees, less `pair` and the tile's first key.
template <int N>
__device__ inline void hide_keys(float (&s)[N][4], const int (&newest)[2], int window) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const unsigned distance = newest[e / 2] - (n * 8 + e % 2);  // negative is beyond any window
            if (distance >= static_cast<unsigned>(window)) s[n][e] = -INF;
        }
    }
}

// Raises the maxima of the two rows; factor: for what they have accumulated before. The four lanes that share a row
// agree on its maximum, but each counts its own keys: `sum` is added up over them in the end.
template <int N>
__device__ inline void raise(SoftmaxState (&softmax)[2], float (&factor)[2], const float (&s)[N][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -INF;
#pragma unroll
        for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        factor[half] = softmax[half].raise(warp_reduce_max<4>(top) * scale_log2);
    }
}

// Scores become weights, in place.
template <int N>
__device__ inline void weigh(float (&s)[N][4], SoftmaxState (&softmax)[2], float scale_log2) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[n][e] = exp2_approx(fmaf(s[n][e], scale_log2, -softmax[e / 2].max));
            softmax[e / 2].sum += s[n][e];
        }
    }
}

// Whether scale_rows has anything to do for any lane of the warp: hardly ever once each row's largest score is met.
__device__ inline bool any_change(const float (&factor)[2]) {
    return __any_sync(FULL_MASK, factor[0] != 1.0f || factor[1] != 1.0f);
}

template <int N>
__device__ inline void scale_rows(float (&o)[N][4], const float (&factor)[2]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] *= factor[e / 2];
    }
}

// Weights rounded to T, as A fragments of 16 keys each.
template <typename T, int N>
__device__ inline void round_weights(uint32_t (&p)[N / 2][4], const float (&s)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        p[n / 2][n % 2 * 2] = pack<T>(s[n][0], s[n][1]);
        p[n / 2][n % 2 * 2 + 1] = pack<T>(s[n][2], s[n][3]);
    }
}
