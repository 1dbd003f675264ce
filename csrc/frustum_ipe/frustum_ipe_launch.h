// The CUDA side of frustum_ipe as the operator sees it: raw pointers in, one launch. Compiled in
// frustum_ipe_launch.cu.
#pragma once

#include "../common/device.cuh"

namespace mipnerf {

// The inputs, contiguous, on the device.
struct FrustumIpeInputs {
    const float* t_vals;      // [rays, intervals + 1]
    const float* origins;     // [rays, 3]
    const float* directions;  // [rays, 3]
    const float* radii;       // [rays, 1]
    std::int64_t rays;
    std::int64_t intervals;
    int min_deg;
    int degrees;
    bool cylinder;
    bool integrated;
};

struct FrustumIpeGradients {
    float* t_vals;      // [rays, intervals + 1]
    float* origins;     // [rays, 3]
    float* directions;  // [rays, 3]
    float* radii;       // [rays, 1]
};

// features: [rays, intervals, 6 degrees], aligned to 16 bytes. Out is float, Bfloat16 or Half.
template <typename Out>
void launch_frustum_ipe_forward(const FrustumIpeInputs& inputs, Out* features, Stream stream);

// Writes every element of the gradients; the same bits in every run.
template <typename Out>
void launch_frustum_ipe_backward(const FrustumIpeInputs& inputs, const Out* grad_features,
                                 const FrustumIpeGradients& gradients, Stream stream);

}  // namespace mipnerf
