// Sums of floats as whole numbers of 64 bits, which are the same in whatever order they are taken. Host and
// device. No torch, no CUDA header.
//
//   share   x   to  round(2^k x), added up as int64;  sum  float(total) 2^-k
//   scale   k = 62 - a - e,  a the least with samples <= 2^a, e the least with |gradient| < 2^e
//
// A scale of its own for every level and step, because none serves for all: floats reach from 2^-149 to
// 2^128, and of an int64 no more than 62 - a bits lie between a unit and the largest share. It is found on
// the device, as the largest attenuated gradient of the level's features: a maximum does not depend on an
// order.
//
// No sum overflows, nor does a part of one: of one sample an entry gets at most its gradient, since the
// weights of the corners add up to 1 (the sizes of the weights to less than 1.03, where rounding leaves a
// point just outside its cell) though several corners may share the entry; so |total| < 1.03 x 2^62 + 4
// samples, the rounding of eight corners, which is less than 2^63.
//
// What is lost: a unit is 2^(a - 62) of the largest gradient of the level, 2^-43 of it for 2^19 samples. Sums
// of floats lose as much as soon as they are 2^-19 of the largest. An entry whose sum is not one unit counts
// as not touched, as one whose floats cancel does.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/portable_math.h"

namespace mipnerf {

// The least a with count <= 2^a.
MIPNERF_HOST_DEVICE int ceil_log2(int64_t count) {
    if (count <= 1) return 0;
    int bits = 1;
    for (int step = 32; step > 0; step /= 2)
        if ((count - 1) >> (bits + step - 1) > 0) bits += step;
    return bits;
}

// 2^exponent as two factors: the whole may be outside the range of float.
struct PowerOfTwo {
    float first, second;
};
MIPNERF_HOST_DEVICE PowerOfTwo power_of_two(int exponent) {
    const int half = exponent / 2;
    return {bits_float(static_cast<uint32_t>(127 + half) << 23),
            bits_float(static_cast<uint32_t>(127 + exponent - half) << 23)};
}

// Of the size of a number, its bits without the sign: they are ordered as sizes are, a NaN last.
MIPNERF_HOST_DEVICE uint32_t size_bits(float x) {
    return float_bits(x) & 0x7fffffffu;
}
MIPNERF_HOST_DEVICE bool are_bits_finite(uint32_t size) {
    return size < 0x7f800000u;
}

constexpr int kSumBits = 62;

// The exponent k of the scale; largest_bits: of the size of a finite gradient that no other exceeds.
MIPNERF_HOST_DEVICE int scale_exponent(uint32_t largest_bits, int64_t samples) {
    return kSumBits - ceil_log2(samples) - (static_cast<int>(largest_bits >> 23) - 126);
}

MIPNERF_HOST_DEVICE int64_t to_fixed(float share, const PowerOfTwo& scale) {
    const float scaled = share * scale.first * scale.second;
#if defined(__CUDA_ARCH__)
    return __float2ll_rn(scaled);
#else
    return std::llrint(scaled);
#endif
}

MIPNERF_HOST_DEVICE float from_fixed(int64_t total, const PowerOfTwo& inverse_scale) {
    return static_cast<float>(total) * inverse_scale.first * inverse_scale.second;
}

}  // namespace mipnerf
