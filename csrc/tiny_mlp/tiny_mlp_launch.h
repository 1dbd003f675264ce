// What the CUDA launches of the two small networks take, alone and inside the fast model's fused step.
// tiny_mlp_kernels.cuh defines them.
#pragma once

#include <algorithm>

#include "../common/device.cuh"
#include "tiny_mlp_sizes.h"

namespace mipnerf {

constexpr int kTileSamples = 64;
constexpr int kTileThreads = 64;
constexpr int kTileWidth = 64;        // widest hidden layer
constexpr int kMaxTileInputs = 96;    // of the density network
constexpr int kGradientOutputs = 32;  // columns of the transposed density_in that are done at a time
// Blocks over which weight gradients are summed: fixed, so that the sums do not depend on the GPU.
constexpr int kBackwardParts = 512;

// One array per matrix, or its gradient; colour_hidden null with one colour layer.
template <typename T>
struct FastWeights {
    T* density_in;     // [H, inputs]
    T* density_out;    // [16, H]
    T* colour_in;      // [H, 32]
    T* colour_hidden;  // [H, H]
    T* colour_out;     // [3, H]
};

MIPNERF_HOST_DEVICE int padded_inputs(const FastSizes& sizes) {
    return (sizes.inputs + 7) / 8 * 8;
}
// Rows in which the gradient of the first `encoded` inputs comes.
MIPNERF_HOST_DEVICE int gradient_rows(const FastSizes& sizes) {
    return (sizes.encoded + kGradientOutputs - 1) / kGradientOutputs * kGradientOutputs;
}

// One matrix as the layers read it. In float32 [depth, outputs], output o at column
// (o % 8) (outputs / 8) + o / 8. In TF32, rounded, fragments of mma_m16n8k8_tf32: [depth / 8, outputs / 16,
// 32 lanes, 4], of 16 outputs and 8 inputs each; 8 outputs take as much room as 16.
struct PackedMatrix {
    const float* source;
    int rows, inputs;              // of the weights that are there
    int row_stride, input_stride;  // in floats: exchanged for a transpose
    int depth, outputs;            // with padding; outputs 8, 16, 32 or 64
    int at;                        // in the packed array
};
MIPNERF_HOST_DEVICE constexpr int fragment_rows(int outputs) {
    return (outputs + 15) / 16;
}

enum class Matrix {
    kDensityIn,
    kDensityOut,
    kColourIn,
    kColourHidden,
    kColourOut,
    kColourOutT,
    kColourHiddenT,
    kGeometryT,   // of colour_in
    kHarmonicsT,  // of colour_in
    kDensityOutT,
    kDensityInT  // three matrices of 32 outputs, as far as there are inputs
};
constexpr int kMatrices = static_cast<int>(Matrix::kDensityInT) + kMaxTileInputs / kGradientOutputs;

// The matrices, forward and transposed, one after the other; H padded to 64. tf32: for the tensor cores.
struct NetworkLayout {
    PackedMatrix matrix[kMatrices];
    int total;
    bool tf32;

    NetworkLayout(const FastSizes& sizes, const FastWeights<const float>& weights, bool in_tf32)
        : matrix{}, total(0), tf32(in_tf32) {
        const int H = sizes.hidden, W = kTileWidth, C = sizes.colour_inputs(), G = kGeometryFeatures;
        int next = 0;
        const auto add = [&](const float* source, int rows, int inputs, int row_stride, int input_stride,
                             int depth, int outputs) {
            matrix[next++] = {source, rows, inputs, row_stride, input_stride, depth, outputs, total};
            total += depth * (tf32 ? 16 * fragment_rows(outputs) : outputs);
        };
        const int second = sizes.colour_layers == 2 ? W : 0;  // of no depth: takes no room
        add(weights.density_in, H, sizes.inputs, sizes.inputs, 1, padded_inputs(sizes), W);
        add(weights.density_out, G, H, H, 1, W, G);
        add(weights.colour_in, H, C, C, 1, C, W);
        add(weights.colour_hidden, H, H, H, 1, second, W);
        add(weights.colour_out, 3, H, H, 1, W, 8);
        add(weights.colour_out, H, 3, 1, H, 8, W);
        add(weights.colour_hidden, H, H, 1, H, second, W);
        add(weights.colour_in, G, H, 1, C, W, G);
        add(weights.colour_in + G, kHarmonics, H, 1, C, W, kHarmonics);
        add(weights.density_out, H, G, 1, H, G, W);
        for (int first = 0; first < kMaxTileInputs; first += kGradientOutputs)
            add(weights.density_in + first, std::min(kGradientOutputs, std::max(0, sizes.encoded - first)), H,
                1, sizes.inputs, first < gradient_rows(sizes) ? W : 0, kGradientOutputs);
    }
};

// The networks as the layers take them; tf32 as in their layout.
struct DeviceNetworks {
    FastSizes sizes;
    bool tf32;
    const float* packed;
    int at[kMatrices];

    DeviceNetworks() = default;
    DeviceNetworks(const FastSizes& given, const NetworkLayout& layout, const float* array)
        : sizes(given), tf32(layout.tf32), packed(array) {
        for (int m = 0; m < kMatrices; ++m) at[m] = layout.matrix[m].at;
    }
    MIPNERF_HOST_DEVICE const float* matrix(Matrix which, int more = 0) const {
        return packed + at[static_cast<int>(which) + more];
    }
};

void launch_pack_networks(const NetworkLayout& layout, float* packed, Stream stream);

// Sums of the parts [parts, weights] in their order; counts those that are not finite where asked to.
void launch_sum_parts(std::int64_t weights, int parts, const float* weight_parts, float* weight_sums,
                      std::int32_t* not_finite, Stream stream);

// ---- the stand-alone operator: sizes.encoded is the number of columns of features ------------------

struct TinyMlpArguments {
    std::int64_t samples;
    DeviceNetworks networks;
    const float* features;     // [S, E]
    const float* harmonics;    // [B, 16]
    const std::int64_t* rays;  // [S]
};

struct TinyMlpCotangents {
    const float* rgb;       // [S, 3], dL/d output
    const float* density;   // [S]
    float* grad_features;   // [S, E]; null: not wanted
    float* grad_harmonics;  // [B, 16], added to; null: not wanted
    float* weight_parts;    // [parts, weights]
};

void launch_tiny_mlp_forward(const TinyMlpArguments& arguments, float* rgb, float* density, Stream stream);
void launch_tiny_mlp_backward(const TinyMlpArguments& arguments, const TinyMlpCotangents& cotangents,
                              int parts, Stream stream);

}  // namespace mipnerf
