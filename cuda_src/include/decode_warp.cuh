// What a warp of the decode kernels does with a tile of 16 keys and 8 N_TILES query heads of one KV head: S^T = K Q^T,
// softmax over the keys, O^T += V^T P^T. Keys and values, of which there are many, are the A of an mma; heads, of which
// there are few, its B. How tiles come to shared memory, and the first product, is each kernel's own affair.
//
// Of each fragment, a lane has rows group and group + 8 and columns pair and pair + 1 (mma.cuh): group = lane / 4,
// pair = lane % 4 * 2.
#pragma once

#include "softmax_state.cuh"

// A result under way.
template <int D, int N_TILES>
struct DecodeResult {
    float o[D / 16][N_TILES][4] = {};  // O^T: rows d, columns heads
    SoftmaxState softmax[N_TILES][2];  // of this lane's two heads; `sum` only over its keys, until `sum_up`

    // Raises a head's maximum to what all lanes with this head agree on.
    __device__ void raise(int n, int column, float score) {
        const float factor = softmax[n][column].raise(score);
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
            o[m][n][column] *= factor;
            o[m][n][column + 2] *= factor;
        }
    }

    // From scores S^T, in two parts to be added, to weights P^T, rounded to T, as B fragments.
    // is_visible(row): whether the tile's row-th key counts.
    template <typename T, typename IsVisible>
    __device__ void weigh(uint32_t (&p)[N_TILES][2], float (&s)[N_TILES][2][4], int lane, float scale_log2,
                          IsVisible is_visible) {
        const int group = lane / 4;
        bool risen = false;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[n][0][e] = is_visible(group + e / 2 * 8) ? (s[n][0][e] + s[n][1][e]) * scale_log2 : -INF;
                risen |= s[n][0][e] > softmax[n][e % 2].max;
            }
        }
        // The maximum over the keys is a trip around the warp, made only when it has risen for some lane.
        if (__any_sync(FULL_MASK, risen)) {
#pragma unroll
            for (int n = 0; n < N_TILES; n++) {
#pragma unroll
                for (int column = 0; column < 2; column++) {
                    float top = fmaxf(s[n][0][column], s[n][0][column + 2]);
#pragma unroll
                    for (int offset = 4; offset < WARP_SIZE; offset *= 2) {
                        top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, offset));
                    }
                    raise(n, column, top);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float first = softmax[n][0].add(s[n][0][2 * half]);
                const float second = softmax[n][1].add(s[n][0][2 * half + 1]);
                p[n][half] = movmatrix_trans(pack<T>(first, second));
            }
        }
    }

    // O^T += V^T P^T. address(m): of this lane's row of an ldmatrix, transposed, of the values' columns 16 m and on.
    template <typename T, typename Address>
    __device__ void add_values(const uint32_t (&p)[N_TILES][2], Address address) {
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
            uint32_t a[4];
            ldmatrix_x4_trans(a, address(m));
#pragma unroll
            for (int n = 0; n < N_TILES; n++) mma<T>(o[m][n], a, p[n][0], p[n][1]);
        }
    }

    // Makes each `sum` that of all keys. Called once, by all lanes.
    __device__ void sum_up() {
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
#pragma unroll
                for (int offset = 4; offset < WARP_SIZE; offset *= 2) {
                    softmax[n][column].sum += __shfl_xor_sync(FULL_MASK, softmax[n][column].sum, offset);
                }
            }
        }
    }

    // Writes it to shared memory: states [8 N_TILES], and rows of O, `row` floats apart. After `sum_up`.
    __device__ void store(SoftmaxState* states, float* rows, int row, int lane) const {
        const int group = lane / 4, pair = lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
                const int member = n * 8 + pair + column;
                if (group == 0) states[member] = softmax[n][column];
#pragma unroll
                for (int m = 0; m < D / 16; m++) {
                    rows[member * row + m * 16 + group] = o[m][n][column];
                    rows[member * row + m * 16 + group + 8] = o[m][n][column + 2];
                }
            }
        }
    }
};
