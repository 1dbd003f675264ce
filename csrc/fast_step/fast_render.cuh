// The CUDA kernel that renders with the fast model, all in one: a ring of rays per block.
#pragma once

#include "../march/march_device.cuh"
#include "../packed_composite/packed_composite_math.h"
#include "fast_step_device.cuh"

namespace mipnerf {

// Rows for the ring: encoding and hidden layers; the colour network's 32 inputs; the raw density, as it is
// before it becomes one of them; two flags behind them.
MIPNERF_HOST_DEVICE int render_rows(const FastSizes& sizes) {
    return encoding_rows(sizes) + kGeometryFeatures + kHarmonics + 1;
}
inline std::size_t render_bytes(const FastSizes& sizes) {
    return tile_bytes(render_rows(sizes)) + 16;
}

struct RingRay {
    MarchRay<float> march;
    RayState<float> state;
    std::int32_t index;  // negative: none yet
    bool is_done;        // and written
};

MIPNERF_DEVICE void write_ray(const MarchArguments& in, const RenderArrays& out, RingRay& ray) {
    const std::int64_t r = ray.index;
#pragma unroll
    for (int k = 0; k < 3; ++k)
        out.rgb[3 * r + k] = ray.state.rgb[k] + ray.state.transmittance * out.background[3 * r + k];
    const float acc = 1.0f - ray.state.transmittance;
    out.acc[r] = acc;
    out.distance[r] = acc > 0.0f ? ray.state.weighted_middle / acc : in.near[r];
    ray.is_done = true;
}

// Thread i of a block follows one ray at a time and takes the next of all when it is done. In a round every
// thread that has a ray brings one sample, and the block evaluates the 64 of them; so neither rays that end
// early nor empty space leave threads without work until the rays run out. A ray's result does not depend on
// who follows it.
template <typename S, int F, bool kTf32>
__global__ void __launch_bounds__(kTileThreads, 6)
    fast_render_kernel(const __grid_constant__ DeviceModel<S> model, MarchArguments in, RenderArrays out) {
    float* const rows = shared_memory<float>();
    float* const colour_inputs = rows + encoding_rows(model.networks.sizes) * kRowStride;
    std::int32_t* const flags = shared_memory<std::int32_t>(tile_bytes(render_rows(model.networks.sizes)));
    float* const raw_density = colour_inputs + (kGeometryFeatures + kHarmonics) * kRowStride;
    float* const column = rows + threadIdx.x;
    float* const colour_column = colour_inputs + threadIdx.x;
    for (int g = 0; g < kGeometryFeatures + kHarmonics; ++g) colour_column[g * kRowStride] = 0.0f;
    RingRay ray{};
    ray.index = -1;
    ray.is_done = true;
    for (;;) {
        float t0 = 0.0f, t1 = 0.0f;
        bool has_sample = false;
        while (!has_sample && ray.index < in.rays) {
            if (ray.is_done) {
                ray.index = atomic_add(out.next_ray, 1);
                if (ray.index >= in.rays) break;
                ray.march = begin_marching(in, ray.index);
                ray.state = {1.0f, {0.0f, 0.0f, 0.0f}, 0.0f};
                ray.is_done = false;
                store_harmonics<kTf32>(in.directions + 3 * static_cast<std::int64_t>(ray.index),
                                       colour_column + kGeometryFeatures * kRowStride);
            }
            has_sample = march_next(ray.march, in.layout.mask[ray.march.mask], in.masks, t0, t1);
            if (!has_sample) write_ray(in, out, ray);
        }
        const bool any = warp_any(has_sample);
        if (lane_index() == 0) flags[warp_index()] = any;
        Pack<float, 4> sample = padding_sample();
        if (has_sample) {
            const MarchSample<float> found = march_sample(ray.march, t0, t1);
            sample = {{found.mean[0], found.mean[1], found.mean[2], found.scale}};
        }
        encode_column<F, kTf32>(model, sample, column, [](int, const Pack<S, F>&) {});
        block_sync();
        if ((flags[0] | flags[1]) == 0) return;
        const TileSums<kGeometryFeatures> geometry = density_layers<kTf32>(model.networks, rows, rows);
        store_layer<kTf32, LayerEnd::kOperand>(geometry, colour_inputs);
        if (tile_x() == 0) store_samples(raw_density, geometry.of[0]);
        block_sync();
        const TileSums<8> raw = colour_layers<kTf32>(model.networks, colour_inputs, rows, rows);
        block_sync();
        store_layer<kTf32, LayerEnd::kNone>(raw, rows);
        block_sync();
        if (has_sample) {
            const float keep =
                exp_nonpositive(-(fast_density(raw_density[threadIdx.x]) * ((t1 - t0) * ray.march.norm)));
            const float weight = ray.state.transmittance * (1.0f - keep);
#pragma unroll
            for (int k = 0; k < 3; ++k) ray.state.rgb[k] += weight * fast_colour(column[k * kRowStride]);
            ray.state.weighted_middle += weight * (0.5f * (t0 + t1));
            ray.state.transmittance *= keep;
            if (!counts(ray.state.transmittance)) write_ray(in, out, ray);
        }
    }
}

template <typename S, int F>
void launch_fast_render(const DeviceModel<S>& model, const MarchArguments& rays, const RenderArrays& arrays,
                        int blocks, Stream stream) {
    const std::int64_t most = ceil_div(rays.rays, std::int64_t{kTileThreads});
    const auto fast_render =
        model.networks.tf32 ? fast_render_kernel<S, F, true> : fast_render_kernel<S, F, false>;
    MIPNERF_LAUNCH(fast_render, grid_size(std::min<std::int64_t>(most, blocks)), dim3(kTileThreads),
                   render_bytes(model.networks.sizes), stream, model, rays, arrays);
}

}  // namespace mipnerf
