// The sizes of the fast model's two networks, and where their weights lie when they are taken as one array:
// host and device. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "tiny_mlp_math.h"

namespace mipnerf {

struct FastSizes {
    int encoded;        // levels x features
    int inputs;         // of the density network: encoded + 3, rounded up to a multiple of 4
    int hidden;         // a multiple of 8
    int colour_layers;  // hidden ones: 1 or 2

    MIPNERF_HOST_DEVICE int colour_inputs() const { return kGeometryFeatures + kHarmonics; }
    // The weights one after the other: density_in, density_out, colour_in, (colour_hidden), colour_out.
    MIPNERF_HOST_DEVICE int64_t density_out_at() const { return static_cast<int64_t>(hidden) * inputs; }
    MIPNERF_HOST_DEVICE int64_t colour_in_at() const {
        return density_out_at() + static_cast<int64_t>(kGeometryFeatures) * hidden;
    }
    MIPNERF_HOST_DEVICE int64_t colour_hidden_at() const {
        return colour_in_at() + static_cast<int64_t>(hidden) * colour_inputs();
    }
    MIPNERF_HOST_DEVICE int64_t colour_out_at() const {
        return colour_hidden_at() + (colour_layers == 2 ? static_cast<int64_t>(hidden) * hidden : 0);
    }
    MIPNERF_HOST_DEVICE int64_t weights() const { return colour_out_at() + 3 * static_cast<int64_t>(hidden); }
};

}  // namespace mipnerf
