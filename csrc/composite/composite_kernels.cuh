// The CUDA kernels of compositing. Every kernel: one warp per ray; a tile of 128 samples at a time, of which
// a lane owns four in a row; the sum before a lane by a scan of the warp. No shared memory (but for the
// fenceposts of the fused one).
#pragma once

#include "../resample/resample_kernels.cuh"
#include "composite_device.cuh"

namespace mipnerf {

constexpr int kCompositeWarps = 4;  // rays of a block

// ---- a tile -------------------------------------------------------------------------------------

// The samples of a lane in one tile. Beyond the end of the ray: intervals of length zero, so weights of zero.
struct LaneSamples {
    float t[kPerLane + 1];
    Floats<kPerLane> raw;
    float density[kPerLane];
    float depth[kPerLane];
    float before[kPerLane + 1];  // sums of the depths before each sample, and after the last
    float tile_sum;              // of the depths of the whole tile
};

template <bool kAligned, typename S>
MIPNERF_DEVICE LaneSamples load_samples(const CompositeArguments<S>& in, const S* density_row,
                                        const float* t_row, int first, float norm, float sum_before_tile) {
    LaneSamples samples;
    samples.raw = load_run<kAligned, kPerLane>(density_row, first, in.samples);
#pragma unroll
    for (int i = 0; i <= kPerLane; ++i) {
        const int fencepost = first + i < in.samples ? first + i : in.samples;
        samples.t[i] = load_pack<1>(t_row + fencepost).value[0];
    }
    float lane_sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        samples.density[i] =
            activate_density(samples.raw.value[i], in.options.density_activation, in.options.density_bias)
                .value;
        samples.depth[i] =
            optical_depth(samples.density[i], interval_length(samples.t[i], samples.t[i + 1], norm));
        samples.before[i] = lane_sum;
        lane_sum += samples.depth[i];
    }
    const float inclusive = warp_inclusive_sum(lane_sum);
    const float shifted = warp_shuffle_up(inclusive, 1);
    const float before_lane = sum_before_tile + (lane_index() == 0 ? 0.0f : shifted);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) samples.before[i] += before_lane;
    samples.before[kPerLane] = before_lane + lane_sum;
    samples.tile_sum = warp_shuffle(inclusive, kWarpSize - 1);
    return samples;
}

// Sample i of a run of colours, activated.
MIPNERF_DEVICE Colour colour_of_run(const CompositeOptions<float>& options, const Floats<3 * kPerLane>& raw,
                                    int i) {
    return activate_colour(options, raw.value[3 * i], raw.value[3 * i + 1], raw.value[3 * i + 2]);
}

// ---- forward ------------------------------------------------------------------------------------

// The whole of one ray. `keep(first, weights)` is handed the weights of each run as they come.
template <bool kAligned, typename S, typename Keep>
MIPNERF_DEVICE void composite_ray(const CompositeArguments<S>& in, const CompositeResults& out,
                                  std::int64_t ray, const Keep& keep) {
    const int lane = lane_index();
    const int n = in.samples;
    const S* rgb_row = in.rgb + ray * 3 * n;
    const S* density_row = in.density + ray * n;
    const float* t_row = in.t_vals + ray * (n + 1);
    const float norm = direction_norm(in.directions + 3 * ray);
    PixelSums sums;
    float sum_before_tile = 0;
    for (int tile = 0; tile < n; tile += kTile) {
        const int first = tile + kPerLane * lane;
        const Floats<3 * kPerLane> rgb = load_run<kAligned, 3 * kPerLane>(rgb_row, 3 * first, 3 * n);
        const LaneSamples samples =
            load_samples<kAligned>(in, density_row, t_row, first, norm, sum_before_tile);
        sum_before_tile += samples.tile_sum;
        Floats<kPerLane> weights;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const float w = transmittance(samples.before[i]) * opacity(samples.depth[i]);
            weights.value[i] = w;
            sums.add(w, colour_of_run(in.options, rgb, i), interval_middle(samples.t[i], samples.t[i + 1]));
        }
        store_run<kAligned>(out.weights + ray * n, first, n, weights);
        keep(first, weights);
    }
    store_pixel(sums, in.options.background, t_row[0], t_row[n], out, ray);
}

// Warp w of block b writes everything of ray b * kCompositeWarps + w.
template <typename S, bool kAligned>
__global__ void __launch_bounds__(kCompositeWarps* kWarpSize)
    composite_forward_kernel(CompositeArguments<S> in, CompositeResults out) {
    const std::int64_t ray = static_cast<std::int64_t>(blockIdx.x) * kCompositeWarps + warp_index();
    if (ray >= in.rays) return;
    composite_ray<kAligned>(in, out, ray, [](int, const Floats<kPerLane>&) {});
}

// As composite_forward_kernel, and then the new fenceposts of the same ray. The weights stay in the warp's
// shared memory, where the CDF replaces them.
template <typename S, bool kAligned>
__global__ void composite_resample_kernel(CompositeArguments<S> in, CompositeResults out,
                                          ResampleSettings settings, const float* u, float* new_t_vals) {
    const std::int64_t ray = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp_index();
    if (ray >= in.rays) return;
    const ResampleShared shared(settings.samples);
    shared.load_fenceposts(in.t_vals + ray * (settings.samples + 1), settings.samples);
    composite_ray<kAligned>(in, out, ray, [&](int first, const Floats<kPerLane>& weights) {
        if (first < settings.samples) store_pack_shared(shared.cdf + first, pack_from_float<float>(weights));
    });
    warp_sync();
    resample_ray_of_warp<true, true>(settings, shared, shared.cdf, u, new_t_vals, ray);
}

// ---- backward -----------------------------------------------------------------------------------

// dL/dw of a ray as a function of the sample, but for the distance.
template <typename S>
MIPNERF_DEVICE WeightCotangent<float> load_cotangent(const CompositeCotangents<S>& grads, float background,
                                                     std::int64_t ray) {
    WeightCotangent<float> cotangent{{0, 0, 0}, 0, 0, 0};
    if (grads.rgb != nullptr) {
#pragma unroll
        for (int k = 0; k < 3; ++k) cotangent.rgb[k] = load_pack<1>(grads.rgb + 3 * ray + k).value[0];
        cotangent.constant = -background * (cotangent.rgb[0] + cotangent.rgb[1] + cotangent.rgb[2]);
    }
    if (grads.acc != nullptr) cotangent.constant += load_pack<1>(grads.acc + ray).value[0];
    return cotangent;
}

// Warp w of block b writes the gradients of ray b * kCompositeWarps + w, last tile first. Where there are
// several tiles, or a gradient of the distance, a first pass finds the sums before each tile (lane j keeps
// that of tile j) and the distance. Of the fenceposts a lane writes the right ends of its intervals, lane 0
// of the first tile also t_0.
template <typename S, bool kAligned, bool kGeometry>
__global__ void __launch_bounds__(kCompositeWarps* kWarpSize, kAligned ? 5 : 4)
    composite_backward_kernel(CompositeArguments<S> in, CompositeCotangents<S> grads) {
    const std::int64_t ray = static_cast<std::int64_t>(blockIdx.x) * kCompositeWarps + warp_index();
    if (ray >= in.rays) return;
    const int lane = lane_index();
    const int n = in.samples;
    const S* rgb_row = in.rgb + ray * 3 * n;
    const S* density_row = in.density + ray * n;
    const float* t_row = in.t_vals + ray * (n + 1);
    const float norm = direction_norm(in.directions + 3 * ray);
    WeightCotangent<float> cotangent = load_cotangent(grads, in.options.background, ray);

    const int last_tile = (n - 1) / kTile;
    float sum_before_my_tile = 0;
    if (last_tile > 0 || grads.distance != nullptr) {
        float acc = 0, sum_middle = 0, sum = 0;
        for (int tile = 0; tile <= last_tile; ++tile) {
            if (lane == tile) sum_before_my_tile = sum;
            const LaneSamples samples =
                load_samples<kAligned>(in, density_row, t_row, tile * kTile + kPerLane * lane, norm, sum);
            sum += samples.tile_sum;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                const float w = transmittance(samples.before[i]) * opacity(samples.depth[i]);
                acc += w;
                sum_middle += w * interval_middle(samples.t[i], samples.t[i + 1]);
            }
        }
        if (grads.distance != nullptr) {
            acc = warp_sum(acc);
            const Distance<float> distance = expected_distance(
                warp_sum(sum_middle), acc, load_pack<1>(t_row).value[0], load_pack<1>(t_row + n).value[0]);
            cotangent.distance = distance.value;
            if (distance.is_inside)
                cotangent.towards_distance = load_pack<1>(grads.distance + ray).value[0] / acc;
        }
    }

    float sum_after_tile = 0;     // of w_j dL/dw_j beyond this tile
    float left_of_next_tile = 0;  // what the first interval beyond this tile gives to its left end
    float grad_norm = 0;
    for (int tile = last_tile; tile >= 0; --tile) {
        const int first = tile * kTile + kPerLane * lane;
        const Floats<3 * kPerLane> raw_rgb = load_run<kAligned, 3 * kPerLane>(rgb_row, 3 * first, 3 * n);
        const LaneSamples samples = load_samples<kAligned>(in, density_row, t_row, first, norm,
                                                           warp_shuffle(sum_before_my_tile, tile));
        float grad_weight[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const Colour colour = colour_of_run(in.options, raw_rgb, i);
            grad_weight[i] = cotangent(colour.red, colour.green, colour.blue,
                                       interval_middle(samples.t[i], samples.t[i + 1]));
        }
        if (grads.weights != nullptr) {
            const Floats<kPerLane> extra = load_run<kAligned, kPerLane>(grads.weights + ray * n, first, n);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) grad_weight[i] += extra.value[i];
        }

        float through[kPerLane + 1], weights[kPerLane], product[kPerLane];
        float lane_sum = 0;
#pragma unroll
        for (int i = 0; i <= kPerLane; ++i) through[i] = transmittance(samples.before[i]);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            weights[i] = through[i] * opacity(samples.depth[i]);
            product[i] = weights[i] * grad_weight[i];
            lane_sum += product[i];
        }
        const float inclusive = warp_reverse_inclusive_sum(lane_sum);
        const float shifted = warp_shuffle_down(inclusive, 1);
        float after = sum_after_tile + (lane == kWarpSize - 1 ? 0.0f : shifted);
        sum_after_tile += warp_shuffle(inclusive, 0);
        float grad_depth[kPerLane];
#pragma unroll
        for (int i = kPerLane - 1; i >= 0; --i) {
            grad_depth[i] = through[i + 1] * grad_weight[i] - after;
            after += product[i];
        }

        Floats<3 * kPerLane> grad_rgb;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
#pragma unroll
            for (int k = 0; k < 3; ++k) grad_rgb.value[3 * i + k] = weights[i] * cotangent.rgb[k];
        if (in.options.rgb_activation == RgbActivation::kSigmoid) {
#pragma unroll
            for (int i = 0; i < 3 * kPerLane; ++i)
                grad_rgb.value[i] *=
                    activate_rgb(raw_rgb.value[i], RgbActivation::kSigmoid, in.options.rgb_padding).slope;
        }
        store_run<kAligned>(grads.grad_rgb + ray * 3 * n, 3 * first, 3 * n, grad_rgb);

        Floats<kPerLane> grad_density;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
            grad_density.value[i] =
                grad_depth[i] *
                optical_depth_by_density(samples.density[i],
                                         interval_length(samples.t[i], samples.t[i + 1], norm)) *
                activate_density(samples.raw.value[i], in.options.density_activation, in.options.density_bias)
                    .slope;
        store_run<kAligned>(grads.grad_density + ray * n, first, n, grad_density);

        if constexpr (kGeometry) {
            float left[kPerLane + 1], right[kPerLane];
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                const float grad_length =
                    first + i < n ? grad_depth[i] * optical_depth_by_length(samples.density[i]) : 0.0f;
                const float middle = 0.5f * cotangent.towards_distance * weights[i];
                left[i] = middle - grad_length * norm;
                right[i] = middle + grad_length * norm;
                grad_norm += grad_length * (samples.t[i + 1] - samples.t[i]);
            }
            const float left_of_next_lane = warp_shuffle_down(left[0], 1);
            left[kPerLane] = lane == kWarpSize - 1 ? left_of_next_tile : left_of_next_lane;
            left_of_next_tile = warp_shuffle(left[0], 0);
            float* grad_t = grads.grad_t_vals + ray * (n + 1);
#pragma unroll
            for (int i = 0; i < kPerLane; ++i)
                if (first + i < n) grad_t[first + i + 1] = right[i] + left[i + 1];
            if (first == 0) grad_t[0] = left[0];
        }
    }
    if constexpr (kGeometry) {
        grad_norm = warp_sum(grad_norm);
        if (lane < 3)
            grads.grad_directions[3 * ray + lane] =
                norm > 0.0f ? grad_norm * load_pack<1>(in.directions + 3 * ray + lane).value[0] / norm : 0.0f;
    }
}

// ---- launches -----------------------------------------------------------------------------------

// Whether every run of four samples of every row can be moved by one instruction.
template <typename S>
bool runs_are_aligned(const CompositeArguments<S>& in) {
    return in.samples % kPerLane == 0 && is_aligned(in.rgb, kPerLane * sizeof(S)) &&
           is_aligned(in.density, kPerLane * sizeof(S));
}

template <typename S>
void launch_composite_forward(const CompositeArguments<S>& in, const CompositeResults& out, Stream stream) {
    const dim3 grid = grid_size(ceil_div(in.rays, std::int64_t{kCompositeWarps}));
    const dim3 block(kCompositeWarps * kWarpSize);
    if (runs_are_aligned(in) && is_aligned(out.weights, 16))
        MIPNERF_LAUNCH((composite_forward_kernel<S, true>), grid, block, 0, stream, in, out);
    else
        MIPNERF_LAUNCH((composite_forward_kernel<S, false>), grid, block, 0, stream, in, out);
}

template <typename S>
void launch_composite_backward(const CompositeArguments<S>& in, const CompositeCotangents<S>& grads,
                               Stream stream) {
    const dim3 grid = grid_size(ceil_div(in.rays, std::int64_t{kCompositeWarps}));
    const dim3 block(kCompositeWarps * kWarpSize);
    const bool aligned = runs_are_aligned(in) && is_aligned(grads.grad_rgb, kPerLane * sizeof(S)) &&
                         is_aligned(grads.grad_density, kPerLane * sizeof(S)) &&
                         (grads.weights == nullptr || is_aligned(grads.weights, 16));
    if (grads.grad_t_vals != nullptr) {
        if (aligned)
            MIPNERF_LAUNCH((composite_backward_kernel<S, true, true>), grid, block, 0, stream, in, grads);
        else
            MIPNERF_LAUNCH((composite_backward_kernel<S, false, true>), grid, block, 0, stream, in, grads);
    } else if (aligned) {
        MIPNERF_LAUNCH((composite_backward_kernel<S, true, false>), grid, block, 0, stream, in, grads);
    } else {
        MIPNERF_LAUNCH((composite_backward_kernel<S, false, false>), grid, block, 0, stream, in, grads);
    }
}

template <typename S>
void launch_composite_resample(const CompositeArguments<S>& in, const CompositeResults& out,
                               int num_fenceposts, float padding, const float* u, float* new_t_vals,
                               Stream stream) {
    const ResampleSettings settings(in.samples, num_fenceposts, padding);
    const int warps = resample_warps(in.samples);
    const dim3 grid = grid_size(ceil_div(in.rays, static_cast<std::int64_t>(warps)));
    const dim3 block(static_cast<unsigned>(warps * kWarpSize));
    const std::size_t bytes = static_cast<std::size_t>(warps) * ResampleShared::bytes(in.samples);
    if (runs_are_aligned(in) && is_aligned(out.weights, 16))
        MIPNERF_LAUNCH((composite_resample_kernel<S, true>), grid, block, bytes, stream, in, out, settings, u,
                       new_t_vals);
    else
        MIPNERF_LAUNCH((composite_resample_kernel<S, false>), grid, block, bytes, stream, in, out, settings,
                       u, new_t_vals);
}

}  // namespace mipnerf
