// The mathematics of frustum_ipe for one sample: the only native copy of the formula, value and derivative.
// Paper: Barron et al. 2021, equations 7 (moments), 8 (lifting), 14 (expected encoding). No torch, no CUDA
// header.
//
// With s = t0 + t1 and w = t1 - t0 (so mu = s / 2, hw = w / 2, D = (3 s^2 + w^2) / 4) and q = hw^2 / D = w^2
// / (3 s^2 + w^2), equation 7 of the cone is polynomial in q:
//     mean      = mu + 2 mu hw^2 / D                                  = s (1/2 + q)
//     along     = hw^2 / 3 - 4/15 hw^4 (12 mu^2 - hw^2) / D^2         = w^2 (1/12 - 4/15 q + 1/3 q^2)
//     across/r^2= mu^2 / 4 + 5/12 hw^2 - 4/15 hw^4 / D               = s^2 / 16 + w^2 (5/48 - 1/15 q)
// All terms are of one sign or nearly so: nothing cancels, nothing but D is divided by, and D^2 never
// appears.
//
// A phase is 2^degree times a coordinate of the mean, up to 2^15 x: it needs the mean to far more than float
// precision. The mean is therefore a pair of floats up to the range reduction; there it becomes a pair of
// half turns (units of pi) within [-1, 1], which a power of two scales exactly. Variances are single floats:
// where an error in them would matter, the Gaussian factor has removed the feature.
#pragma once

#include "../common/portable_math.h"

namespace mipnerf {

enum class FrustumShape : int { kCone = 0, kCylinder = 1 };

constexpr int kMaxDegrees = 16;

MIPNERF_HOST_DEVICE constexpr float smallest_normal(float) {
    return 1.17549435e-38f;
}
MIPNERF_HOST_DEVICE constexpr double smallest_normal(double) {
    return 2.2250738585072014e-308;
}

// ---- equation 7: moments along and across the ray

template <typename T>
struct FrustumMoments {
    Pair<T> mean;  // distance along the ray
    T along;       // variance along the ray, in multiples of the direction squared
    T across;      // variance across the ray, in multiples of the radius squared
    // what the derivative needs again
    T sum, width;  // s, w
    T q;
    T inverse_d;  // 1 / (3 s^2 + w^2), 0 at the apex
};

template <typename T>
MIPNERF_HOST_DEVICE FrustumMoments<T> cone_moments(T t0, T t1) {
    const Pair<T> s = two_sum(t0, t1);
    const Pair<T> w = two_difference(t1, t0);
    const Pair<T> s2 = pair_times(s, s);
    const Pair<T> w2 = pair_times(w, w);
    const Pair<T> s2_3 = two_product(T(3), s2.hi);
    Pair<T> d = two_sum(s2_3.hi, w2.hi);
    d.lo = add_rn(d.lo, add_rn(fma_rn(T(3), s2.lo, s2_3.lo), w2.lo));
    // The apex t0 = t1 = 0 (or squares below the normal numbers): the frustum is a point, every moment and
    // derivative zero.
    const bool is_point = d.hi < smallest_normal(T(0));
    const T inverse_d = is_point ? T(0) : reciprocal(is_point ? T(1) : d.hi);
    const T q = w2.hi * inverse_d;
    // What the rounded quotient missed: (w2 - q d) / d.
    const T q_low = add_rn(fma_rn(-q, d.hi, w2.hi), fma_rn(-q, d.lo, w2.lo)) * inverse_d;
    const Pair<T> sq = two_product(s.hi, q);
    const Pair<T> mean = two_sum(T(0.5) * s.hi, sq.hi);
    const T mean_low = add_rn(mean.lo, fma_rn(s.hi, q_low, fma_rn(s.lo, add_rn(T(0.5), q), sq.lo)));
    FrustumMoments<T> m;
    m.mean = {is_point ? T(0) : mean.hi, is_point ? T(0) : mean_low};
    m.along = w2.hi * fma_rn(q, fma_rn(q, T(1.0 / 3), T(-4.0 / 15)), T(1.0 / 12));
    m.across = fma_rn(w2.hi, fma_rn(q, T(-1.0 / 15), T(5.0 / 48)), s2.hi * T(1.0 / 16));
    m.sum = s.hi;
    m.width = w.hi;
    m.q = q;
    m.inverse_d = inverse_d;
    return m;
}

template <typename T>
MIPNERF_HOST_DEVICE FrustumMoments<T> cylinder_moments(T t0, T t1) {
    const Pair<T> s = two_sum(t0, t1);
    const T w = sub_rn(t1, t0);
    FrustumMoments<T> m;
    m.mean = {T(0.5) * s.hi, T(0.5) * s.lo};
    m.along = w * w * T(1.0 / 12);
    m.across = T(0.25);
    m.sum = s.hi;
    m.width = w;
    m.q = T(0);
    m.inverse_d = T(0);
    return m;
}

template <FrustumShape kShape, typename T>
MIPNERF_HOST_DEVICE FrustumMoments<T> frustum_moments(T t0, T t1) {
    if constexpr (kShape == FrustumShape::kCone)
        return cone_moments(t0, t1);
    else
        return cylinder_moments(t0, t1);
}

template <typename T>
struct FencepostGradient {
    T t0;
    T t1;
};

// From the gradients of mean, along and across to those of t0 and t1. With dq/ds = -6 s q / d and dq/dw = 2 w
// (1 - q) / d:
//     d mean / ds   = 1/2 - q + 2 q^2            d mean / dw   = 2 s w (1 - q) / d
//     d along / ds  = s q^2 (8/5 - 4 q)          d along / dw  = w (1/6 - 8/15 q + 2/3 q^2 + q (1 - q) (4/3 q
//     - 8/15)) d across / ds = s (1/8 + 2/5 q^2)          d across / dw = w (5/24 - 4/15 q + 2/15 q^2)
template <FrustumShape kShape, typename T>
MIPNERF_HOST_DEVICE FencepostGradient<T> frustum_moments_gradient(const FrustumMoments<T>& m, T grad_mean,
                                                                  T grad_along, T grad_across) {
    T grad_s, grad_w;
    if constexpr (kShape == FrustumShape::kCone) {
        const T q = m.q, s = m.sum, w = m.width;
        const T mean_s = m.inverse_d == T(0) ? T(0) : fma_rn(q, fma_rn(q, T(2), T(-1)), T(0.5));
        const T mean_w = T(2) * (s * m.inverse_d) * w * (T(1) - q);
        const T along_s = s * q * q * fma_rn(q, T(-4), T(8.0 / 5));
        const T along_w = w * (fma_rn(q, fma_rn(q, T(2.0 / 3), T(-8.0 / 15)), T(1.0 / 6)) +
                               q * (T(1) - q) * fma_rn(q, T(4.0 / 3), T(-8.0 / 15)));
        const T across_s = s * fma_rn(q * q, T(2.0 / 5), T(1.0 / 8));
        const T across_w = w * fma_rn(q, fma_rn(q, T(2.0 / 15), T(-4.0 / 15)), T(5.0 / 24));
        grad_s = fma_rn(grad_mean, mean_s, fma_rn(grad_along, along_s, grad_across * across_s));
        grad_w = fma_rn(grad_mean, mean_w, fma_rn(grad_along, along_w, grad_across * across_w));
    } else {
        grad_s = T(0.5) * grad_mean;
        grad_w = grad_along * m.width * T(1.0 / 6);
    }
    return {grad_s - grad_w, grad_s + grad_w};
}

// ---- equation 8: the Gaussian of one coordinate, ready to be encoded

// How a direction spreads a variance across the ray over the coordinates; m = max(||d||^2, 1e-10).
template <typename T>
struct Transverse {
    T squared[3];     // d_k^2
    T fraction[3];    // 1 - d_k^2 / m
    T inverse_norm2;  // 1 / m
    bool clamped;     // m does not move with d
};

template <typename T>
MIPNERF_HOST_DEVICE Transverse<T> transverse(const T direction[3]) {
    Transverse<T> part;
    for (int k = 0; k < 3; ++k) part.squared[k] = direction[k] * direction[k];
    const T norm2 = part.squared[0] + part.squared[1] + part.squared[2];
    part.clamped = norm2 < T(1e-10);
    part.inverse_norm2 = reciprocal(part.clamped ? T(1e-10) : norm2);
    const T missing = part.clamped ? T(1e-10) - norm2 : T(0);
    // m - d_k^2 as the sum of what remains: without the cancellation along an axis.
    part.fraction[0] = (part.squared[1] + part.squared[2] + missing) * part.inverse_norm2;
    part.fraction[1] = (part.squared[0] + part.squared[2] + missing) * part.inverse_norm2;
    part.fraction[2] = (part.squared[0] + part.squared[1] + missing) * part.inverse_norm2;
    return part;
}

// What the samples of a ray need of it.
template <typename T>
struct RayConstants {
    T origin[3];
    T direction[3];
    T squared[3];     // d_k^2
    T transverse[3];  // r^2 (1 - d_k^2 / m)
};

template <typename T>
MIPNERF_HOST_DEVICE RayConstants<T> ray_constants(const T* origin, const T* direction, T radius) {
    RayConstants<T> ray;
    for (int k = 0; k < 3; ++k) {
        ray.origin[k] = origin[k];
        ray.direction[k] = direction[k];
    }
    const Transverse<T> part = transverse(ray.direction);
    for (int k = 0; k < 3; ++k) {
        ray.squared[k] = part.squared[k];
        ray.transverse[k] = radius * radius * part.fraction[k];
    }
    return ray;
}

// 1 / pi as a pair.
MIPNERF_HOST_DEVICE constexpr Pair<float> inverse_pi(float) {
    return {0.318309873f, 1.28412765e-08f};
}
MIPNERF_HOST_DEVICE constexpr Pair<double> inverse_pi(double) {
    return {0.31830988618379067, -1.9678676675182486e-17};
}

// A coordinate as the encoding takes it.
template <typename T>
struct EncodedCoordinate {
    Pair<T> half_turns;  // x / pi modulo 2, in [-1, 1]
    T exponent;          // log2 of the Gaussian factor of degree 0: -log2(e) / 2 x variance
};

// (origin + direction x mean) / pi modulo 2. Dropping whole turns is exact for every degree: 2^degree turns
// are whole too.
template <typename T>
MIPNERF_HOST_DEVICE Pair<T> reduced_half_turns(T origin, T direction, Pair<T> mean) {
    const Pair<T> step = two_product(direction, mean.hi);
    Pair<T> x = two_sum(origin, step.hi);
    x.lo = add_rn(x.lo, fma_rn(direction, mean.lo, step.lo));
    const Pair<T> scale = inverse_pi(T(0));
    const Pair<T> u = two_product(x.hi, scale.hi);
    const T low = fma_rn(x.hi, scale.lo, fma_rn(x.lo, scale.hi, u.lo));
    return two_sum(sub_rn(u.hi, T(2) * nearest_integer(T(0.5) * u.hi)), low);
}

template <typename T>
MIPNERF_HOST_DEVICE EncodedCoordinate<T> encoded_coordinate(const RayConstants<T>& ray,
                                                            const FrustumMoments<T>& m, int k) {
    const T variance = fma_rn(m.along, ray.squared[k], m.across * ray.transverse[k]);
    return {reduced_half_turns(ray.origin[k], ray.direction[k], m.mean), T(-0.72134752044448170) * variance};
}

// ---- equation 14: the features of one coordinate at one degree

// Sine and cosine of 2^degree x; both have the other sign where the integer in `shifted` is odd.
template <typename T>
struct Phase {
    SinCos<T> value;
    T shifted;
};

template <typename T>
MIPNERF_HOST_DEVICE Phase<T> phase_at(const EncodedCoordinate<T>& coordinate, T scale) {
    const T shift = rounding_shift(T(0));
    // Scaling is exact, and so is what remains of the high word after rounding.
    const T shifted = fma_rn(coordinate.half_turns.hi, scale, shift);
    const T high = fma_rn(coordinate.half_turns.hi, scale, shift - shifted);
    return {sincospi_half(fma_rn(coordinate.half_turns.lo, scale, high)), shifted};
}

// e^(-4^degree variance / 2); without integration 1.
template <bool kIntegrated, typename T>
MIPNERF_HOST_DEVICE T gaussian_factor(const EncodedCoordinate<T>& coordinate, T scale) {
    return kIntegrated ? exp2_nonpositive(coordinate.exponent * (scale * scale)) : T(1);
}

// The features of one coordinate at one degree: the Gaussian factor times sine and cosine of 2^degree x;
// scale = 2^degree.
template <bool kIntegrated, typename T>
MIPNERF_HOST_DEVICE SinCos<T> encode_degree(const EncodedCoordinate<T>& coordinate, T scale) {
    const Phase<T> phase = phase_at(coordinate, scale);
    const T factor = negate_if_odd(gaussian_factor<kIntegrated>(coordinate, scale), phase.shifted);
    return {factor * phase.value.sin, factor * phase.value.cos};
}

// Sine and cosine of twice the angle; a common sign of both does not matter. Doubles the absolute error: for
// 16-bit features.
template <typename T>
MIPNERF_HOST_DEVICE SinCos<T> double_angle(SinCos<T> angle) {
    const T twice = angle.sin + angle.sin;
    return {twice * angle.cos, fma_rn(-twice, angle.sin, T(1))};
}

// The features at degrees d ... d + kDegrees - 1 for scale = 2^d, from one reduction: the angle of each is
// twice the last one's. With four degrees the error stays below 2e-6.
template <bool kIntegrated, int kDegrees, typename T>
MIPNERF_HOST_DEVICE void encode_degrees(const EncodedCoordinate<T>& coordinate, T scale,
                                        SinCos<T> features[kDegrees]) {
    Phase<T> phase = phase_at(coordinate, scale);
    T factor = negate_if_odd(gaussian_factor<kIntegrated>(coordinate, scale), phase.shifted);
    features[0] = {factor * phase.value.sin, factor * phase.value.cos};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int l = 1; l < kDegrees; ++l) {
        phase.value = double_angle(phase.value);
        scale = scale + scale;
        factor = gaussian_factor<kIntegrated>(coordinate, scale);
        features[l] = {factor * phase.value.sin, factor * phase.value.cos};
    }
}

// The gradients of the coordinate's mean and variance, summed over the degrees.
template <typename T>
struct CoordinateGradient {
    T mean;
    T variance;
};

// d sin-feature / d mean = scale x cos-feature, d cos-feature / d mean = -scale x sin-feature, and both
// features decay with the variance as -scale^2 / 2.
template <typename T>
MIPNERF_HOST_DEVICE CoordinateGradient<T> encode_degree_gradient(SinCos<T> feature, T scale, T grad_sin,
                                                                 T grad_cos) {
    return {scale * (grad_sin * feature.cos - grad_cos * feature.sin),
            T(-0.5) * (scale * scale) * (grad_sin * feature.sin + grad_cos * feature.cos)};
}

// ---- from the coordinates back to the sample and the ray

// Sums over the samples of a ray, from which the gradients of its origin, direction and radius follow.
template <typename T>
struct RaySums {
    T mean[3];             // of grad_mean_k
    T mean_distance[3];    // of grad_mean_k x mean distance along the ray
    T variance_along[3];   // of grad_variance_k x along
    T variance_across[3];  // of grad_variance_k x across
};

// One sample: adds to the ray's sums and returns the gradients of its fenceposts.
template <FrustumShape kShape, bool kIntegrated, typename T>
MIPNERF_HOST_DEVICE FencepostGradient<T> sample_gradient(const RayConstants<T>& ray,
                                                         const FrustumMoments<T>& m,
                                                         const CoordinateGradient<T> grad[3],
                                                         RaySums<T>& sums) {
    T grad_mean = T(0), grad_along = T(0), grad_across = T(0);
    for (int k = 0; k < 3; ++k) {
        grad_mean = fma_rn(grad[k].mean, ray.direction[k], grad_mean);
        sums.mean[k] += grad[k].mean;
        sums.mean_distance[k] = fma_rn(grad[k].mean, m.mean.hi, sums.mean_distance[k]);
        if constexpr (kIntegrated) {
            grad_along = fma_rn(grad[k].variance, ray.squared[k], grad_along);
            grad_across = fma_rn(grad[k].variance, ray.transverse[k], grad_across);
            sums.variance_along[k] = fma_rn(grad[k].variance, m.along, sums.variance_along[k]);
            sums.variance_across[k] = fma_rn(grad[k].variance, m.across, sums.variance_across[k]);
        }
    }
    return frustum_moments_gradient<kShape>(m, grad_mean, grad_along, grad_across);
}

template <typename T>
struct RayGradient {
    T origin[3];
    T direction[3];
    T radius;
};

template <typename T>
MIPNERF_HOST_DEVICE RayGradient<T> ray_gradient(const T direction[3], T radius, const RaySums<T>& sums) {
    // variance_k = along d_k^2 + across r^2 (1 - d_k^2 / m), and m moves with d unless it is clamped.
    const Transverse<T> part = transverse(direction);
    T average = T(0), grad_radius = T(0);
    for (int k = 0; k < 3; ++k) {
        average = fma_rn(sums.variance_across[k], part.squared[k] * part.inverse_norm2, average);
        grad_radius = fma_rn(sums.variance_across[k], part.fraction[k], grad_radius);
    }
    if (part.clamped) average = T(0);
    RayGradient<T> grad;
    for (int k = 0; k < 3; ++k) {
        grad.origin[k] = sums.mean[k];
        const T across = radius * radius * part.inverse_norm2 * (average - sums.variance_across[k]);
        grad.direction[k] =
            fma_rn(T(2) * direction[k], sums.variance_along[k] + across, sums.mean_distance[k]);
    }
    grad.radius = T(2) * radius * grad_radius;
    return grad;
}

}  // namespace mipnerf
