// Compositing behind the forward for inference, alike for both kernel generations: a warp takes a ray's
// samples as the network leaves them, 32 at a time, a lane each, so that colours never reach memory. The raw
// densities wait where the weights will stand, written before a barrier by the same block.
#pragma once

#include "../composite/composite_device.cuh"
#include "mlp_plan.h"

namespace mipnerf {

// What a warp knows of a ray up to some sample.
struct RayProgress {
    PixelSums sums;
    float depth = 0;  // in front of the next sample; the same in every lane
};

constexpr std::size_t kProgressBytes = 6 * sizeof(float);

// A ray longer than a tile goes on with what stands in six floats of shared memory, `stride` floats apart.
MIPNERF_DEVICE void keep_progress(const RayProgress& progress, float* place, int stride) {
    const PixelSums& sums = progress.sums;
    const float totals[6] = {warp_sum(sums.red), warp_sum(sums.green),      warp_sum(sums.blue),
                             warp_sum(sums.acc), warp_sum(sums.sum_middle), progress.depth};
    warp_sync();  // every lane has read what stood there
    if (lane_index() == 0) {
#pragma unroll
        for (int i = 0; i < 6; ++i) place[i * stride] = totals[i];
    }
    warp_sync();
}
MIPNERF_DEVICE RayProgress kept_progress(const float* place, int stride) {
    RayProgress progress;
    if (lane_index() == 0)
        progress.sums = {place[0], place[stride], place[2 * stride], place[3 * stride], place[4 * stride]};
    progress.depth = place[5 * stride];
    return progress;
}

// Samples first .. first + count - 1 of a ray, which come after those of `progress`. colour_of(i) gives the
// raw colour of sample first + i.
template <typename ColourOf>
MIPNERF_DEVICE void composite_samples(RayProgress& progress, const MlpEncoding& encoding,
                                      const MlpCompositing& out, int samples_per_ray, std::int64_t ray,
                                      int first, int count, const ColourOf& colour_of) {
    const float norm = direction_norm(encoding.directions + 3 * ray);
    const float* t = encoding.t_vals + ray * (samples_per_ray + 1) + first;
    float* weights = out.results.weights + ray * samples_per_ray + first;
#pragma unroll 1
    for (int start = 0; start < count; start += kWarpSize) {
        const int i = start + lane_index();
        const bool is_one = i < count;
        const int at = is_one ? i : count - 1;
        const float t0 = load_pack<1>(t + at).value[0], t1 = load_pack<1>(t + at + 1).value[0];
        const float raw = is_one ? load_pack_written<1>(weights + i).value[0] : 0.0f;
        const float density =
            activate_density(raw, out.options.density_activation, out.options.density_bias).value;
        const float depth = is_one ? optical_depth(density, interval_length(t0, t1, norm)) : 0.0f;
        const float inclusive = warp_inclusive_sum(depth);
        const float shifted = warp_shuffle_up(inclusive, 1);
        const float before = progress.depth + (lane_index() == 0 ? 0.0f : shifted);
        const float weight = transmittance(before) * opacity(depth);
        progress.depth += warp_shuffle(inclusive, kWarpSize - 1);
        const Colour given = colour_of(at);
        progress.sums.add(weight, activate_colour(out.options, given.red, given.green, given.blue),
                          interval_middle(t0, t1));
        if (is_one) weights[i] = weight;
    }
}

// The ray's pixel, after its last sample.
MIPNERF_DEVICE void finish_ray(const RayProgress& progress, const MlpEncoding& encoding,
                               const MlpCompositing& out, int samples_per_ray, std::int64_t ray) {
    const float* t = encoding.t_vals + ray * (samples_per_ray + 1);
    store_pixel(progress.sums, out.options.background, load_pack<1>(t).value[0],
                load_pack<1>(t + samples_per_ray).value[0], out.results, ray);
}

}  // namespace mipnerf
