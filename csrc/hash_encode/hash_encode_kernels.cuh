// The CUDA kernels of the stand-alone hash encoding. The fused step of the fast model has its own, from the
// same device functions.
#pragma once

#include "hash_encode_device.cuh"
#include "hash_encode_launch.h"

namespace mipnerf {

constexpr int kHashEncodeThreads = 128;

MIPNERF_DEVICE Cell<float> cell_of_sample(const HashEncodeArguments& in, std::int64_t sample,
                                          std::int32_t resolution) {
    const float* x = in.points + 3 * sample;
    return cell_of(load_pack<1>(x).value[0], load_pack<1>(x + 1).value[0], load_pack<1>(x + 2).value[0],
                   resolution);
}

MIPNERF_DEVICE float kept_of_sample(const HashEncodeArguments& in, std::int64_t sample,
                                    std::int32_t resolution) {
    return attenuation(in.attenuation, load_pack<1>(in.scales + sample).value[0],
                       static_cast<float>(resolution), in.cutoff);
}

// Thread i of block (b, l) writes the F features of level l of sample b * kHashEncodeThreads + i: a block
// stays in one level's table.
template <int F>
__global__ void __launch_bounds__(kHashEncodeThreads)
    hash_encode_forward_kernel(HashEncodeArguments in, float* features) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kHashEncodeThreads + threadIdx.x;
    if (sample >= in.samples) return;
    const HashLevel& level = in.grid.level[blockIdx.y];
    Floats<F> sum{};
    const float kept = kept_of_sample(in, sample, level.resolution);
    if (kept != 0.0f)
        sum = gather_level<F>(level, kept, cell_of_sample(in, sample, level.resolution), in.tables);
    store_pack(features + (sample * in.grid.levels + blockIdx.y) * F, pack_from_float<float>(sum));
}

// As the forward: thread i of block (b, l) adds to the eight entries of level l that its sample lies between.
// Sums of floats in no particular order.
template <int F>
__global__ void __launch_bounds__(kHashEncodeThreads)
    hash_encode_scatter_kernel(HashEncodeArguments in, const float* grad_features, float* grad_tables) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kHashEncodeThreads + threadIdx.x;
    if (sample >= in.samples) return;
    const HashLevel& level = in.grid.level[blockIdx.y];
    const float kept = kept_of_sample(in, sample, level.resolution);
    if (kept == 0.0f) return;
    const Floats<F> gradient =
        pack_to_float(load_pack<F>(grad_features + (sample * in.grid.levels + blockIdx.y) * F));
    scatter_level<F>(level, kept, cell_of_sample(in, sample, level.resolution), gradient, grad_tables);
}

// Thread i of block b writes the gradients of point and scale of sample b * kHashEncodeThreads + i, level
// after level.
template <int F>
__global__ void __launch_bounds__(kHashEncodeThreads, 6)
    hash_encode_backward_kernel(HashEncodeArguments in, const float* grad_features, float* grad_points,
                                float* grad_scales) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kHashEncodeThreads + threadIdx.x;
    if (sample >= in.samples) return;
    const float scale = load_pack<1>(in.scales + sample).value[0];
    float grad_point[3] = {0.0f, 0.0f, 0.0f}, grad_scale = 0.0f;
    for (int l = 0; l < in.grid.levels; ++l) {
        const HashLevel& level = in.grid.level[l];
        const float n = static_cast<float>(level.resolution);
        const float kept = kept_of_sample(in, sample, level.resolution);
        if (kept == 0.0f) continue;
        const Cell<float> cell = cell_of_sample(in, sample, level.resolution);
        const Floats<F> gradient =
            pack_to_float(load_pack<F>(grad_features + (sample * in.grid.levels + l) * F));
        Pack<float, F> entry[8];
#pragma unroll
        for (int corner = 0; corner < 8; ++corner)
            entry[corner] = load_pack<F>(in.tables + F * corner_entry(level, cell, corner));
        float interpolated = 0.0f;
#pragma unroll
        for (int corner = 0; corner < 8; ++corner) {
            float along = 0.0f;  // the entry's share of the gradient
#pragma unroll
            for (int f = 0; f < F; ++f) along += gradient.value[f] * entry[corner].value[f];
            interpolated += corner_weight(cell, corner) * along;
#pragma unroll
            for (int k = 0; k < 3; ++k)
                grad_point[k] += kept * n * corner_weight_derivative(cell, corner, k) * along;
        }
        grad_scale += attenuation_derivative(in.attenuation, scale, n, kept) * interpolated;
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) grad_points[3 * sample + k] = grad_point[k];
    grad_scales[sample] = grad_scale;
}

template <int F>
void launch_hash_encode_forward(const HashEncodeArguments& in, float* features, Stream stream) {
    dim3 grid = grid_size(ceil_div(in.samples, std::int64_t{kHashEncodeThreads}));
    grid.y = static_cast<unsigned>(in.grid.levels);
    MIPNERF_LAUNCH(hash_encode_forward_kernel<F>, grid, dim3(kHashEncodeThreads), 0, stream, in, features);
}

template <int F>
void launch_hash_encode_backward(const HashEncodeArguments& in, const float* grad_features,
                                 float* grad_points, float* grad_scales, float* grad_tables, Stream stream) {
    dim3 grid = grid_size(ceil_div(in.samples, std::int64_t{kHashEncodeThreads}));
    MIPNERF_LAUNCH(hash_encode_backward_kernel<F>, grid, dim3(kHashEncodeThreads), 0, stream, in,
                   grad_features, grad_points, grad_scales);
    grid.y = static_cast<unsigned>(in.grid.levels);
    MIPNERF_LAUNCH(hash_encode_scatter_kernel<F>, grid, dim3(kHashEncodeThreads), 0, stream, in,
                   grad_features, grad_tables);
}

}  // namespace mipnerf
