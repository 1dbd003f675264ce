// What the CUDA launches of packed compositing take. packed_composite_kernels.cuh defines them.
#pragma once

#include "../common/device.cuh"
#include "packed_composite_math.h"

namespace mipnerf {

// All arrays are contiguous.
struct PackedCompositeArguments {
    std::int64_t rays;
    std::int64_t samples;
    const float* rgb;                // [S, 3]
    const float* density;            // [S]
    const float* lengths;            // [S]
    const float* middles;            // [S]
    const std::int64_t* ray_starts;  // [B + 1]
    const float* background;         // [B, 3]
    const float* near;               // [B]
};

struct PackedCompositeResults {
    float* rgb;       // [B, 3]
    float* distance;  // [B]
    float* acc;       // [B]
    float* weights;   // [S]
};

struct PackedCompositeCotangents {
    const float* rgb;        // [B, 3], dL/d output
    const float* distance;   // [B]
    const float* acc;        // [B]
    const float* weights;    // [S]
    float* grad_rgb;         // [S, 3]
    float* grad_density;     // [S]
    float* grad_lengths;     // [S]
    float* grad_background;  // [B, 3]
};

void launch_packed_composite_forward(const PackedCompositeArguments& arguments,
                                     const PackedCompositeResults& results, Stream stream);
void launch_packed_composite_backward(const PackedCompositeArguments& arguments,
                                      const PackedCompositeCotangents& cotangents, Stream stream);

}  // namespace mipnerf
