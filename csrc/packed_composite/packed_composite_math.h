// Compositing samples that lie one after the other, a varying number per ray: host and device, value and
// derivative. No torch, no CUDA header.
//
//   depth_i = density_i length_i,  T_0 = 1,  T_{i+1} = T_i exp(-depth_i),  w_i = T_i (1 - exp(-depth_i))
//
// A sample counts where T_i >= kMinTransmittance; the first that does not and all behind it are dropped:
//
//   rgb = sum w_i c_i + T_end background,  acc = 1 - T_end,  distance = sum w_i m_i / acc (near where acc is
//   0)
//
// Backward: dL/dc_i = w_i dL/drgb; with R_i = rgb - sum_{j<=i} w_j c_j, what lies behind sample i,
//   dL/ddepth_i = dL/drgb . (T_{i+1} c_i - R_i)
// so that one sweep from the front serves.
#pragma once

#include "../common/portable_math.h"

namespace mipnerf {

constexpr double kMinTransmittance = 1e-3;  // rounded to T where it is used

template <typename T>
struct RayState {
    T transmittance;
    T rgb[3];
    T weighted_middle;
};

template <typename T>
MIPNERF_HOST_DEVICE bool counts(T transmittance) {
    return transmittance >= T(kMinTransmittance);
}

// dL/ddepth_i given the colour so far, this sample included.
template <typename T>
MIPNERF_HOST_DEVICE T depth_gradient(const T* grad_rgb, const T* colour, const T* total, const T* so_far,
                                     T transmittance_after) {
    T gradient = T(0);
    for (int k = 0; k < 3; ++k)
        gradient += grad_rgb[k] * (transmittance_after * colour[k] - (total[k] - so_far[k]));
    return gradient;
}

// Smooth L1 with its bend at beta: e^2 / (2 beta) where |e| < beta, else |e| - beta / 2.
template <typename T>
MIPNERF_HOST_DEVICE T smooth_l1(T error, T beta) {
    const T size = error < T(0) ? -error : error;
    return size < beta ? T(0.5) * error * error / beta : size - T(0.5) * beta;
}
template <typename T>
MIPNERF_HOST_DEVICE T smooth_l1_derivative(T error, T beta) {
    const T slope = error / beta;
    return slope < T(-1) ? T(-1) : slope > T(1) ? T(1) : slope;
}

}  // namespace mipnerf
