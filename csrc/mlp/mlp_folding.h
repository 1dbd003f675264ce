// The bottleneck and the layer above it as one, for the operators of the CPU.
#pragma once

#include <cstdint>

namespace mipnerf {

// Matrices by rows without gaps: C outputs of the view layer, W columns that the bottleneck gives it and K
// that the bottleneck reads, V of the encoded directions of B rays.
struct Folding {
    int64_t outputs, width, columns, directions, rays;
    const float* viewdirs_enc;                         // [B, V]
    const float *view_weight, *view_bias;              // [C, W + V], [C]
    const float *bottleneck_weight, *bottleneck_bias;  // [W, K], [W]
};

// folded [C, K] = view_weight[:, :W] bottleneck_weight, and of every ray what stands for the layer's bias:
// ray_biases [B, C] = view_weight[:, W:] viewdirs_enc + view_weight[:, :W] bottleneck_bias + view_bias.
void fold(const Folding& folding, float* folded, float* ray_biases);

}  // namespace mipnerf
