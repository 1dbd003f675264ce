// The two small networks on the device: 64 samples at a time by a block of 64 threads.
//
// A tile lies in shared memory as rows, one feature of the 64 samples each, 68 floats apart (so that
// neighbouring rows start four banks apart). In a layer, thread (tx, ty) = (i % 8, i / 8) computes outputs
// tx, tx + 8, ... of samples 8 ty to 8 ty + 7: with 64 outputs, 64 sums from 2 + 2 loads of 16 bytes per
// input. Weights are read through the first-level cache in the order of NetworkLayout, where a thread's
// outputs lie side by side. Hidden layers narrower than 64 are padded with zeros, which stay zero in every
// product.
#pragma once

#include "tiny_mlp_launch.h"
#include "tiny_mlp_math.h"

namespace mipnerf {

constexpr int kRowStride = 68;

MIPNERF_HOST_DEVICE constexpr std::size_t tile_bytes(int rows) {
    return static_cast<std::size_t>(rows) * kRowStride * sizeof(float);
}

MIPNERF_DEVICE float packed_weight(const PackedMatrix& matrix, int element) {
    const int k = element / matrix.outputs, column = element % matrix.outputs,
              per_thread = matrix.outputs / 8;
    const int o = column / per_thread + 8 * (column % per_thread);
    return o < matrix.rows && k < matrix.inputs
               ? matrix.source[o * matrix.row_stride + k * matrix.input_stride]
               : 0.0f;
}

MIPNERF_DEVICE int tile_x() {
    return static_cast<int>(threadIdx.x & 7);
}
MIPNERF_DEVICE int tile_y() {
    return static_cast<int>(threadIdx.x >> 3);
}

MIPNERF_DEVICE Floats<8> load_eight(const float* row) {
    const Pack<float, 4> low = load_pack_shared<4>(row), high = load_pack_shared<4>(row + 4);
    Floats<8> y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y.value[i] = low.value[i];
        y.value[4 + i] = high.value[i];
    }
    return y;
}
MIPNERF_DEVICE void store_eight(float* row, const Floats<8>& x) {
    Pack<float, 4> low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low.value[i] = x.value[i];
        high.value[i] = x.value[4 + i];
    }
    store_pack(row, low);
    store_pack(row + 4, high);
}

// Output tx + 8 i of samples 8 ty + j.
template <int kOutputs>
struct TileSums {
    Floats<8> of[kOutputs / 8];
};

template <int kOutputs>
MIPNERF_DEVICE Floats<kOutputs / 8> load_weights(const float* weights) {
    constexpr int R = kOutputs / 8, kPack = R < 4 ? R : 4;
    Floats<R> w;
#pragma unroll
    for (int first = 0; first < R; first += kPack) {
        const Pack<float, kPack> pack = load_pack<kPack>(weights + first);
#pragma unroll
        for (int i = 0; i < kPack; ++i) w.value[first + i] = pack.value[i];
    }
    return w;
}

// sum_k weights[k, o] x[k]; x are rows of shared memory that a barrier has published.
template <int kOutputs>
MIPNERF_DEVICE_LARGE TileSums<kOutputs> layer_sums(const float* weights, const float* x, int depth) {
    constexpr int R = kOutputs / 8;
    TileSums<kOutputs> sums{};
    weights += tile_x() * R;
    x += 8 * tile_y();
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
        const Floats<8> sample = load_eight(x + k * kRowStride);
        const Floats<R> w = load_weights<kOutputs>(weights + k * kOutputs);
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sums.of[i].value[j] += w.value[i] * sample.value[j];
    }
    return sums;
}

enum class LayerEnd { kNone, kRelu, kReluGradient };

// The sums to rows y; with kReluGradient the rows hold the outputs of the ReLU before, which the gradient
// replaces where it stands. Compared so that a NaN passes: swallowed here, it would leave the loss finite.
template <LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE_LARGE void store_layer(const TileSums<kOutputs>& sums, float* y) {
#pragma unroll
    for (int i = 0; i < kOutputs / 8; ++i) {
        float* const row = y + (tile_x() + 8 * i) * kRowStride + 8 * tile_y();
        Floats<8> value = sums.of[i];
        if constexpr (kEnd == LayerEnd::kRelu) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = value.value[j] < 0.0f ? 0.0f : value.value[j];
        }
        if constexpr (kEnd == LayerEnd::kReluGradient) {
            const Floats<8> gate = load_eight(row);
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = gate.value[j] <= 0.0f ? 0.0f : value.value[j];
        }
        store_eight(row, value);
    }
}

// A whole layer from rows x to rows y, which may overlap. Barriers: before the rows are written and after.
template <LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE_LARGE void layer(const float* weights, const float* x, int depth, float* y) {
    const TileSums<kOutputs> sums = layer_sums<kOutputs>(weights, x, depth);
    block_sync();
    store_layer<kEnd>(sums, y);
    block_sync();
}

// The tile's share of a weight gradient, sum over the samples of dy[o] x[k], for outputs ty + 8 i and inputs
// first + tx + 8 j, added to `gradient` [rows, depth] (stored, where it is the first).
template <int kI, int kJ>
MIPNERF_DEVICE_LARGE void add_outer_product(const float* dy, const float* x, int rows, int depth, int first,
                                            bool is_first, float* gradient) {
    float sum[kI][kJ] = {};
    dy += tile_y() * kRowStride;
    x += (first + tile_x()) * kRowStride;
#pragma unroll 1
    for (int n = 0; n < kTileSamples; n += 4) {
        Pack<float, 4> left[kI], right[kJ];
#pragma unroll
        for (int i = 0; i < kI; ++i) left[i] = load_pack_shared<4>(dy + 8 * i * kRowStride + n);
#pragma unroll
        for (int j = 0; j < kJ; ++j) right[j] = load_pack_shared<4>(x + 8 * j * kRowStride + n);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j)
#pragma unroll
                for (int m = 0; m < 4; ++m) sum[i][j] += left[i].value[m] * right[j].value[m];
    }
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const int o = tile_y() + 8 * i, k = first + tile_x() + 8 * j;
            if (o >= rows || k >= depth) continue;
            float* const at = gradient + o * depth + k;
            *at = is_first ? sum[i][j] : *at + sum[i][j];
        }
}

// Rows of dy: 8 kI, of x: depth rounded up to 8; the padding is zero.
template <int kI>
MIPNERF_DEVICE_LARGE void add_weight_gradient(const float* dy, const float* x, int rows, int depth,
                                              bool is_first, float* gradient) {
    int first = 0;
#pragma unroll 1
    for (; first + 24 < depth; first += 32)
        add_outer_product<kI, 4>(dy, x, rows, depth, first, is_first, gradient);
#pragma unroll 1
    for (; first < depth; first += 8) add_outer_product<kI, 1>(dy, x, rows, depth, first, is_first, gradient);
}

// ---- the networks -------------------------------------------------------------------------------

// Density network from published rows of inputs to the hidden layer in rows `hidden`, which may be the same.
MIPNERF_DEVICE TileSums<kGeometryFeatures> density_layers(const DeviceNetworks& networks, const float* inputs,
                                                          float* hidden) {
    layer<LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kDensityIn), inputs,
                                       padded_inputs(networks.sizes), hidden);
    return layer_sums<kGeometryFeatures>(networks.matrix(Matrix::kDensityOut), hidden, kTileWidth);
}

// Colour network from its 32 published rows; the last hidden layer comes into rows `last`, the first into
// `hidden`. They are the same where there is one, or where nothing is differentiated; `inputs` may be too.
MIPNERF_DEVICE void hidden_colour_layers(const DeviceNetworks& networks, const float* inputs, float* hidden,
                                         float* last) {
    layer<LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kColourIn), inputs,
                                       networks.sizes.colour_inputs(), hidden);
    if (networks.sizes.colour_layers == 2)
        layer<LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kColourHidden), hidden, kTileWidth, last);
}

// The same and the raw colours.
MIPNERF_DEVICE TileSums<8> colour_layers(const DeviceNetworks& networks, const float* inputs, float* hidden,
                                         float* last) {
    hidden_colour_layers(networks, inputs, hidden, last);
    return layer_sums<8>(networks.matrix(Matrix::kColourOut), last, kTileWidth);
}

// Gradients of the colour network's weights, from 8 published rows of those of its raw outputs, added to
// `part`. The hidden rows take their gradients; the result is that of the geometry inputs.
MIPNERF_DEVICE TileSums<kGeometryFeatures> colour_layers_backward(const DeviceNetworks& networks,
                                                                  const float* inputs, const float* outputs,
                                                                  float* hidden, float* last, bool is_first,
                                                                  float* part) {
    const FastSizes& sizes = networks.sizes;
    const int H = sizes.hidden, C = sizes.colour_inputs();
    add_weight_gradient<1>(outputs, last, 3, H, is_first, part + sizes.colour_out_at());
    layer<LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kColourOutT), outputs, 8, last);
    if (sizes.colour_layers == 2) {
        add_weight_gradient<8>(last, hidden, H, H, is_first, part + sizes.colour_hidden_at());
        layer<LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kColourHiddenT), last, kTileWidth,
                                                   hidden);
    }
    add_weight_gradient<8>(hidden, inputs, H, C, is_first, part + sizes.colour_in_at());
    return layer_sums<kGeometryFeatures>(networks.matrix(Matrix::kGeometryT), hidden, kTileWidth);
}

// Gradients of the density network's weights, from 16 published rows of those of its outputs; evaluates the
// hidden layer anew. The first `encoded` rows of the inputs take their gradients, published by a barrier.
MIPNERF_DEVICE void density_layers_backward(const DeviceNetworks& networks, float* inputs,
                                            const float* outputs, float* hidden, bool is_first, float* part) {
    const FastSizes& sizes = networks.sizes;
    layer<LayerEnd::kRelu, kTileWidth>(networks.matrix(Matrix::kDensityIn), inputs, padded_inputs(sizes),
                                       hidden);
    add_weight_gradient<2>(outputs, hidden, kGeometryFeatures, sizes.hidden, is_first,
                           part + sizes.density_out_at());
    layer<LayerEnd::kReluGradient, kTileWidth>(networks.matrix(Matrix::kDensityOutT), outputs,
                                               kGeometryFeatures, hidden);
    add_weight_gradient<8>(hidden, inputs, sizes.hidden, sizes.inputs, is_first, part);
    block_sync();
#pragma unroll 1
    for (int first = 0; first < gradient_rows(sizes); first += kGradientOutputs)
        store_layer<LayerEnd::kNone>(
            layer_sums<kGradientOutputs>(networks.matrix(Matrix::kDensityInT, first / kGradientOutputs),
                                         hidden, kTileWidth),
            inputs + first * kRowStride);
    block_sync();
}

MIPNERF_DEVICE bool is_finite_number(float x) {
    return (float_bits(x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace mipnerf
