// New fenceposts from the weights of a ray (paper, section 3.2 and equation 18), number by number.
//
//   w'_k   = (max(w_{k-1}, w_k) + max(w_k, w_{k+1})) / 2 + padding          ends repeated
//   w''_k  = w'_k + max(0, 1e-5 - sum w') / N                                a ray of zeros becomes uniform
//   cdf_0  = 0, cdf_i = min(1, sum_{k<i} w''_k / sum w''), cdf_N = 1
//   p_k    = min(k/M + u_k (1/M - eps), 1 - eps), eps = 2^-23;  without u: linspace(0, 1 - eps, M)
//   t'_k   = t_i + (p_k - cdf_i) / (cdf_{i+1} - cdf_i) (t_{i+1} - t_i)       i the largest with cdf_i <= p_k
//
// No derivative: the new fenceposts are constants (stop_level_grad).
#pragma once

#include <cstdint>

#include "../common/portable_math.h"

namespace mipnerf {

constexpr double kMinWeightSum = 1e-5;
constexpr double kPositionEpsilon = 1.1920928955078125e-07;  // 2^-23, whatever the type

// A NaN survives in the first place, so of the two maxima that a weight takes part in one keeps it.
template <typename T>
MIPNERF_HOST_DEVICE T larger(T a, T b) {
    return a < b ? b : a;
}

template <typename T>
MIPNERF_HOST_DEVICE T blurred_weight(T previous, T here, T next, T padding) {
    // Halved last, which changes no bit: before the padding the sum may be subnormal, and multiplying one
    // costs a CPU as much as the rest of a ray.
    return T(0.5) * (larger(previous, here) + larger(here, next) + T(2) * padding);
}

// What every weight of a ray is raised by so that their sum is at least kMinWeightSum.
template <typename T>
MIPNERF_HOST_DEVICE T missing_weight(T sum, int64_t samples) {
    return sum < T(kMinWeightSum) ? (T(kMinWeightSum) - sum) / T(samples) : T(0);
}

// The positions p_k of one call; in float they take the roundings of k/M, so that p_k <= p_{k+1} whatever u
// is.
template <typename T>
struct Positions {
    T count;     // M
    T inverse;   // 1/M
    T last;      // 1 - eps
    T stratum;   // 1/M - eps, what u spans
    T even_gap;  // (1 - eps) / (M - 1)

    explicit Positions(int64_t num_fenceposts)
        : count(static_cast<T>(num_fenceposts)),
          inverse(T(1) / count),
          last(static_cast<T>(1.0 - kPositionEpsilon)),
          stratum(static_cast<T>(1.0 / static_cast<double>(num_fenceposts) - kPositionEpsilon)),
          even_gap(num_fenceposts > 1 ? last / static_cast<T>(num_fenceposts - 1) : T(0)) {}

    MIPNERF_HOST_DEVICE T even(int32_t k) const {
        // From the nearer end, as torch.linspace does: both ends are exact.
        const T from_end = count - T(1) - T(k);
        return T(k) < from_end ? T(k) * even_gap : last - from_end * even_gap;
    }

    // k / M. On the device the product with 1 / M and what it misses, which is the same number for every M up
    // to 4097 and comes without the slow path of a division.
    MIPNERF_HOST_DEVICE T stratum_start(int32_t k) const {
#if defined(__CUDA_ARCH__)
        const T quotient = T(k) * inverse;
        return fma_rn(fma_rn(-quotient, count, T(k)), inverse, quotient);
#else
        return T(k) / count;
#endif
    }

    MIPNERF_HOST_DEVICE T stratified(int32_t k, T u) const {
        const T lower = stratum_start(k);
        const T upper = stratum_start(k + 1);
        T p = lower + u * stratum;
        p = p > upper ? upper : p;  // by a rounding, or where u is not below 1
        p = p > lower ? p : lower;  // where u is negative or NaN
        return p > last ? last : p;
    }
};

// t'_k in its interval. The comparisons keep it inside whatever the rounding, and let a NaN of the weights
// through.
template <typename T>
MIPNERF_HOST_DEVICE T invert_interval(T p, T cdf0, T cdf1, T t0, T t1) {
    T fraction = (p - cdf0) / (cdf1 - cdf0);
    fraction = fraction > T(1) ? T(1) : fraction;
    fraction = fraction < T(0) ? T(0) : fraction;
    const T t = t0 + fraction * (t1 - t0);
    return t > t1 ? t1 : t;
}

}  // namespace mipnerf
