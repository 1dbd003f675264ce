// The CUDA kernels of the stand-alone hash encoding. The fused step of the fast model has its own, from the
// same device functions.
#pragma once

#include "hash_encode_launch.h"
#include "hash_encode_sums.cuh"

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

// The gradient of a sample's features of a level.
template <int F>
MIPNERF_DEVICE Floats<F> gradient_of_sample(const HashEncodeArguments& in, const float* grad_features,
                                            std::int64_t sample, unsigned level) {
    return pack_to_float(load_pack<F>(grad_features + (sample * in.grid.levels + level) * F));
}

// As the forward: thread i of block (b, l) adds to the eight entries of level l that its sample lies between.
template <int F, typename Sums>
__global__ void __launch_bounds__(kHashEncodeThreads)
    hash_encode_scatter_kernel(HashEncodeArguments in, const float* grad_features, Sums sums) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kHashEncodeThreads + threadIdx.x;
    if (sample >= in.samples || !sums.takes(blockIdx.y)) return;
    const HashLevel& level = in.grid.level[blockIdx.y];
    const float kept = kept_of_sample(in, sample, level.resolution);
    if (kept == 0.0f) return;
    scatter_level<F>(level, kept, cell_of_sample(in, sample, level.resolution),
                     gradient_of_sample<F>(in, grad_features, sample, blockIdx.y), sums.of_level(blockIdx.y));
}

// As the scatter, before it: finds the largest gradient of level l.
template <int F>
__global__ void __launch_bounds__(kHashEncodeThreads)
    hash_encode_largest_kernel(HashEncodeArguments in, const float* grad_features, std::uint32_t* largest) {
    const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kHashEncodeThreads + threadIdx.x;
    std::uint32_t bits = 0;
    if (sample < in.samples) {
        const std::int32_t resolution = in.grid.level[blockIdx.y].resolution;
        const float kept = kept_of_sample(in, sample, resolution);
        if (kept != 0.0f)
            bits = largest_bits<F>(kept, cell_of_sample(in, sample, resolution),
                                   gradient_of_sample<F>(in, grad_features, sample, blockIdx.y));
    }
    raise_largest(largest + blockIdx.y, bits);
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
        const Floats<F> gradient = gradient_of_sample<F>(in, grad_features, sample, static_cast<unsigned>(l));
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
                                 const HashEncodeGradients& to, Stream stream) {
    dim3 grid = grid_size(ceil_div(in.samples, std::int64_t{kHashEncodeThreads}));
    MIPNERF_LAUNCH(hash_encode_backward_kernel<F>, grid, dim3(kHashEncodeThreads), 0, stream, in,
                   grad_features, to.points, to.scales);
    grid.y = static_cast<unsigned>(in.grid.levels);
    if (to.table_sums == nullptr) {
        MIPNERF_LAUNCH((hash_encode_scatter_kernel<F, FloatSums>), grid, dim3(kHashEncodeThreads), 0, stream,
                       in, grad_features, FloatSums{to.tables});
        return;
    }
    const FixedSums sums{to.table_sums, to.largest, in.samples, nullptr};
    MIPNERF_LAUNCH(hash_encode_largest_kernel<F>, grid, dim3(kHashEncodeThreads), 0, stream, in,
                   grad_features, to.largest);
    MIPNERF_LAUNCH((hash_encode_scatter_kernel<F, FixedSums>), grid, dim3(kHashEncodeThreads), 0, stream, in,
                   grad_features, sums);
    launch_add_sums<F>(in.grid, sums, nullptr, to.tables, stream);
}

}  // namespace mipnerf
