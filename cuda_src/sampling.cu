// Sampling and log probabilities, as NumpyOps defines them: rules, temperature, min_p, top_k, top_p, the draw.
//
//   apply_rules        logits <- allowed ids, bias, penalties, in place            one block a row
//   sample             argmax of logits, or of logits / T - log(noise)             `splits` blocks a row
//   filter_and_sample  the same among what min_p, top_k and top_p keep             a cluster of 8 blocks, or one, a row
//   logprobs           log softmax, rank and top tokens                            likewise
//
// logits [rows, vocab_size] float; everything else is a column [rows] or CSR. What is drawn does not depend on how many
// blocks share a row: scores, thresholds and counts are maxima and sums of integers, in whatever order they come. No
// pointer is __restrict__: the kernels may start before the one in front has ended (pdl), and what that one writes
// must not come through the read-only cache.
//
// Bytes: a row is read once (sample; a cluster), or 2 to 5 times by a block of its own. At 4.4 TB/s that is 35 us for
// 256 rows of 151936. Nothing is sorted: thresholds are found by search, and only if a row asks for them.
//
// H200, vocab_size 151936, logits N(0, 1), replayed from a graph, cold L2, us:
//
//   rows                     1     8    16    32    64   128   256
//   greedy                 3.1   4.4   6.0   8.3  12.6  22.1  40.0
//   temperature            4.4   8.3  10.8  15.4  24.7  41.6  75.4
//   top_k 50              12.9  13.5  18.0  28.8  45.2  78.7  89.7     the last column with one block a row:
//   top_k 1000            22.7  23.7  31.2  50.1  79.2   139   251     it loses up to 64 rows (51 us for top_k 50,
//   top_p 0.9             27.6  31.4  41.0  60.3  97.6   173   300     180 for top_p) and wins from 256 on (a cluster
//   logprobs, 20 on top   13.4  14.1  20.0  30.8  48.4  82.5   133     takes 150 and 322)
//
// Tried:
//   - all four tokens of a group scored when one might win, bounds for each warp alone: temperature 12.1 us for 8 rows
//   - top_k always by histograms, no short list: top_k 50 took 23.0 us for 1 row, 209 for 256
//   - mass as 40-bit integers in two words with a carry: top_p took 38.6 us for 1 row, 471 for 256 in clusters
//   - blocks of 1024 threads in the cluster: top_k 50 took 28.1 us for 16 rows; one block of 256: 123 for 256 rows
//   - 8 blocks of `sample` a multiprocessor instead of 4: 10.9 us for 8 rows, 77.6 for 256
#include "cluster.cuh"  // no clusters before Hopper: there the launcher takes the instances with CLUSTER = 1
#include "philox.cuh"

// ---- floats and candidates as integers ------------------------------------------------------------------------

// Unsigned integers in the order of the floats: -inf < ... < -0 = +0 < ... < inf < NaN, with all NaN equal, because
// adding zero turns -0 into +0 and any NaN into the canonical one.
__device__ inline uint32_t float_to_key(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float key_to_float(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A token and its score as one integer: larger is better, and of equal scores the lower id. NaN is the best score, as
// in NumPy's argmax, so that a row of NaN still gives a token of the vocabulary.
__device__ inline uint64_t candidate(float score, int token) {
    return static_cast<uint64_t>(float_to_key(score)) << 32 | ~static_cast<uint32_t>(token);
}

__device__ inline int token_of(uint64_t candidate) { return static_cast<int>(~static_cast<uint32_t>(candidate)); }

// What a row starts from: the answer if all its tokens are forbidden.
__device__ inline uint64_t no_candidate() { return candidate(-INF, 0); }

// ---- reductions over a block and over the cluster of blocks that share a row ------------------------------------

struct Max {
    template <typename T>
    __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Sum {
    template <typename T>
    __device__ T operator()(T a, T b) const { return a + b; }
};

template <int THREADS, typename T, typename Combine>
__device__ inline T block_reduce(T x, Combine combine) {
    constexpr int WARPS = THREADS / WARP_SIZE;
    __shared__ T partial[WARPS];
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(FULL_MASK, x, offset));
    __syncthreads();  // a slow warp may still read `partial` of an earlier call
    if (threadIdx.x % WARP_SIZE == 0) partial[threadIdx.x / WARP_SIZE] = x;
    __syncthreads();
    x = partial[threadIdx.x % WARPS];
#pragma unroll
    for (int offset = WARPS / 2; offset > 0; offset /= 2) x = combine(x, __shfl_xor_sync(FULL_MASK, x, offset));
    return x;
}

// The sum over all threads with a lower index.
template <int THREADS>
__device__ inline uint64_t block_exclusive_sum(uint64_t x, uint64_t& total) {
    constexpr int WARPS = THREADS / WARP_SIZE;
    __shared__ uint64_t partial[WARPS];
    const int lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    uint64_t inclusive = x;
#pragma unroll
    for (int offset = 1; offset < WARP_SIZE; offset *= 2) {
        const uint64_t left = __shfl_up_sync(FULL_MASK, inclusive, offset);
        if (lane >= offset) inclusive += left;
    }
    __syncthreads();
    if (lane == WARP_SIZE - 1) partial[warp] = inclusive;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp) before += partial[w];
        total += partial[w];
    }
    return before + inclusive - x;
}

template <int CLUSTER>
__device__ inline int cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return static_cast<int>(rank);
}

// A barrier of all threads of the cluster, which orders their accesses to each other's shared memory.
template <int CLUSTER>
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// The same variable in the shared memory of another block of the cluster.
template <int CLUSTER, typename T>
__device__ inline T* peer(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        uint64_t address;
        asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
        return reinterpret_cast<T*>(address);
    }
#endif
    return shared;
}

// Combines one value of each thread over the block, then over the cluster.
template <int CLUSTER, int THREADS, typename T, typename Combine>
__device__ inline T cluster_reduce(T x, Combine combine) {
    x = block_reduce<THREADS>(x, combine);
    if (CLUSTER == 1) return x;
    __shared__ T mine;
    cluster_sync<CLUSTER>();  // a slow block may still read `mine` of an earlier call
    if (threadIdx.x == 0) mine = x;
    cluster_sync<CLUSTER>();
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
        const T other = *peer<CLUSTER>(&mine, rank);
        x = rank == 0 ? other : combine(x, other);
    }
    return x;
}

// ---- what a block sees of a row ------------------------------------------------------------------------------------

// A group is four neighbouring tokens from a multiple of 4 on: what one load brings and one Philox counter serves. A
// run is the 32 groups of a warp. Runs are dealt out in turn to the `count` blocks that share a row, so that each gets
// about as many of the frequent tokens, which have low ids.
struct Part {
    const float* row;  // [vocab_size]
    int vocab_size, rank, count;

    __device__ int num_runs() const { return div_ceil(div_ceil(vocab_size, 4 * WARP_SIZE) - rank, count); }

    // This lane's group in one of the part's runs.
    __device__ int group(int run) const { return (run * count + rank) * WARP_SIZE + threadIdx.x % WARP_SIZE; }

    // The logits of a group; -inf beyond the vocabulary.
    __device__ float4 load(int group) const {
        const int token = 4 * group, left = vocab_size - token;
        if (vocab_size % 4 == 0 && left >= 4) return *reinterpret_cast<const float4*>(row + token);
        return make_float4(left > 0 ? row[token] : -INF, left > 1 ? row[token + 1] : -INF,
                           left > 2 ? row[token + 2] : -INF, left > 3 ? row[token + 3] : -INF);
    }
};

// The values of a part: in shared memory as they are (RESIDENT), or in global memory, and there to be divided by the
// temperature (DIVIDE) whenever they are read. UNROLL loads of a thread wait for memory together.
template <int THREADS, bool RESIDENT, bool DIVIDE, int UNROLL = 4>
struct Values {
    Part part;
    const float4* resident;  // [part.num_runs()][WARP_SIZE]
    float temperature;       // 1 without DIVIDE

    __device__ float scaled(float v) const { return DIVIDE ? __fdiv_rn(v, temperature) : v; }

    // Calls f(four values as they are stored, group, run) for all groups; the threads of a warp make the same calls.
    template <typename F>
    __device__ void for_each_group(F f) const {
        constexpr int WARPS = THREADS / WARP_SIZE;
        const int num_runs = part.num_runs();
        for (int first = threadIdx.x / WARP_SIZE; first < num_runs; first += UNROLL * WARPS) {
            float4 v[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int run = first + u * WARPS;
                if (run < num_runs) {
                    v[u] = RESIDENT ? resident[run * WARP_SIZE + threadIdx.x % WARP_SIZE] : part.load(part.group(run));
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int run = first + u * WARPS;
                if (run < num_runs) f(v[u], part.group(run), run);
            }
        }
    }

    // Calls f(scaled value, token) for all tokens of the part, and for some beyond the vocabulary with -inf.
    template <typename F>
    __device__ void for_each(F f) const {
        for_each_group([&](const float4& v, int group, int) {
            f(scaled(v.x), 4 * group);
            f(scaled(v.y), 4 * group + 1);
            f(scaled(v.z), 4 * group + 2);
            f(scaled(v.w), 4 * group + 3);
        });
    }
};

// ---- choosing a token ----------------------------------------------------------------------------------------------

template <typename Values>
__device__ inline uint64_t argmax(const Values& values) {
    float best = -INF;
    int best_token = 0;
    values.for_each([&](float x, int token) {
        if (!(x <= best) && best == best) {  // larger, or the first NaN
            best = x;
            best_token = token;
        }
    });
    return candidate(best, best_token);
}

struct Noise {
    uint2 seed;
    uint32_t position;

    __device__ uint4 words(int group) const {
        return philox4x32(make_uint4(static_cast<uint32_t>(group), position, 0, 0), seed);
    }
};

__device__ inline float race_score(float x, uint32_t word) { return x - logf(exponential_noise(word)); }

__device__ inline float exp2_approx(float x) {  // relative error 2^-22
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The exponential race: argmax of score = logit / temperature - log(noise). FILTERED: among scaled values >= threshold.
//
// A score takes a division and two logarithms, so hopeless tokens are passed over. `best_key` is the best score that
// the block has met. A token whose logit is too low even for the smallest noise needs no random number. Of the others,
// one with noise E >= u can only win if u < exp(logit / temperature - best): an approximation of the right side, made
// larger than its error and that of the scores, is compared with the leading 23 bits of u. The few that remain are
// scored exactly, so the result is the same whatever the order and the split. NaN passes each comparison.
template <bool FILTERED, typename Values>
__device__ inline uint64_t draw(const Values& values, const Noise& noise, float threshold) {
    constexpr float LOG2_E = 1.44269504f;
    constexpr float MAX_GUMBEL = 22.9f;  // -log of the smallest noise, -log1p(-2^-33), is 22.874
    __shared__ uint32_t best_key;
    if (threadIdx.x == 0) best_key = float_to_key(-INF);
    __syncthreads();

    uint64_t winner = no_candidate();
    const float scale = LOG2_E / values.temperature;
    const float cut = threshold * values.temperature;
    const float lowest = cut - fabsf(cut) * 1e-6f;  // what is below is below the threshold; scoring decides the rest
    uint32_t known_key = float_to_key(-INF);        // the best score that the bounds are for
    float hopeless = -INF;                          // logits up to this one cannot win
    float offset = INF;                             // exp2(logit * scale + offset) bounds the u of a winner
    values.for_each_group([&](const float4& v, int group, int) {
        float logit[4] = {v.x, v.y, v.z, v.w};
        bool hope = false;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (FILTERED && !(logit[j] >= lowest)) logit[j] = -INF;
            hope |= !(logit[j] <= hopeless);
        }
        if (!__any_sync(FULL_MASK, hope)) return;
        const uint4 words = noise.words(group);
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        const auto may_win = [&](int j) {
            const float one_plus_u = __uint_as_float(0x3f800000u | word[j] >> 9);  // rounded down
            return !(one_plus_u > 1.0f + exp2_approx(fmaf(logit[j], scale, offset)));
        };
        if (!__any_sync(FULL_MASK, may_win(0) || may_win(1) || may_win(2) || may_win(3))) return;
        uint32_t pending = 15;  // one bit a token: not scored yet
        while (true) {
            const uint32_t key = *static_cast<volatile uint32_t*>(&best_key);
            if (key != known_key) {
                known_key = key;
                const float best = key_to_float(key);
                const float slack = (fabsf(best) + 32.0f) * 2e-6f;  // ten times the rounding of scores that matter
                hopeless = (best - MAX_GUMBEL - slack) * values.temperature;
                offset = (slack - best) * LOG2_E;
            }
            const uint32_t contenders =
                pending & (may_win(0) | may_win(1) << 1 | may_win(2) << 2 | may_win(3) << 3);
            if (!__any_sync(FULL_MASK, contenders != 0)) break;
            if (contenders != 0) {
                const int j = __ffs(contenders) - 1;
                const float x = values.scaled(j == 0 ? logit[0] : j == 1 ? logit[1] : j == 2 ? logit[2] : logit[3]);
                const uint32_t random = j == 0 ? word[0] : j == 1 ? word[1] : j == 2 ? word[2] : word[3];
                if (!FILTERED || x >= threshold) {
                    winner = Max()(winner, candidate(race_score(x, random), 4 * group + j));
                }
                pending ^= 1u << j;
            }
            const uint32_t warp_key = __reduce_max_sync(FULL_MASK, static_cast<uint32_t>(winner >> 32));
            if (threadIdx.x % WARP_SIZE == 0) atomicMax(&best_key, warp_key);
            __syncwarp();
        }
    });
    return winner;
}

// ---- rules: what greedy decoding obeys too ------------------------------------------------------------------------

// allowed_token_ids, then bias, then penalties, in place: logits [rows, vocab_size], one block a row. A group that no
// row uses is null. The ids of a row are distinct within bias and within penalties, so its entries do not meet. Ids
// are checked when a request comes in; those outside the vocabulary would be ignored here, not written to.
//
// scratch: [number of allowed ids] float.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) apply_rules(
    float* logits, const int* allowed_offsets, const int* allowed_ids, float* scratch, const int* bias_offsets,
    const int* bias_ids, const float* bias_values, const int* penalty_offsets, const int* penalty_ids,
    const int* penalty_counts, const float* repetition_penalty, const float* presence_penalty,
    const float* frequency_penalty, int vocab_size) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int row = blockIdx.x;
    float* row_logits = logits + static_cast<int64_t>(row) * vocab_size;
    const auto for_each_entry = [&](const int* offsets, const int* ids, auto f) {
        for (int entry = offsets[row] + threadIdx.x; entry < offsets[row + 1]; entry += THREADS) {
            const int id = ids[entry];
            if (static_cast<uint32_t>(id) < static_cast<uint32_t>(vocab_size)) f(entry, row_logits[id]);
        }
    };

    if (allowed_offsets != nullptr && allowed_offsets[row] < allowed_offsets[row + 1]) {
        for_each_entry(allowed_offsets, allowed_ids, [&](int entry, float& logit) { scratch[entry] = logit; });
        __syncthreads();
        for (int i = threadIdx.x; i < vocab_size; i += THREADS) row_logits[i] = -INF;
        __syncthreads();
        for_each_entry(allowed_offsets, allowed_ids, [&](int entry, float& logit) { logit = scratch[entry]; });
        __syncthreads();
    }
    if (bias_offsets != nullptr) {
        for_each_entry(bias_offsets, bias_ids, [&](int entry, float& logit) { logit += bias_values[entry]; });
        __syncthreads();
    }
    if (penalty_offsets != nullptr) {
        const float repetition = repetition_penalty[row];
        const double presence = presence_penalty[row], frequency = frequency_penalty[row];
        for_each_entry(penalty_offsets, penalty_ids, [&](int entry, float& logit) {
            const int count = penalty_counts[entry];
            const float seen = logit > 0.0f ? __fdiv_rn(logit, repetition) : logit * repetition;
            // In double, as NumPy promotes a float times an int.
            logit = static_cast<float>(seen - (frequency * count + (count > 0 ? presence : 0.0)));
        });
    }
}

// ---- greedy and plain sampling ------------------------------------------------------------------------------------

__device__ inline Noise noise_of_row(const uint64_t* seeds, const int* positions, int row) {
    const uint64_t seed = seeds[row];
    return {make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
            static_cast<uint32_t>(positions[row])};
}

// token_ids [rows] from logits [rows, vocab_size]; `splits` blocks a row. Null temperatures: all rows are greedy.
//
// best [rows] and arrived [rows] are 0 before and after: a row's blocks take the maximum of their candidates (an
// integer, so the order does not matter), and the last to arrive writes the token and clears both.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) sample(
    const float* logits, const float* temperatures, const uint64_t* seeds, const int* positions, uint64_t* best,
    uint32_t* arrived, int* token_ids, int vocab_size, int splits) {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int row = blockIdx.x / splits;
    const Part part = {logits + static_cast<int64_t>(row) * vocab_size, vocab_size,
                       static_cast<int>(blockIdx.x) % splits, splits};
    const float temperature = temperatures == nullptr ? 0.0f : temperatures[row];

    uint64_t winner;
    if (temperature == 0.0f) {
        winner = argmax(Values<THREADS, false, false>{part, nullptr, 1.0f});
    } else {
        const Noise noise = noise_of_row(seeds, positions, row);
        winner = draw<false>(Values<THREADS, false, true, 2>{part, nullptr, temperature}, noise, -INF);
    }
    winner = block_reduce<THREADS>(winner, Max());
    if (threadIdx.x != 0) return;
    if (splits > 1) {
        atomicMax(best + row, winner);
        __threadfence();
        if (atomicInc(arrived + row, splits - 1) != splits - 1) return;  // the last increment wraps to 0
        __threadfence();
        winner = atomicExch(best + row, 0);
    }
    token_ids[row] = token_of(winner);
}

// ---- the largest values of a row ----------------------------------------------------------------------------------

constexpr int NUM_MAXIMA = 256;

struct Maxima {
    alignas(16) uint32_t all[NUM_MAXIMA];
    uint32_t mine[NUM_MAXIMA];
    uint32_t floor;
};

// From one key a thread: the largest of the row, and a floor with at least k values at or above it (0 if k is larger
// than NUM_MAXIMA). The threads of the row form NUM_MAXIMA sets, and the floor is the k-th largest of the sets' maxima.
// With values in random places there are 256 log(256 / (256 - k)) at or above it: 56 for k = 50.
template <int CLUSTER, int THREADS>
__device__ inline uint32_t find_maximum(Maxima& maxima, uint32_t key, int k, uint32_t& floor) {
    constexpr int SET = CLUSTER * THREADS / NUM_MAXIMA;  // threads
    constexpr int BLOCK_MAXIMA = THREADS / SET;
    static_assert(SET <= WARP_SIZE);
#pragma unroll
    for (int offset = SET / 2; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(FULL_MASK, key, offset));
    if (threadIdx.x % SET == 0) maxima.mine[threadIdx.x / SET] = key;
    if (threadIdx.x == 0) maxima.floor = 0;
    cluster_sync<CLUSTER>();
    const int i = threadIdx.x;
    if (i < NUM_MAXIMA) maxima.all[i] = peer<CLUSTER>(&maxima, i / BLOCK_MAXIMA)->mine[i % BLOCK_MAXIMA];
    __syncthreads();
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < NUM_MAXIMA; j += WARP_SIZE) largest = max(largest, maxima.all[j + threadIdx.x % WARP_SIZE]);
    if (0 < k && k <= NUM_MAXIMA) {
        if (i < NUM_MAXIMA) {
            const uint32_t own = maxima.all[i];
            int larger = 0, not_smaller = 0;
            for (int j = 0; j < NUM_MAXIMA; j += 4) {
                const uint4 other = *reinterpret_cast<const uint4*>(maxima.all + j);
                larger += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
                not_smaller += (other.x >= own) + (other.y >= own) + (other.z >= own) + (other.w >= own);
            }
            if (larger < k && k <= not_smaller) maxima.floor = own;  // equal ones write the same
        }
        __syncthreads();
    }
    floor = maxima.floor;
    return __reduce_max_sync(FULL_MASK, largest);
}

// The values of a row at or above a floor, if they are few: in the first block's shared memory, in any order.
template <int CAPACITY>
struct ShortList {
    int size;
    int tokens[CAPACITY];
    float values[CAPACITY];
    uint64_t masses[CAPACITY];

    __device__ void add(int token, float value) {
        const int slot = atomicAdd(&size, 1);
        if (slot < CAPACITY) {
            tokens[slot] = token;
            values[slot] = value;
        }
    }
};

// ---- thresholds by search -----------------------------------------------------------------------------------------

constexpr float MASS_ONE = 0x1p40f;

// Probability relative to the row's most likely token, as a fixed-point number: a sum of integers does not depend on
// its order. The last bit is 1e-12; a row of 2^20 tokens fits.
__device__ inline uint64_t mass(float distance) { return __float2ull_rn(expf(distance) * MASS_ONE); }

constexpr int NUM_BINS = 2048;

struct Bins {
    uint32_t count[NUM_BINS], excess[NUM_BINS];
};

// The bin in which a search goes on.
struct Boundary {
    uint64_t limit;   // where in the bin: in its units of weight
    uint64_t weight;  // of the bin
    uint32_t count;
    int bin;
};

// How a row's blocks work together; one object in shared memory for each block.
struct Search {
    Bins bins;
    uint64_t block_weight;
    Boundary boundary;
};

// A threshold that keeps exactly those values v >= floor of a row for which the weight of all larger ones is below a
// limit: their number below k = target (top_k), or their mass below p = target times the mass of all values >= floor.
//
// A histogram of the row finds the bin in which the weight from above reaches the limit, a histogram of that bin's
// values a smaller one, and so on until a bin is kept whole. The first histogram has bins of equal width 1 / scale, so
// that neither the many values of the middle nor the few at the top share few bins (each shared counter takes one
// addition at a time). scale is a power of two, made smaller where floats lie further apart: the bins' edges are then
// floats, and a bin is an interval of keys, which the later histograms divide by leading bits. Most searches end with
// the second histogram, all with the fourth.
//
// Mass is counted in integers, so that it does not depend on the order: a value x in the bin with lower edge e has the
// mass exp(e - row_max) * (1 + excess / UNIT), where exp(x - e) - 1 <= 1/64 is rounded to the nearest excess / UNIT.
// What is 32 below the maximum or more has none.
template <int CLUSTER, int THREADS, bool MASS, typename Values>
__device__ inline float find_threshold(
    Search& search, const Values& values, float floor, float row_max, float scale, float target) {
    constexpr int BLOCK_BINS = NUM_BINS / CLUSTER;                                // summed by one block
    constexpr int THREAD_BINS = BLOCK_BINS > THREADS ? BLOCK_BINS / THREADS : 1;  // and by one of its threads
    const bool has_bins = threadIdx.x * THREAD_BINS < BLOCK_BINS;
    const int first_bin = cluster_rank<CLUSTER>() * BLOCK_BINS + threadIdx.x * THREAD_BINS;
    const int end_bin = has_bins ? first_bin + THREAD_BINS : first_bin;

    constexpr float UNIT = 0x1p18f;
    constexpr float MAX_EXCESS = 4160.0f;  // (exp(1/64) - 1) UNIT, rounded up; a million of them fit in 32 bits
    constexpr float ROUND = 0x1.8p23f;     // adding it rounds to an integer
    const int exponent = static_cast<int>(__float_as_uint(row_max) >> 23 & 255) - 127;
    scale = fminf(scale, __uint_as_float(static_cast<uint32_t>(min(21 - exponent, 127) + 127) << 23));
    const auto integer_part = [&](float x) { return __fadd_rd(x, ROUND) - ROUND; };  // floor, for sizes below 2^22
    const float top = integer_part(row_max * scale);
    const float width = 1.0f / scale;
    const auto lower_edge = [&](int bin) { return (top - bin) * width; };  // exact
    const auto edge_mass = [&](int bin) { return static_cast<double>(expf(lower_edge(bin) - row_max) * 0x1p24f); };

    uint32_t low_key = float_to_key(floor), high_key = float_to_key(row_max);
    int shift = -1;  // -1: bins of equal width
    uint64_t limit = 0;
    while (true) {
        for (int i = threadIdx.x; i < NUM_BINS; i += THREADS) {
            search.bins.count[i] = 0;
            search.bins.excess[i] = 0;
        }
        __syncthreads();
        values.for_each([&](float x, int) {
            const uint32_t key = float_to_key(x);
            if (key < low_key || key > high_key) return;
            const float position = x * scale, cell = integer_part(position);
            const int bin = shift < 0 ? static_cast<int>(fminf(top - cell, NUM_BINS - 1)) : (high_key - key) >> shift;
            atomicAdd(&search.bins.count[bin], 1u);
            if (MASS) {
                const float y = (position - cell) * width;  // above the bin's edge, exactly
                const float excess = UNIT * y * fmaf(y, fmaf(y, 1.0f / 6, 0.5f), 1.0f);
                atomicAdd(&search.bins.excess[bin], __float2uint_rn(fminf(excess, MAX_EXCESS)));
            }
        });
        cluster_sync<CLUSTER>();

        // Each block sums its share of the bins over the cluster, in units that the bins have in common.
        const auto own_weight = [&](int bin, uint32_t& count) {
            uint64_t excess = 0;
            count = 0;
#pragma unroll 4
            for (int rank = 0; rank < CLUSTER; ++rank) {
                const Bins* bins = peer<CLUSTER>(&search.bins, rank);
                count += bins->count[bin];
                if (MASS) excess += bins->excess[bin];
            }
            return MASS ? count * static_cast<uint64_t>(UNIT) + excess : count;
        };
        const auto common_weight = [&](int bin) {
            uint32_t count;
            const uint64_t weight = own_weight(bin, count);
            if (!MASS || shift >= 0) return weight;
            return bin < NUM_BINS - 1 ? __double2ull_rn(weight * edge_mass(bin)) : 0;
        };
        uint64_t thread_weight = 0, block_weight;
#pragma unroll 1
        for (int bin = first_bin; bin < end_bin; ++bin) thread_weight += common_weight(bin);
        uint64_t before = block_exclusive_sum<THREADS>(thread_weight, block_weight), total = 0;
        if (threadIdx.x == 0) search.block_weight = block_weight;
        cluster_sync<CLUSTER>();
#pragma unroll
        for (int rank = 0; rank < CLUSTER; ++rank) {
            if (rank == cluster_rank<CLUSTER>()) before += total;
            total += *peer<CLUSTER>(&search.block_weight, rank);
        }
        if (shift < 0) {
            limit = MASS ? __double2ull_ru(static_cast<double>(target) * static_cast<double>(total)) : uint64_t(target);
            if (limit >= total) return floor;
        }

        // The weight reaches the limit in exactly one bin; the thread that has it tells the others.
        if (before < limit && limit <= before + thread_weight) {
            int bin = first_bin;
            for (uint64_t weight; (weight = common_weight(bin)) < limit - before; ++bin) before += weight;
            Boundary boundary = {limit - before, 0, 0, bin};
            boundary.weight = own_weight(bin, boundary.count);
            if (MASS && shift < 0) {
                const uint64_t in_bin_units = __double2ull_ru(boundary.limit / edge_mass(bin));
                boundary.limit = max(uint64_t(1), min(in_bin_units, boundary.weight));
            }
            for (int rank = 0; rank < CLUSTER; ++rank) *peer<CLUSTER>(&search.boundary, rank) = boundary;
        }
        cluster_sync<CLUSTER>();
        const Boundary boundary = search.boundary;

        limit = boundary.limit;
        if (shift < 0) {
            if (boundary.bin > 0) high_key = float_to_key(lower_edge(boundary.bin - 1)) - 1;
            if (boundary.bin < NUM_BINS - 1) low_key = max(low_key, float_to_key(lower_edge(boundary.bin)));
        } else {
            high_key -= static_cast<uint32_t>(boundary.bin) << shift;
            low_key = max(low_key, high_key - min(high_key, (1u << shift) - 1));
        }
        const bool kept_whole = boundary.count == 1 || limit == boundary.weight;
        if (kept_whole || low_key == high_key) return key_to_float(low_key);
        shift = max(0, 21 - __clz(high_key - low_key));  // at most NUM_BINS = 2^11 bins
    }
}

// ---- sampling with top_k, top_p and min_p ---------------------------------------------------------------------------

// What top_k and top_p leave of a short list, and the race among that: one thread a token.
template <int THREADS>
__device__ inline uint64_t draw_from_list(
    ShortList<THREADS>& list, int size, int k, float p, float row_max, const Noise& noise) {
    const int i = threadIdx.x;
    const float x = i < size ? list.values[i] : -INF;
    const uint64_t own_mass = mass(x - row_max);
    list.masses[i] = own_mass;
    __syncthreads();
    int larger = 0;
    uint64_t mass_above = 0;
    for (int j = 0; j < size; ++j) {
        if (list.values[j] > x) {
            ++larger;
            mass_above += list.masses[j];
        }
    }
    bool kept = i < size && larger < k;
    const uint64_t total = block_reduce<THREADS>(kept ? own_mass : 0, Sum());
    if (p < 1.0f) kept &= mass_above < __double2ull_ru(static_cast<double>(p) * static_cast<double>(total));
    if (!kept) return no_candidate();
    const int token = list.tokens[i];
    const uint4 words = noise.words(token / 4);
    const uint32_t word = token % 4 == 0 ? words.x : token % 4 == 1 ? words.y : token % 4 == 2 ? words.z : words.w;
    return candidate(race_score(x, word), token);
}

// token_ids [rows] from logits [rows, vocab_size]; CLUSTER blocks a row.
//
// On Hopper a cluster of blocks keeps the row in its shared memory (dynamic: a float4 for each group of the block's
// part), divided by the temperature; with CLUSTER = 1 one block reads it again and again. Few values survive a small
// top_k: they are collected and the rest forgotten. Otherwise the filters' thresholds are found one after the other,
// each over what the one before kept, as NumpyOps does, and the token is drawn from the row. Greedy rows and rows
// without a filter go straight to that.
template <int CLUSTER, int THREADS>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 2) filter_and_sample(
    const float* logits, const float* temperatures, const int* top_k, const float* top_p, const float* min_p,
    const uint64_t* seeds, const int* positions, int* token_ids, int vocab_size) {
    constexpr bool RESIDENT = CLUSTER > 1;
    extern __shared__ float4 resident[];
    __shared__ Search search;
    __shared__ Maxima maxima;
    __shared__ ShortList<THREADS> list;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    const int row = blockIdx.x / CLUSTER, rank = cluster_rank<CLUSTER>();
    const Part part = {logits + static_cast<int64_t>(row) * vocab_size, vocab_size, rank, CLUSTER};

    const float temperature = temperatures[row];
    // Read where they are used: registers are short.
    const auto k = [&] { return top_k[row] > 0 ? min(top_k[row], vocab_size) : vocab_size; };
    const auto noise = [&] { return noise_of_row(seeds, positions, row); };

    uint64_t winner = no_candidate();
    if (temperature == 0.0f) {
        winner = argmax(Values<THREADS, false, false>{part, nullptr, 1.0f});
    } else if (k() == vocab_size && top_p[row] >= 1.0f && !(min_p[row] > 0.0f)) {
        winner = draw<false>(Values<THREADS, false, true, 2>{part, nullptr, temperature}, noise(), -INF);
    } else {
        if (threadIdx.x == 0) list.size = 0;
        const Values<THREADS, RESIDENT, !RESIDENT, RESIDENT ? 1 : 2> values = {
            part, resident, RESIDENT ? 1.0f : temperature};
        float largest = -INF;  // of the thread's logits that are not NaN
        Values<THREADS, false, false>{part, nullptr, 1.0f}.for_each_group([&](const float4& v, int, int run) {
            largest = fmaxf(largest, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
            if (RESIDENT) {
                const int lane = threadIdx.x % WARP_SIZE;
                resident[run * WARP_SIZE + lane] = make_float4(
                    __fdiv_rn(v.x, temperature), __fdiv_rn(v.y, temperature), __fdiv_rn(v.z, temperature),
                    __fdiv_rn(v.w, temperature));
            }
        });
        uint32_t floor_key;
        const uint32_t key = float_to_key(__fdiv_rn(largest, temperature));
        const float row_max = key_to_float(find_maximum<CLUSTER, THREADS>(maxima, key, k(), floor_key));

        const bool finite = fabsf(row_max) < INF;
        float threshold = finite ? row_max + logf(min_p[row]) : -INF;  // log(0) = -inf
        bool listed = false;
        if (finite && k() <= NUM_MAXIMA) {
            const float floor = fmaxf(threshold, key_to_float(floor_key));
            ShortList<THREADS>* first_list = peer<CLUSTER>(&list, 0);
            values.for_each([&](float x, int token) {
                if (x >= floor && token < vocab_size) first_list->add(token, x);
            });
            cluster_sync<CLUSTER>();
            const int size = first_list->size;
            listed = size <= THREADS;
            if (listed && rank == 0) winner = draw_from_list<THREADS>(list, size, k(), top_p[row], row_max, noise());
        }
        if (!listed) {
            if (finite && k() < vocab_size) {
                // Bins of about 1/64 for logits, whatever the temperature.
                const float scale = __uint_as_float(__float_as_uint(64.0f * temperature) & 0x7f800000u);
                threshold = find_threshold<CLUSTER, THREADS, false>(search, values, threshold, row_max, scale, k());
            }
            if (finite && top_p[row] < 1.0f) {
                const float p = top_p[row];
                threshold = find_threshold<CLUSTER, THREADS, true>(search, values, threshold, row_max, 64.0f, p);
            }
            winner = draw<true>(values, noise(), threshold);
        }
    }
    winner = cluster_reduce<CLUSTER, THREADS>(winner, Max());
    if (rank == 0 && threadIdx.x == 0) token_ids[row] = token_of(winner);
    cluster_sync<CLUSTER>();  // a block's shared memory lives until all have read it
}

// ---- log probabilities ---------------------------------------------------------------------------------------------

// Log probability and rank of token_ids [rows], and the num_top <= min(NUM_MAXIMA, vocab_size) most likely tokens, from
// logits [rows, vocab_size]. CLUSTER blocks a row, as above. A row with NaN gives NaN.
template <int CLUSTER, int THREADS>
__global__ void __cluster_dims__(CLUSTER) __launch_bounds__(THREADS, 2) logprobs(
    const float* logits, const int* token_ids, float* chosen_logprobs, int* ranks, int* top_ids, float* top_logprobs,
    int vocab_size, int num_top) {
    constexpr bool RESIDENT = CLUSTER > 1;
    extern __shared__ float4 resident[];
    __shared__ Search search;
    __shared__ Maxima maxima;
    __shared__ ShortList<THREADS> list;
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
    if (threadIdx.x == 0) list.size = 0;
    const int row = blockIdx.x / CLUSTER, rank = cluster_rank<CLUSTER>();
    const float* row_logits = logits + static_cast<int64_t>(row) * vocab_size;
    const Part part = {row_logits, vocab_size, rank, CLUSTER};
    const Values<THREADS, RESIDENT, false, RESIDENT ? 1 : 2> values = {part, resident, 1.0f};

    uint32_t key = float_to_key(-INF);
    Values<THREADS, false, false>{part, nullptr, 1.0f}.for_each_group([&](const float4& v, int, int run) {
        key = max(key, max(max(float_to_key(v.x), float_to_key(v.y)), max(float_to_key(v.z), float_to_key(v.w))));
        if (RESIDENT) resident[run * WARP_SIZE + threadIdx.x % WARP_SIZE] = v;
    });
    uint32_t floor_key;
    const float row_max = key_to_float(find_maximum<CLUSTER, THREADS>(maxima, key, num_top, floor_key));
    uint64_t total = 0;
    values.for_each([&](float x, int) { total += mass(x - row_max); });
    total = cluster_reduce<CLUSTER, THREADS>(total, Sum());
    const float log_total = logf(static_cast<float>(total) / MASS_ONE);
    const auto log_softmax = [&](float x) { return (x - row_max) - log_total; };

    const int token = token_ids[row];
    const bool known = static_cast<uint32_t>(token) < static_cast<uint32_t>(vocab_size);
    const float chosen = known ? log_softmax(row_logits[token]) : -INF;
    const float floor = key_to_float(floor_key);
    const bool ordered = num_top > 0 && fabsf(row_max) < INF;
    ShortList<THREADS>* first_list = peer<CLUSTER>(&list, 0);
    int better = 0;
    values.for_each([&](float x, int id) {
        better += log_softmax(x) > chosen;
        if (ordered && x >= floor && id < vocab_size) first_list->add(id, x);
    });
    better = cluster_reduce<CLUSTER, THREADS>(better, Sum());
    if (rank == 0 && threadIdx.x == 0) {
        chosen_logprobs[row] = chosen;
        ranks[row] = 1 + better;
    }

    if (ordered) {
        int size = first_list->size;
        if (size > THREADS) {  // many equal values, or an odd order: exactly num_top tokens, of ties the lowest ids
            const float threshold =
                find_threshold<CLUSTER, THREADS, false>(search, values, -INF, row_max, 64.0f, num_top);
            int larger = 0, last_tie = -1;
            values.for_each([&](float x, int) { larger += x > threshold; });
            larger = cluster_reduce<CLUSTER, THREADS>(larger, Sum());
            for (int ties = num_top - larger; ties > 0; --ties) {
                int next = vocab_size;
                values.for_each([&](float x, int id) {
                    if (x == threshold && id > last_tie) next = min(next, id);
                });
                last_tie = -cluster_reduce<CLUSTER, THREADS>(-next, Max());
            }
            if (threadIdx.x == 0) list.size = 0;
            cluster_sync<CLUSTER>();
            values.for_each([&](float x, int id) {
                if (id < vocab_size && (x > threshold || (x == threshold && id <= last_tie))) first_list->add(id, x);
            });
            cluster_sync<CLUSTER>();
            size = first_list->size;
        }
        if (rank == 0 && threadIdx.x < size) {
            const int id = list.tokens[threadIdx.x];
            const float logprob = log_softmax(list.values[threadIdx.x]);
            int place = 0;
            for (int i = 0; i < size; ++i) {
                const float other = log_softmax(list.values[i]);
                place += other > logprob || (other == logprob && list.tokens[i] < id);
            }
            if (place < num_top) {
                top_ids[row * num_top + place] = id;
                top_logprobs[row * num_top + place] = logprob;
            }
        }
    } else if (rank == 0 && threadIdx.x < num_top) {  // NaN, or no finite logit: no order, but ids of the vocabulary
        top_ids[row * num_top + threadIdx.x] = threadIdx.x;
        top_logprobs[row * num_top + threadIdx.x] = log_softmax(row_logits[threadIdx.x]);
    }
    cluster_sync<CLUSTER>();  // a block's shared memory lives until all have read it
}
