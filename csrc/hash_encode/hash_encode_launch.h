// What the CUDA launches of the hash encoding take. hash_encode_kernels.cuh defines them,
// hash_encode_launch.cu instantiates them for 2 and 4 features.
#pragma once

#include "../common/device.cuh"
#include "hash_encode_math.h"

namespace mipnerf {

// All arrays are contiguous; tables and what has F features a row are aligned to F floats.
struct HashEncodeArguments {
    std::int64_t samples;
    HashGrid grid;
    Attenuation attenuation;
    float cutoff;
    const float* points;  // [S, 3]
    const float* scales;  // [S]
    const float* tables;  // [entries, F]
};

template <int F>
void launch_hash_encode_forward(const HashEncodeArguments& arguments, float* features /* [S, L F] */,
                                Stream stream);

struct HashEncodeGradients {
    float* points;             // [S, 3]
    float* scales;             // [S]
    float* tables;             // [entries, F], added to
    std::int64_t* table_sums;  // [entries, F], zeros; null: sums of floats in no particular order
    std::uint32_t* largest;    // [levels], zeros, with table_sums
};

template <int F>
void launch_hash_encode_backward(const HashEncodeArguments& arguments, const float* grad_features,
                                 const HashEncodeGradients& gradients, Stream stream);

}  // namespace mipnerf
