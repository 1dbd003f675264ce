// What the CUDA launches of compositing take. composite_kernels.cuh defines them, composite_launch.cu
// instantiates them for float, Bfloat16 and Half samples.
#pragma once

#include "../common/device.cuh"
#include "composite_math.h"

namespace mipnerf {

// All arrays are contiguous. N is at most kMaxCompositeSamples.
template <typename S>
struct CompositeArguments {
    std::int64_t rays;
    int samples;
    const S* rgb;             // [B, N, 3]
    const S* density;         // [B, N]
    const float* t_vals;      // [B, N+1]
    const float* directions;  // [B, 3]
    CompositeOptions<float> options;
};

template <typename S>
struct CompositeCotangents {
    const float* rgb;        // dL/d output; null: zero
    const float* distance;   // null: zero
    const float* acc;        // null: zero
    const float* weights;    // null: zero
    S* grad_rgb;             // [B, N, 3]
    S* grad_density;         // [B, N]
    float* grad_t_vals;      // [B, N+1], null: not wanted
    float* grad_directions;  // [B, 3], null with grad_t_vals
};

template <typename S>
void launch_composite_forward(const CompositeArguments<S>& arguments, const CompositeResults& results,
                              Stream stream);

template <typename S>
void launch_composite_backward(const CompositeArguments<S>& arguments,
                               const CompositeCotangents<S>& cotangents, Stream stream);

// One launch for composite_forward and resample; u null for even positions, new_t_vals [B, num_fenceposts].
template <typename S>
void launch_composite_resample(const CompositeArguments<S>& arguments, const CompositeResults& results,
                               int num_fenceposts, float padding, const float* u, float* new_t_vals,
                               Stream stream);

}  // namespace mipnerf
