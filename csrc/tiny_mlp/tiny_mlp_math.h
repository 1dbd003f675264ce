// The element-wise parts of the two small networks: host and device, value and derivative. No torch, no CUDA
// header.
//
//   density network  [features, 1, q, 0.3 q^2, 0...] -> 64, ReLU -> 16; density = exp(clamp(out_0 - 2, -12,
//   9)) colour network   [the 16 outputs, 16 spherical harmonics] -> 64, ReLU (-> 64, ReLU) -> 3;
//                    rgb = sigmoid(clamp(out, -12, 12)) (1 + 2 padding) - padding, padding 0.001
//
// The clamps keep exp and sigmoid where float32 can follow; a gradient does not pass them.
#pragma once

#include "../common/portable_math.h"

namespace mipnerf {

constexpr int kGeometryFeatures = 16;
constexpr int kHarmonics = 16;
constexpr float kDensityBias = -2.0f, kDensityLow = -12.0f, kDensityHigh = 9.0f;
constexpr float kMaxLogit = 12.0f;
constexpr double kRgbPadding = 0.001;  // a double, rounded to T where it is used

template <typename T>
MIPNERF_HOST_DEVICE T clamp_to(T x, T low, T high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// e^x for |x| <= 87.
MIPNERF_HOST_DEVICE float exp_bounded(float x) {
    return exp_nonpositive(x);  // its reduction holds for both signs; only below -88 does it clamp
}
MIPNERF_HOST_DEVICE double exp_bounded(double x) {
    return exp(x);
}

template <typename T>
MIPNERF_HOST_DEVICE T fast_density(T raw) {
    return exp_bounded(clamp_to(raw + T(kDensityBias), T(kDensityLow), T(kDensityHigh)));
}
// d density / d raw = density where the clamp is inactive.
template <typename T>
MIPNERF_HOST_DEVICE bool fast_density_is_free(T raw) {
    const T x = raw + T(kDensityBias);
    return x >= T(kDensityLow) && x <= T(kDensityHigh);
}

template <typename T>
MIPNERF_HOST_DEVICE T fast_colour(T raw) {
    const T padding = T(kRgbPadding);
    return sigmoid(clamp_to(raw, T(-kMaxLogit), T(kMaxLogit))) * (T(1) + T(2) * padding) - padding;
}
template <typename T>
MIPNERF_HOST_DEVICE T fast_colour_derivative(T raw) {
    const bool is_free = raw >= T(-kMaxLogit) && raw <= T(kMaxLogit);
    const T s = sigmoid(clamp_to(raw, T(-kMaxLogit), T(kMaxLogit)));
    return is_free ? s * (T(1) - s) * (T(1) + T(2) * T(kRgbPadding)) : T(0);
}

// Real spherical harmonics of degrees 0 to 3 of a unit vector.
template <typename T>
MIPNERF_HOST_DEVICE void spherical_harmonics(T x, T y, T z, T* out) {
    const T x2 = x * x, y2 = y * y, z2 = z * z;
    out[0] = T(0.28209479177387814);
    out[1] = T(-0.48860251190291987) * y;
    out[2] = T(0.48860251190291987) * z;
    out[3] = T(-0.48860251190291987) * x;
    out[4] = T(1.0925484305920792) * x * y;
    out[5] = T(-1.0925484305920792) * y * z;
    out[6] = T(0.94617469575755997) * z2 - T(0.31539156525251999);
    out[7] = T(-1.0925484305920792) * x * z;
    out[8] = T(0.54627421529603959) * (x2 - y2);
    out[9] = T(0.59004358992664352) * y * (y2 - T(3) * x2);
    out[10] = T(2.8906114426405538) * x * y * z;
    out[11] = T(0.45704579946446572) * y * (T(1) - T(5) * z2);
    out[12] = T(0.3731763325901154) * z * (T(5) * z2 - T(3));
    out[13] = T(0.45704579946446572) * x * (T(1) - T(5) * z2);
    out[14] = T(1.4453057213202769) * z * (x2 - y2);
    out[15] = T(0.59004358992664352) * x * (T(3) * y2 - x2);
}

}  // namespace mipnerf
