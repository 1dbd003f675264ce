// The two small networks on the device, forward and backward, by the products of tiny_mlp_products.cuh.
#pragma once

#include "tiny_mlp_products.cuh"

namespace mipnerf {

// Density network from published rows of inputs to the hidden layer in rows `hidden`, which may be the same.
template <bool kTf32>
MIPNERF_DEVICE TileSums<kGeometryFeatures> density_layers(const DeviceNetworks& networks, const float* inputs,
                                                          float* hidden) {
    layer<kTf32, LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kDensityIn), inputs,
                                              padded_inputs(networks.sizes), hidden);
    return layer_sums<kTf32, kGeometryFeatures>(networks.matrix(Matrix::kDensityOut), hidden, kTileWidth);
}

// Colour network from its 32 published rows; the last hidden layer comes into rows `last`, the first into
// `hidden`. They are the same where there is one, or where nothing is differentiated; `inputs` may be too.
template <bool kTf32>
MIPNERF_DEVICE void hidden_colour_layers(const DeviceNetworks& networks, const float* inputs, float* hidden,
                                         float* last) {
    layer<kTf32, LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kColourIn), inputs,
                                              networks.sizes.colour_inputs(), hidden);
    if (networks.sizes.colour_layers == 2)
        layer<kTf32, LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kColourHidden), hidden, kTileWidth,
                                                  last);
}

// The same and the raw colours.
template <bool kTf32>
MIPNERF_DEVICE TileSums<8> colour_layers(const DeviceNetworks& networks, const float* inputs, float* hidden,
                                         float* last) {
    hidden_colour_layers<kTf32>(networks, inputs, hidden, last);
    return layer_sums<kTf32, 8>(networks.matrix(Matrix::kColourOut), last, kTileWidth);
}

// Gradients of the colour network's weights, from 8 published rows of those of its raw outputs, added to
// `part`. The hidden rows take their gradients; the result is that of the geometry inputs.
template <bool kTf32>
MIPNERF_DEVICE TileSums<kGeometryFeatures> colour_layers_backward(const DeviceNetworks& networks,
                                                                  const float* inputs, const float* outputs,
                                                                  float* hidden, float* last, bool is_first,
                                                                  float* part) {
    const FastSizes& sizes = networks.sizes;
    const int H = sizes.hidden, C = sizes.colour_inputs();
    add_weight_gradient<kTf32, 1>(outputs, last, 3, H, is_first, part + sizes.colour_out_at());
    layer<kTf32, LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kColourOutT), outputs, 8, last);
    if (sizes.colour_layers == 2) {
        add_weight_gradient<kTf32, 8>(last, hidden, H, H, is_first, part + sizes.colour_hidden_at());
        layer<kTf32, LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kColourHiddenT), last,
                                                          kTileWidth, hidden);
    }
    add_weight_gradient<kTf32, 8>(hidden, inputs, H, C, is_first, part + sizes.colour_in_at());
    return layer_sums<kTf32, kGeometryFeatures>(networks.matrix(Matrix::kGeometryT), hidden, kTileWidth);
}

// Gradients of the density network's weights, from 16 published rows of those of its outputs; evaluates the
// hidden layer anew. The first `encoded` rows of the inputs take their gradients, published by a barrier.
template <bool kTf32>
MIPNERF_DEVICE void density_layers_backward(const DeviceNetworks& networks, float* inputs,
                                            const float* outputs, float* hidden, bool is_first, float* part) {
    const FastSizes& sizes = networks.sizes;
    layer<kTf32, LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kDensityIn), inputs,
                                              padded_inputs(sizes), hidden);
    add_weight_gradient<kTf32, 2>(outputs, hidden, kGeometryFeatures, sizes.hidden, is_first,
                                  part + sizes.density_out_at());
    layer<kTf32, LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kDensityOutT), outputs,
                                                      kGeometryFeatures, hidden);
    add_weight_gradient<kTf32, 8>(hidden, inputs, sizes.hidden, sizes.inputs, is_first, part);
    block_sync();
#pragma unroll 1
    for (int first = 0; first < gradient_rows(sizes); first += kGradientOutputs)
        store_layer<kTf32, LayerEnd::kNone>(
            layer_sums<kTf32, kGradientOutputs>(
                networks.matrix(Matrix::kDensityInT, first / kGradientOutputs), hidden, kTileWidth),
            inputs + first * kRowStride);
    block_sync();
}

MIPNERF_DEVICE bool is_finite_number(float x) {
    return (float_bits(x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace mipnerf
