// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as ops/philox.py defines it.
//
// Counter-based: the number of (seed, position, token id) is a pure function of the three, so a draw depends neither
// on the batch nor on which thread makes it.
//
//   key     = (low word of seed, high word of seed)
//   counter = (token_id / 4, position, 0, 0)         output word token_id % 4 belongs to token_id
#pragma once

#include "common.cuh"

__device__ inline uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(counter.x, 0xD2511F53u), low0 = counter.x * 0xD2511F53u;
        const uint32_t high1 = __umulhi(counter.z, 0xCD9E8D57u), low1 = counter.z * 0xCD9E8D57u;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key.x += 0x9E3779B9u;
        key.y += 0xBB67AE85u;
    }
    return counter;
}

// A word x becomes u = (x + 0.5) / 2^32 and then -log1p(-u), which is Exp(1): precise for small u, where the winners
// of the exponential race lie, and never zero. u may round to 1: infinite noise, a token that loses.
__device__ inline float exponential_noise(uint32_t word) {
    const float u = (__uint2float_rn(word) + 0.5f) * 0x1p-32f;
    return -log1pf(-u);
}
