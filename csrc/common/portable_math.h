// Scalar mathematics shared by the CPU and the CUDA kernels. No torch, no CUDA header.
//
// Every function is branch-free on float, so that a loop over it vectorises, and needs neither -ffast-math
// nor the build machine's processor. It needs -ffp-contract=off on the CPU (the float pairs below are exact
// only when a product and a sum are rounded one after the other); on the device the rounded intrinsics say so
// themselves. The double versions call libm: float64 is for checking, not for speed.
//
//   bits            float_bits, bits_float, double_bits, bits_double,
//                   to_bfloat16_bits, from_bfloat16_bits, to_half_bits, from_half_bits
//   rounded         add_rn, sub_rn, mul_rn, fma_rn; reciprocal
//   pairs           Pair<T>{hi, lo}, two_sum, two_difference, two_product, pair_times
//   integers        rounding_shift, nearest_integer, negate_if_odd
//   roots           square_root
//   exponentials    exp2_nonpositive, exp_nonpositive, one_minus_exp_negative
//   activations     reciprocal_near_one, softplus, sigmoid
//   sine and cosine sincospi_half: |r| <= 0.502, in units of pi
//
// NaN goes through every function unchanged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef MIPNERF_HOST_DEVICE  // device.cuh defines it alike
#if defined(__CUDACC__)
#define MIPNERF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MIPNERF_HOST_DEVICE inline __attribute__((always_inline))
#endif
#endif

namespace mipnerf {

// ---- bits

MIPNERF_HOST_DEVICE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
#endif
}

MIPNERF_HOST_DEVICE float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
#endif
}

MIPNERF_HOST_DEVICE uint64_t double_bits(double x) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint64_t>(__double_as_longlong(x));
#else
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
#endif
}

MIPNERF_HOST_DEVICE double bits_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
    return __longlong_as_double(static_cast<long long>(bits));
#else
    double x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
#endif
}

// Round to nearest even. The quiet bit is set on a NaN, whose low bits alone would otherwise round to
// infinity.
MIPNERF_HOST_DEVICE uint16_t to_bfloat16_bits(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint32_t quiet = bits | 0x00400000u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>((is_nan ? quiet : rounded) >> 16);
}

MIPNERF_HOST_DEVICE float from_bfloat16_bits(uint16_t bits) {
    return bits_float(static_cast<uint32_t>(bits) << 16);
}

MIPNERF_HOST_DEVICE uint16_t to_half_bits(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: move the exponent bias from 127 to 15 and round the 13 dropped bits to even.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 a half is a multiple of 2^-24, the unit in the last place of 0.5: the sum rounds for us.
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? special : half;  // 65520 and above round to infinity
    return static_cast<uint16_t>(sign | half);
}

MIPNERF_HOST_DEVICE float from_half_bits(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
    // The product with 2^112 moves the bias and normalises the subnormals in one step.
    const uint32_t finite = float_bits(bits_float(magnitude) * 5.192296858534828e33f);
    const uint32_t special = magnitude | 0x7f800000u;
    return bits_float(sign | (magnitude >= 0x0f800000u ? special : finite));
}

// ---- operations that no compiler may fuse

MIPNERF_HOST_DEVICE float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

MIPNERF_HOST_DEVICE double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dadd_rn(a, b);
#else
    return a + b;
#endif
}

template <typename T>
MIPNERF_HOST_DEVICE T sub_rn(T a, T b) {
    return add_rn(a, -b);
}

MIPNERF_HOST_DEVICE float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

MIPNERF_HOST_DEVICE double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    return a * b;
#endif
}

MIPNERF_HOST_DEVICE float fma_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}

MIPNERF_HOST_DEVICE double fma_rn(double a, double b, double c) {
    return fma(a, b, c);
}

// 1 / x where x and the result are normal numbers, within a unit in the last place.
MIPNERF_HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    // Without the slow path that the division keeps for subnormal numbers.
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return fmaf(y, fmaf(-x, y, 1.0f), y);
#else
    return 1.0f / x;
#endif
}

MIPNERF_HOST_DEVICE double reciprocal(double x) {
    return 1.0 / x;
}

// ---- pairs: the unevaluated sum hi + lo, |lo| at most half a unit in the last place of hi

template <typename T>
struct Pair {
    T hi;
    T lo;
};

// hi + lo = a + b exactly.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> two_sum(T a, T b) {
    const T sum = add_rn(a, b);
    const T b_part = sub_rn(sum, a);
    const T a_part = sub_rn(sum, b_part);
    return {sum, add_rn(sub_rn(a, a_part), sub_rn(b, b_part))};
}

// hi + lo = a - b exactly.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> two_difference(T a, T b) {
    return two_sum(a, -b);
}

// hi + lo = a + b exactly where |a| >= |b| or a = 0.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> quick_two_sum(T a, T b) {
    const T sum = add_rn(a, b);
    return {sum, sub_rn(b, sub_rn(sum, a))};
}

// hi + lo = a b exactly, unless the low word underflows.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> two_product(T a, T b) {
    const T product = mul_rn(a, b);
    return {product, fma_rn(a, b, -product)};
}

// The product of two pairs, to about two units in the last place of its low word.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> pair_times(Pair<T> a, Pair<T> b) {
    const Pair<T> high = two_product(a.hi, b.hi);
    return quick_two_sum(high.hi, add_rn(high.lo, fma_rn(a.hi, b.lo, mul_rn(a.lo, b.hi))));
}

// ---- integers

// 1.5 x 2^23 (2^52): adding it rounds |x| < 2^22 (2^51) to the nearest integer, ties to even, which then sits
// in the low bits; subtracting it again gives the integer as a number.
MIPNERF_HOST_DEVICE constexpr float rounding_shift(float) {
    return 12582912.0f;
}
MIPNERF_HOST_DEVICE constexpr double rounding_shift(double) {
    return 6755399441055744.0;
}

// Any magnitude, ties to even.
MIPNERF_HOST_DEVICE float nearest_integer(float x) {
    return nearbyintf(x);
}
MIPNERF_HOST_DEVICE double nearest_integer(double x) {
    return nearbyint(x);
}

// -value where the integer in `shifted` (an integer plus rounding_shift) is odd.
MIPNERF_HOST_DEVICE float negate_if_odd(float value, float shifted) {
    return bits_float(float_bits(value) ^ (float_bits(shifted) << 31));
}

MIPNERF_HOST_DEVICE double negate_if_odd(double value, double shifted) {
    return bits_double(double_bits(value) ^ (double_bits(shifted) << 63));
}

// ---- roots: bare sqrt(float) would be C's, in double, where only <math.h> declares it
// -----------------------------------------------------------------------------------------------------------

MIPNERF_HOST_DEVICE float square_root(float x) {
    return sqrtf(x);
}
MIPNERF_HOST_DEVICE double square_root(double x) {
    return sqrt(x);
}

// ---- exponentials

// 2^n for an integer -127 <= n <= 127 given as n + rounding_shift; n = -127 gives zero.
MIPNERF_HOST_DEVICE float exp2_of_shifted_integer(float shifted) {
    return bits_float((float_bits(shifted) + 127u) << 23);
}

// 2^x for x <= 0, to 2 units in the last place; below 2^-126 zero.
MIPNERF_HOST_DEVICE float exp2_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    x = x < -127.0f ? -127.0f : x;
    const float shifted = x + rounding_shift(0.0f);
    const float f = x - (shifted - rounding_shift(0.0f));
    // 2^f = 1 + f p(f), relative error 2.6e-9 on [-1/2, 1/2]
    float p = 1.559488592e-4f;
    p = fma_rn(p, f, 1.340673538e-3f);
    p = fma_rn(p, f, 9.617691860e-3f);
    p = fma_rn(p, f, 5.550310388e-2f);
    p = fma_rn(p, f, 2.402265221e-1f);
    p = fma_rn(p, f, 6.931472421e-1f);
    p = fma_rn(p, f, 1.0f);
    return p * exp2_of_shifted_integer(shifted);
#endif
}

MIPNERF_HOST_DEVICE double exp2_nonpositive(double x) {
    return exp2(x);
}

// e^x - 1 = x + x^2 p(x) for |x| <= ln(2) / 2, relative error 2.5e-10 before rounding.
MIPNERF_HOST_DEVICE float expm1_reduced(float x) {
    float p = 1.988317381e-4f;
    p = fma_rn(p, x, 1.394170919e-3f);
    p = fma_rn(p, x, 8.333317935e-3f);
    p = fma_rn(p, x, 4.166634381e-2f);
    p = fma_rn(p, x, 1.666666716e-1f);
    p = fma_rn(p, x, 5.000000000e-1f);
    return fma_rn(x * x, p, x);
}

struct ReducedExponent {
    float fraction;  // x - n ln 2
    float scale;     // 2^n
};

// x <= 0, clamped where 2^n becomes zero.
MIPNERF_HOST_DEVICE ReducedExponent reduce_exponent(float x) {
    x = x < -88.029692f ? -88.029692f : x;
    const float shifted = fma_rn(x, 1.44269504f, rounding_shift(0.0f));
    const float n = shifted - rounding_shift(0.0f);
    const float fraction = fma_rn(n, -1.42860677e-6f, fma_rn(n, -0.693145752f, x));
    return {fraction, exp2_of_shifted_integer(shifted)};
}

// e^x for x <= 0, to 2 units in the last place; below 2^-126 zero, so e^-inf = 0.
MIPNERF_HOST_DEVICE float exp_nonpositive(float x) {
    const ReducedExponent reduced = reduce_exponent(x);
    return fma_rn(expm1_reduced(reduced.fraction), reduced.scale, reduced.scale);
}

MIPNERF_HOST_DEVICE double exp_nonpositive(double x) {
    return exp(x);
}

// 1 - e^-x for x >= 0 without cancellation: x near zero, 1 at infinity.
MIPNERF_HOST_DEVICE float one_minus_exp_negative(float x) {
    const ReducedExponent reduced = reduce_exponent(-x);
    return fma_rn(-expm1_reduced(reduced.fraction), reduced.scale, 1.0f - reduced.scale);
}

MIPNERF_HOST_DEVICE double one_minus_exp_negative(double x) {
    return -expm1(-x);
}

// ---- activations

// 1 / x for 1 <= x <= 4, to one unit in the last place: on the device without the slow path of a division
// for arguments that do not occur here.
MIPNERF_HOST_DEVICE float reciprocal_near_one(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

MIPNERF_HOST_DEVICE double reciprocal_near_one(double x) {
    return 1.0 / x;
}

// log(1 + z) for 0 <= z <= 1 as 2 artanh(z / (2 + z)).
MIPNERF_HOST_DEVICE float log1p_unit(float z) {
    const float s = z * reciprocal_near_one(2.0f + z);
    const float s2 = s * s;
    float p = 2.430536300e-1f;
    p = fma_rn(p, s2, 2.142657638e-1f);
    p = fma_rn(p, s2, 2.861697376e-1f);
    p = fma_rn(p, s2, 3.999887407e-1f);
    p = fma_rn(p, s2, 6.666667461e-1f);
    return fma_rn(s * s2, p, 2.0f * s);
}

MIPNERF_HOST_DEVICE double log1p_unit(double z) {
    return log1p(z);
}

// log(1 + e^x); its derivative is the sigmoid.
template <typename T>
MIPNERF_HOST_DEVICE T softplus(T x) {
    const T magnitude = x < T(0) ? -x : x;
    const T positive = x < T(0) ? T(0) : x;
    return positive + log1p_unit(exp_nonpositive(-magnitude));
}

// 1 / (1 + e^-x), accurate in both tails.
template <typename T>
MIPNERF_HOST_DEVICE T sigmoid(T x) {
    const T magnitude = x < T(0) ? -x : x;
    const T e = exp_nonpositive(-magnitude);
    const T inverse = reciprocal_near_one(T(1) + e);
    return x < T(0) ? e * inverse : inverse;
}

// ---- sine and cosine

template <typename T>
struct SinCos {
    T sin;
    T cos;
};

// sin(pi r) and cos(pi r) for |r| <= 0.502: absolute error below 1e-7, the sine exact to rounding near zero.
MIPNERF_HOST_DEVICE SinCos<float> sincospi_half(float r) {
    const float r2 = r * r;
    float s = 7.718180865e-2f;
    s = fma_rn(s, r2, -5.980259776e-1f);
    s = fma_rn(s, r2, 2.550028324f);
    s = fma_rn(s, r2, -5.167706490f);
    s = fma_rn(s, r2, 3.141592503f);
    float c = -2.440989390e-2f;
    c = fma_rn(c, r2, 2.349479795e-1f);
    c = fma_rn(c, r2, -1.335214972f);
    c = fma_rn(c, r2, 4.058709621f);
    c = fma_rn(c, r2, -4.934802055f);
    c = fma_rn(c, r2, 1.0f);
    return {s * r, c};
}

MIPNERF_HOST_DEVICE SinCos<double> sincospi_half(double r) {
    const double angle = r * 3.14159265358979323846;
    return {sin(angle), cos(angle)};
}

}  // namespace mipnerf
