// The CUDA kernels of the two small networks as an operator of its own; the fused step has kernels from the
// same layers (tiny_mlp_device.cuh).
#pragma once

#include "tiny_mlp_device.cuh"

namespace mipnerf {

// Thread i of the grid writes element i of the packed weights.
__global__ void __launch_bounds__(256)
    pack_networks_kernel(const __grid_constant__ NetworkLayout layout, float* packed) {
    const int element = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
    if (element >= layout.total) return;
    int m = kMatrices - 1;
    while (element < layout.matrix[m].at || layout.matrix[m].depth == 0) --m;
    const PackedMatrix& matrix = layout.matrix[m];
    packed[element] = layout.tf32 ? packed_weight<true>(matrix, element - matrix.at)
                                  : packed_weight<false>(matrix, element - matrix.at);
}

constexpr int kSumThreads = 256, kSumGroups = kSumThreads / kWarpSize;

// Block b sums weights 32 b to 32 b + 31 over the parts: warp w those with index w modulo 8, in their order,
// then the warps in theirs.
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(std::int64_t weights, int parts, const float* weight_parts, float* weight_sums,
                     std::int32_t* not_finite) {
    float* const of_warps = shared_memory<float>();
    const std::int64_t weight = static_cast<std::int64_t>(blockIdx.x) * kWarpSize + lane_index();
    float sum = 0.0f;
    if (weight < weights) {
#pragma unroll 8
        for (int part = warp_index(); part < parts; part += kSumGroups)
            sum += load_pack<1>(weight_parts + part * weights + weight).value[0];
    }
    of_warps[threadIdx.x] = sum;
    block_sync();
    if (warp_index() != 0 || weight >= weights) return;
    for (int group = 1; group < kSumGroups; ++group) sum += of_warps[group * kWarpSize + lane_index()];
    weight_sums[weight] = sum;
    if (not_finite != nullptr && !is_finite_number(sum)) atomic_add(not_finite, 1);
}

// Rows of shared memory: features or the last hidden layer, hidden layer, colour inputs, outputs.
MIPNERF_HOST_DEVICE int feature_rows(const FastSizes& sizes) {
    int rows = padded_inputs(sizes) > kTileWidth ? padded_inputs(sizes) : kTileWidth;
    return gradient_rows(sizes) > rows ? gradient_rows(sizes) : rows;
}
inline std::size_t tiny_mlp_bytes(const FastSizes& sizes) {
    return tile_bytes(feature_rows(sizes) + kTileWidth + sizes.colour_inputs() + 8);
}

template <bool kTf32>
MIPNERF_DEVICE void load_features(const TinyMlpArguments& in, std::int64_t own, float* column) {
    const FastSizes& sizes = in.networks.sizes;
    const int rows = padded_inputs(sizes);
    for (int k = 0; k < rows; ++k)
        column[k * kRowStride] = own < in.samples && k < sizes.encoded
                                     ? operand<kTf32>(in.features[own * sizes.encoded + k])
                                     : 0.0f;
}

template <bool kTf32>
MIPNERF_DEVICE void load_harmonics(const TinyMlpArguments& in, std::int64_t own, float* column) {
    const float* row = in.harmonics + (own < in.samples ? in.rays[own] * kHarmonics : 0);
#pragma unroll
    for (int g = 0; g < kHarmonics; ++g)
        column[g * kRowStride] = own < in.samples ? operand<kTf32>(row[g]) : 0.0f;
}

// Block b writes everything of samples 64 b to 64 b + 63.
template <bool kTf32>
__global__ void __launch_bounds__(kTileThreads, 6)
    tiny_mlp_forward_kernel(const __grid_constant__ TinyMlpArguments in, float* rgb, float* density) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples;
    float* const features = shared_memory<float>();
    float* const inputs = features + feature_rows(in.networks.sizes) * kRowStride;
    load_features<kTf32>(in, first + threadIdx.x, features + threadIdx.x);
    load_harmonics<kTf32>(in, first + threadIdx.x, inputs + kGeometryFeatures * kRowStride + threadIdx.x);
    block_sync();
    const TileSums<kGeometryFeatures> geometry = density_layers<kTf32>(in.networks, features, features);
    store_layer<kTf32, LayerEnd::kOperand>(geometry, inputs);
    block_sync();
    const TileSums<8> raw = colour_layers<kTf32>(in.networks, inputs, features, features);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const std::int64_t sample = first + tile_sample(j);
        if (sample >= in.samples) continue;
        if (tile_x() == 0) density[sample] = fast_density(geometry.of[0].value[j]);
        if (tile_x() < 3) rgb[3 * sample + tile_x()] = fast_colour(raw.of[0].value[j]);
    }
}

// Block b goes over tiles b, b + parts, ... and sums weight gradients into part b; of its samples it writes
// the gradients of the features and adds those of the harmonics to their rays.
template <bool kTf32>
__global__ void __launch_bounds__(kTileThreads, 6)
    tiny_mlp_backward_kernel(const __grid_constant__ TinyMlpArguments in, TinyMlpCotangents given) {
    const DeviceNetworks& networks = in.networks;
    const FastSizes& sizes = networks.sizes;
    float* const features = shared_memory<float>();
    float* const hidden = features + feature_rows(sizes) * kRowStride;
    float* const inputs = hidden + kTileWidth * kRowStride;
    float* const outputs = inputs + sizes.colour_inputs() * kRowStride;
    float* const last = sizes.colour_layers == 2 ? features : hidden;
    float* const part = given.weight_parts + blockIdx.x * sizes.weights();
    bool is_first = true;
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples; first < in.samples;
         first += static_cast<std::int64_t>(gridDim.x) * kTileSamples) {
        const std::int64_t own = first + threadIdx.x;
        load_features<kTf32>(in, own, features + threadIdx.x);
        load_harmonics<kTf32>(in, own, inputs + kGeometryFeatures * kRowStride + threadIdx.x);
        block_sync();
        const TileSums<kGeometryFeatures> geometry = density_layers<kTf32>(networks, features, hidden);
        store_layer<kTf32, LayerEnd::kOperand>(geometry, inputs);
        Floats<8> grad_raw{};  // of the density, in the threads that own output 0
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const std::int64_t sample = first + tile_sample(j);
            if (tile_x() == 0 && sample < in.samples && fast_density_is_free(geometry.of[0].value[j]))
                grad_raw.value[j] = given.density[sample] * fast_density(geometry.of[0].value[j]);
        }
        block_sync();
        const TileSums<8> raw = colour_layers<kTf32>(networks, inputs, hidden, last);
        Floats<8> of_outputs{};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const std::int64_t sample = first + tile_sample(j);
            if (tile_x() < 3 && sample < in.samples)
                of_outputs.value[j] = operand<kTf32>(given.rgb[3 * sample + tile_x()] *
                                                     fast_colour_derivative(raw.of[0].value[j]));
        }
        store_samples(outputs + tile_x() * kRowStride, of_outputs);
        block_sync();
        TileSums<kGeometryFeatures> sums =
            colour_layers_backward<kTf32>(networks, inputs, outputs, hidden, last, is_first, part);
        if (given.grad_harmonics != nullptr) {
            const TileSums<kHarmonics> harmonics =
                layer_sums<kTf32, kHarmonics>(networks.matrix(Matrix::kHarmonicsT), hidden, kTileWidth);
#pragma unroll
            for (int i = 0; i < kHarmonics / 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const std::int64_t sample = first + tile_sample(j);
                    if (sample < in.samples)
                        atomic_add(given.grad_harmonics + in.rays[sample] * kHarmonics + tile_x() + 8 * i,
                                   harmonics.of[i].value[j]);
                }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) sums.of[0].value[j] += grad_raw.value[j];
        block_sync();
        store_layer<kTf32, LayerEnd::kOperand>(sums, inputs);
        load_features<kTf32>(in, own, features + threadIdx.x);
        block_sync();
        density_layers_backward<kTf32>(networks, features, inputs, hidden, is_first, part);
        if (given.grad_features != nullptr && own < in.samples)
            for (int k = 0; k < sizes.encoded; ++k)
                given.grad_features[own * sizes.encoded + k] = features[k * kRowStride + threadIdx.x];
        is_first = false;
    }
    if (is_first)
        for (std::int64_t i = threadIdx.x; i < sizes.weights(); i += kTileThreads) part[i] = 0.0f;
}

void launch_pack_networks(const NetworkLayout& layout, float* packed, Stream stream) {
    MIPNERF_LAUNCH(pack_networks_kernel, grid_size(ceil_div(layout.total, 256)), dim3(256), 0, stream, layout,
                   packed);
}

void launch_sum_parts(std::int64_t weights, int parts, const float* weight_parts, float* weight_sums,
                      std::int32_t* not_finite, Stream stream) {
    MIPNERF_LAUNCH(sum_parts_kernel, grid_size(ceil_div(weights, std::int64_t{kWarpSize})), dim3(kSumThreads),
                   kSumThreads * sizeof(float), stream, weights, parts, weight_parts, weight_sums,
                   not_finite);
}

void launch_tiny_mlp_forward(const TinyMlpArguments& in, float* rgb, float* density, Stream stream) {
    const FastSizes& sizes = in.networks.sizes;
    const auto tiny_mlp_forward =
        in.networks.tf32 ? tiny_mlp_forward_kernel<true> : tiny_mlp_forward_kernel<false>;
    MIPNERF_LAUNCH(tiny_mlp_forward, grid_size(ceil_div(in.samples, std::int64_t{kTileSamples})),
                   dim3(kTileThreads), tile_bytes(feature_rows(sizes) + sizes.colour_inputs()), stream, in,
                   rgb, density);
}

void launch_tiny_mlp_backward(const TinyMlpArguments& in, const TinyMlpCotangents& given, int parts,
                              Stream stream) {
    const auto tiny_mlp_backward =
        in.networks.tf32 ? tiny_mlp_backward_kernel<true> : tiny_mlp_backward_kernel<false>;
    MIPNERF_LAUNCH(tiny_mlp_backward, dim3(static_cast<unsigned>(parts)), dim3(kTileThreads),
                   tiny_mlp_bytes(in.networks.sizes), stream, in, given);
}

}  // namespace mipnerf
