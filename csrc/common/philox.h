// Counter-based random numbers, host and device: Philox 4x32-10 (Salmon et al., SC 2011), laid out as
// mipnerf_fast/counter_rng.py does: counter (block, row, step, stream), key the seed. A number depends on
// nothing but these, so neither on threads nor on the device. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "portable_math.h"

namespace mipnerf {

struct Words4 {
    uint32_t word[4];
};

MIPNERF_HOST_DEVICE Words4 philox4x32(Words4 counter, uint32_t key0, uint32_t key1) {
    uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(p0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// Words 4 block to 4 block + 3 of a row in a stream of a step.
MIPNERF_HOST_DEVICE Words4 counter_words(uint64_t seed, uint64_t step, uint32_t stream, uint32_t row,
                                         uint32_t block) {
    const Words4 counter = {
        {block, row, static_cast<uint32_t>(step), stream ^ (static_cast<uint32_t>(step >> 32) << 16)}};
    return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// In [0, 1), a multiple of 2^-24.
MIPNERF_HOST_DEVICE float unit_uniform(uint32_t word) {
    return static_cast<float>(word >> 8) * 5.9604644775390625e-8f;
}

// In [0, n): the high word of the product, biased by less than n / 2^32.
MIPNERF_HOST_DEVICE uint32_t scaled_index(uint32_t word, uint32_t n) {
    return static_cast<uint32_t>((static_cast<uint64_t>(word) * n) >> 32);
}

// The streams that kernels draw from themselves; counter_rng.py lists them all.
constexpr uint32_t kStreamPixels = 0;
constexpr uint32_t kStreamImages = 1;
constexpr uint32_t kStreamFastRays = 48;
constexpr uint32_t kStreamOccupancy = 49;

}  // namespace mipnerf
