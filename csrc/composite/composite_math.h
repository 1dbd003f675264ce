// Volume rendering of one ray (paper, equations 3 and 5), sample by sample: values and, beneath each,
// derivatives.
//
//   density_i  = activation(raw_i + bias)         delta_i = (t_{i+1} - t_i) ||d||      depth_i = density_i
//   delta_i S_i        = sum_{j<i} depth_j                T_i     = exp(-S_i)                  alpha_i = 1 -
//   exp(-depth_i) w_i        = T_i alpha_i                      acc     = sum w_i                    rgb =
//   sum w_i c_i + background (1 - acc) distance   = clip(sum w_i m_i / acc, t_0, t_N), m_i = (t_i + t_{i+1})
//   / 2;  t_0 where acc = 0
//
// Backward, with g_i = dL/dw_i gathered from the four outputs:
//   dL/ddepth_i = T_{i+1} g_i - sum_{j>i} w_j g_j,   dL/dc_i = w_i dL/drgb
//
// T_i comes from the exponential of a sum and not from a product of exponentials: in a thin medium the
// factors are close to one and the rounding of the product would grow with N.
#pragma once

#include <cstdint>

#include "../common/portable_math.h"

namespace mipnerf {

enum class DensityActivation : int32_t { kNone, kSoftplus, kRelu };
enum class RgbActivation : int32_t { kNone, kSigmoid };

template <typename T>
struct CompositeOptions {
    T background;  // 1 white, 0 black
    T density_bias;
    T rgb_padding;
    DensityActivation density_activation;
    RgbActivation rgb_activation;

    template <typename U>
    CompositeOptions<U> as() const {
        return {static_cast<U>(background), static_cast<U>(density_bias), static_cast<U>(rgb_padding),
                density_activation, rgb_activation};
    }
};

// What the kernels write, contiguous.
struct CompositeResults {
    float* rgb;       // [B, 3]
    float* distance;  // [B]
    float* acc;       // [B]
    float* weights;   // [B, N]
};

template <typename T>
struct Largest;
template <>
struct Largest<float> {
    static constexpr float kFinite = 3.402823466e+38f;
};
template <>
struct Largest<double> {
    static constexpr double kFinite = 1.7976931348623157e308;
};

// ---- activations --------------------------------------------------------------------------------

template <typename T>
MIPNERF_HOST_DEVICE T relu(T x) {
    return x < T(0) ? T(0) : x;  // keeps NaN
}

template <typename T>
struct Activated {
    T value;
    T slope;  // the derivative by the raw number
};

// The exponential and the reciprocal that value and slope share.
template <typename T>
MIPNERF_HOST_DEVICE Activated<T> softplus_with_slope(T x) {
    const T e = exp_nonpositive(x < T(0) ? x : -x);
    const T inverse = reciprocal_near_one(T(1) + e);
    return {relu(x) + log1p_unit(e), x < T(0) ? e * inverse : inverse};
}

// s (1 - s) = e / (1 + e)^2 with e = exp(-|x|): no cancellation where s is near one.
template <typename T>
MIPNERF_HOST_DEVICE Activated<T> sigmoid_with_slope(T x) {
    const T e = exp_nonpositive(x < T(0) ? x : -x);
    const T inverse = reciprocal_near_one(T(1) + e);
    return {x < T(0) ? e * inverse : inverse, e * inverse * inverse};
}

template <typename T>
MIPNERF_HOST_DEVICE Activated<T> activate_density(T raw, DensityActivation activation, T bias) {
    if (activation == DensityActivation::kSoftplus) return softplus_with_slope(raw + bias);
    if (activation == DensityActivation::kRelu) return {relu(raw + bias), raw + bias > T(0) ? T(1) : T(0)};
    return {raw, T(1)};
}

// Widened so that a finite raw value can reach 0 and 1: sigmoid(raw) (1 + 2 padding) - padding.
template <typename T>
MIPNERF_HOST_DEVICE Activated<T> activate_rgb(T raw, RgbActivation activation, T padding) {
    if (activation == RgbActivation::kSigmoid) {
        const Activated<T> s = sigmoid_with_slope(raw);
        const T width = T(1) + T(2) * padding;
        return {s.value * width - padding, s.slope * width};
    }
    return {raw, T(1)};
}

// ---- one interval -------------------------------------------------------------------------------

template <typename T>
MIPNERF_HOST_DEVICE T interval_length(T t0, T t1, T direction_norm) {
    return (t1 - t0) * direction_norm;
}

// The largest finite density behaves as an infinite one (nothing is transmitted) without inf * 0 = NaN in an
// empty interval.
template <typename T>
MIPNERF_HOST_DEVICE T optical_depth(T density, T length) {
    return (density > Largest<T>::kFinite ? Largest<T>::kFinite : density) * length;
}

// An infinite density is a constant: no gradient goes to it, nor through it to the length.
template <typename T>
MIPNERF_HOST_DEVICE T optical_depth_by_density(T density, T length) {
    return density > Largest<T>::kFinite ? T(0) : length;
}
template <typename T>
MIPNERF_HOST_DEVICE T optical_depth_by_length(T density) {
    return density > Largest<T>::kFinite ? T(0) : density;
}

template <typename T>
MIPNERF_HOST_DEVICE T opacity(T depth) {
    return one_minus_exp_negative(depth);
}

template <typename T>
MIPNERF_HOST_DEVICE T transmittance(T depth_before) {
    return exp_nonpositive(-depth_before);
}

// ---- one ray ------------------------------------------------------------------------------------

template <typename T>
MIPNERF_HOST_DEVICE T direction_norm(const T* direction) {
    return sqrt(direction[0] * direction[0] + direction[1] * direction[1] + direction[2] * direction[2]);
}

template <typename T>
MIPNERF_HOST_DEVICE T interval_middle(T t0, T t1) {
    return T(0.5) * (t0 + t1);
}

template <typename T>
struct Distance {
    T value;
    bool is_inside;  // neither clipped nor of an empty ray: only then does a gradient pass
};

template <typename T>
MIPNERF_HOST_DEVICE Distance<T> expected_distance(T sum_weight_middle, T acc, T near, T far) {
    if (acc == T(0)) return {near, false};
    const T mean = sum_weight_middle / acc;
    if (mean < near) return {near, false};
    if (mean > far) return {far, false};
    return {mean, true};
}

// dL/dw_i from the four outputs. `towards_distance` is dL/ddistance / acc, or 0 where no gradient passes.
template <typename T>
struct WeightCotangent {
    T rgb[3];
    T constant;  // dL/dacc minus what the background loses
    T towards_distance;
    T distance;

    MIPNERF_HOST_DEVICE T operator()(T red, T green, T blue, T middle) const {
        return rgb[0] * red + rgb[1] * green + rgb[2] * blue +
               (constant + towards_distance * (middle - distance));
    }
};

}  // namespace mipnerf
