// What the kernels of the fast model share: encoding and density network of a tile of samples.
#pragma once

#include "../hash_encode/hash_encode_device.cuh"
#include "../tiny_mlp/tiny_mlp_device.cuh"
#include "fast_step_launch.h"

namespace mipnerf {

// Rows that the encoding and the density network's hidden layer need.
MIPNERF_HOST_DEVICE int encoding_rows(const FastSizes& sizes) {
    return padded_inputs(sizes) > kTileWidth ? padded_inputs(sizes) : kTileWidth;
}

// The scale's inputs, and zeros up to the padded depth, into the thread's column.
template <bool kTf32, typename S>
MIPNERF_DEVICE_LARGE void store_scale_inputs(const DeviceModel<S>& model, float scale, float* column) {
    const ScaleInputs<float> extra =
        scale_inputs(scale, model.encode.scale_input, model.encode.scale_low, model.encode.scale_high);
    column += model.networks.sizes.encoded * kRowStride;
    column[0] = extra.one;  // exact in any type
    column[kRowStride] = operand<kTf32>(extra.q);
    column[2 * kRowStride] = operand<kTf32>(extra.q2);
    const int rows = padded_inputs(model.networks.sizes) - model.networks.sizes.encoded;
    for (int row = 3; row < rows; ++row) column[row * kRowStride] = 0.0f;
}

// One thread's sample into its column of the rows; keep(level, pack) is handed the features as they are kept.
// They are used as rounded, so that a backward pass that reads them back sees the same hidden layer.
template <int F, bool kTf32, typename S, typename Keep>
MIPNERF_DEVICE_LARGE void encode_column(const DeviceModel<S>& model, const Pack<float, 4>& sample,
                                        float* column, const Keep& keep) {
    for (int l = 0; l < model.grid.levels; ++l) {
        const HashLevel& level = model.grid.level[l];
        const float kept = attenuation(model.encode.attenuation, sample.value[3],
                                       static_cast<float>(level.resolution), model.encode.cutoff);
        Floats<F> features{};
        if (kept != 0.0f)
            features = gather_level<F>(
                level, kept, cell_of(sample.value[0], sample.value[1], sample.value[2], level.resolution),
                model.tables);
        const Pack<S, F> rounded = pack_from_float<S>(features);
        features = pack_to_float(rounded);
#pragma unroll
        for (int f = 0; f < F; ++f) column[(l * F + f) * kRowStride] = operand<kTf32>(features.value[f]);
        keep(l, rounded);
    }
    store_scale_inputs<kTf32>(model, sample.value[3], column);
}

// A place in the middle of the box for the padding of a tile.
MIPNERF_DEVICE Pack<float, 4> padding_sample() {
    return {{0.5f, 0.5f, 0.5f, 1.0f}};
}

template <bool kTf32>
MIPNERF_DEVICE void store_harmonics(const float* direction, float* column) {
    const float inverse = 1.0f / square_root(direction[0] * direction[0] + direction[1] * direction[1] +
                                             direction[2] * direction[2]);
    float harmonics[kHarmonics];
    spherical_harmonics(direction[0] * inverse, direction[1] * inverse, direction[2] * inverse, harmonics);
#pragma unroll
    for (int g = 0; g < kHarmonics; ++g) column[g * kRowStride] = operand<kTf32>(harmonics[g]);
}

}  // namespace mipnerf
