// The CUDA kernel of drawing rays: a thread per ray.
#pragma once

#include "draw_rays_launch.h"

namespace mipnerf {

constexpr int kDrawThreads = 128;

struct ImagePixels {
    const std::int64_t* heights;
    const std::int64_t* widths;
    MIPNERF_HOST_DEVICE std::int64_t operator()(std::uint32_t image) const {
        return heights[image] * widths[image];
    }
};

// Thread i of block b draws and writes ray b * kDrawThreads + i.
__global__ void __launch_bounds__(kDrawThreads) draw_rays_kernel(DrawRaysArguments in, DrawnRays out) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
    if (row >= in.count || (in.active_rays != nullptr && row >= *in.active_rays)) return;
    const std::uint64_t step =
        in.step_on_device == nullptr ? in.step : static_cast<std::uint64_t>(*in.step_on_device);
    const PixelDraw draw = draw_pixel(in.seed, step, static_cast<std::uint32_t>(row), in.group_shares,
                                      in.group_ends, in.order, in.groups, ImagePixels{in.heights, in.widths});
    float origin[3], direction[3], behind[3], colour[3];
    pixel_ray(in.c2w + 12 * draw.image, in.heights[draw.image], in.widths[draw.image], in.focals[draw.image],
              draw.pixel, origin, direction, out.radii + row);
    out.near[row] = in.nears[draw.image];
    out.far[row] = in.fars[draw.image];
    out.phase[row] = draw.phase;
#pragma unroll
    for (int k = 0; k < 3; ++k) behind[k] = in.random_background ? draw.background[k] : in.background;
    pixel_colour(in.pixels + in.channels * (in.offsets[draw.image] + draw.pixel), in.channels, behind,
                 colour);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        out.origins[3 * row + k] = origin[k];
        out.directions[3 * row + k] = direction[k];
        out.background[3 * row + k] = behind[k];
        out.target[3 * row + k] = colour[k];
    }
}

void launch_draw_rays(const DrawRaysArguments& in, const DrawnRays& out, Stream stream) {
    MIPNERF_LAUNCH(draw_rays_kernel, grid_size(ceil_div(in.count, std::int64_t{kDrawThreads})),
                   dim3(kDrawThreads), 0, stream, in, out);
}

}  // namespace mipnerf
