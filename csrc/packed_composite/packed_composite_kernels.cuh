// The CUDA kernels of packed compositing: eight lanes a ray, a sample each; the optical depth before a lane
// by a scan of the eight. The four rays of a warp go on together until the longest is done.
#pragma once

#include "packed_composite_launch.h"

namespace mipnerf {

constexpr int kPackedLanes = 8;
constexpr int kPackedThreads = 128;
constexpr int kPackedRays = kPackedThreads / kPackedLanes;  // of a block

// The samples of a ray from `first` on, one per lane.
struct PackedLane {
    std::int64_t sample;
    bool counts;
    float depth, weight, before;  // before: transmittance in front of the sample
};

// `depth_before`: of the samples that counted so far; grows by those of this run.
MIPNERF_DEVICE PackedLane packed_lane(const PackedCompositeArguments& in, std::int64_t first,
                                      std::int64_t end, float& depth_before) {
    PackedLane lane;
    lane.sample = first + (lane_index() & (kPackedLanes - 1));
    const bool inside = lane.sample < end;
    lane.depth = inside ? in.density[lane.sample] * in.lengths[lane.sample] : 0.0f;
    lane.before = exp_nonpositive(-(depth_before + warp_exclusive_sum<kPackedLanes>(lane.depth)));
    lane.counts = inside && counts(lane.before);
    lane.weight = lane.counts ? lane.before * one_minus_exp_negative(lane.depth) : 0.0f;
    depth_before += warp_sum<kPackedLanes>(lane.counts ? lane.depth : 0.0f);
    return lane;
}

// The lanes of a segment own ray `ray`; a ray beyond the last has no samples and writes nothing.
struct PackedRay {
    std::int64_t ray, first, end;
    bool is_one, leads;

    MIPNERF_DEVICE explicit PackedRay(const PackedCompositeArguments& in)
        : ray(static_cast<std::int64_t>(blockIdx.x) * kPackedRays + threadIdx.x / kPackedLanes),
          is_one(ray < in.rays),
          leads(is_one && (lane_index() & (kPackedLanes - 1)) == 0) {
        first = is_one ? in.ray_starts[ray] : 0;
        end = is_one ? in.ray_starts[ray + 1] : 0;
        // Whatever the caller gave: no access outside the arrays.
        first = first < 0 ? 0 : first;
        end = end > in.samples ? in.samples : end;
    }
};

// Eight lanes write everything of one ray.
__global__ void __launch_bounds__(kPackedThreads)
    packed_composite_forward_kernel(PackedCompositeArguments in, PackedCompositeResults out) {
    const PackedRay ray(in);
    float depth_before = 0.0f, red = 0.0f, green = 0.0f, blue = 0.0f, weighted = 0.0f;
    for (std::int64_t first = ray.first; warp_any(first < ray.end); first += kPackedLanes) {
        const PackedLane lane = packed_lane(in, first, ray.end, depth_before);
        if (lane.sample < ray.end) out.weights[lane.sample] = lane.weight;
        if (!lane.counts) continue;
        red += lane.weight * in.rgb[3 * lane.sample];
        green += lane.weight * in.rgb[3 * lane.sample + 1];
        blue += lane.weight * in.rgb[3 * lane.sample + 2];
        weighted += lane.weight * in.middles[lane.sample];
    }
    red = warp_sum<kPackedLanes>(red);
    green = warp_sum<kPackedLanes>(green);
    blue = warp_sum<kPackedLanes>(blue);
    weighted = warp_sum<kPackedLanes>(weighted);
    if (!ray.leads) return;
    const float acc = one_minus_exp_negative(depth_before), through = exp_nonpositive(-depth_before);
    out.acc[ray.ray] = acc;
    out.distance[ray.ray] = acc > 0.0f ? weighted / acc : in.near[ray.ray];
    const float* background = in.background + 3 * ray.ray;
    out.rgb[3 * ray.ray] = red + through * background[0];
    out.rgb[3 * ray.ray + 1] = green + through * background[1];
    out.rgb[3 * ray.ray + 2] = blue + through * background[2];
}

// Eight lanes write the gradients of one ray: forwards for the transmittance in front of each sample, which
// grad_density keeps meanwhile (0 where the sample does not count), and for the distance; then backwards with
// the sum of what lies behind.
__global__ void __launch_bounds__(kPackedThreads)
    packed_composite_backward_kernel(PackedCompositeArguments in, PackedCompositeCotangents grads) {
    const PackedRay ray(in);
    float depth_before = 0.0f, weighted = 0.0f;
    std::int64_t last = ray.first;
    for (std::int64_t first = ray.first; warp_any(first < ray.end); first += kPackedLanes) {
        const PackedLane lane = packed_lane(in, first, ray.end, depth_before);
        if (lane.sample < ray.end) grads.grad_density[lane.sample] = lane.counts ? lane.before : 0.0f;
        if (lane.counts) weighted += lane.weight * in.middles[lane.sample];
        last = first < ray.end ? first : last;
    }
    weighted = warp_sum<kPackedLanes>(weighted);
    const float acc = one_minus_exp_negative(depth_before), through = exp_nonpositive(-depth_before);
    float grad_rgb[3] = {0, 0, 0}, background[3] = {0, 0, 0}, by_distance = 0.0f, grad_acc = 0.0f;
    const float distance = acc > 0.0f ? weighted / acc : 0.0f;
    if (ray.is_one) {
        by_distance = acc > 0.0f ? grads.distance[ray.ray] / acc : 0.0f;
        grad_acc = grads.acc[ray.ray];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            grad_rgb[k] = grads.rgb[3 * ray.ray + k];
            background[k] = in.background[3 * ray.ray + k];
        }
    }
    float behind = 0.0f;  // of w_j g_j beyond this run
    for (std::int64_t first = last; warp_any(first >= ray.first && first < ray.end); first -= kPackedLanes) {
        const std::int64_t sample = first + (lane_index() & (kPackedLanes - 1));
        const bool inside = first >= ray.first && sample < ray.end;
        const float before = inside ? grads.grad_density[sample] : 0.0f;
        const bool is_counted = counts(before);
        float g = 0.0f, depth = 0.0f;
        if (is_counted) {
            depth = in.density[sample] * in.lengths[sample];
            g = grad_acc + grads.weights[sample] + by_distance * (in.middles[sample] - distance);
#pragma unroll
            for (int k = 0; k < 3; ++k) g += grad_rgb[k] * (in.rgb[3 * sample + k] - background[k]);
        }
        const float weight = is_counted ? before * one_minus_exp_negative(depth) : 0.0f;
        const float product = is_counted ? weight * g : 0.0f;
        const float after_lane = behind + warp_reverse_exclusive_sum<kPackedLanes>(product);
        behind += warp_sum<kPackedLanes>(product);
        if (!inside) continue;
        const float by_depth = is_counted ? before * exp_nonpositive(-depth) * g - after_lane : 0.0f;
#pragma unroll
        for (int k = 0; k < 3; ++k) grads.grad_rgb[3 * sample + k] = weight * grad_rgb[k];
        grads.grad_density[sample] = is_counted ? by_depth * in.lengths[sample] : 0.0f;
        grads.grad_lengths[sample] = is_counted ? by_depth * in.density[sample] : 0.0f;
    }
    if (!ray.leads) return;
#pragma unroll
    for (int k = 0; k < 3; ++k) grads.grad_background[3 * ray.ray + k] = through * grad_rgb[k];
}

void launch_packed_composite_forward(const PackedCompositeArguments& in, const PackedCompositeResults& out,
                                     Stream stream) {
    MIPNERF_LAUNCH(packed_composite_forward_kernel, grid_size(ceil_div(in.rays, std::int64_t{kPackedRays})),
                   dim3(kPackedThreads), 0, stream, in, out);
}

void launch_packed_composite_backward(const PackedCompositeArguments& in,
                                      const PackedCompositeCotangents& grads, Stream stream) {
    MIPNERF_LAUNCH(packed_composite_backward_kernel, grid_size(ceil_div(in.rays, std::int64_t{kPackedRays})),
                   dim3(kPackedThreads), 0, stream, in, grads);
}

}  // namespace mipnerf
