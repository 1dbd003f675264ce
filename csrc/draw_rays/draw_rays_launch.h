// What the CUDA launch of drawing rays takes. draw_rays_kernels.cuh defines it.
#pragma once

#include "../common/device.cuh"
#include "draw_rays_math.h"

namespace mipnerf {

struct DrawRaysArguments {
    std::int64_t count;
    const std::int32_t* active_rays;  // how many of them are drawn this time; null: all
    std::uint64_t seed, step;
    const std::int64_t* step_on_device;  // instead of step, so that a captured graph draws others; null: step
    bool random_background;
    float background;
    int channels, groups;
    const std::uint8_t* pixels;      // [P, channels]
    const std::int64_t* offsets;     // [n + 1]
    const std::int64_t* heights;     // [n]
    const std::int64_t* widths;      // [n]
    const float* c2w;                // [n, 3, 4]
    const float* focals;             // [n]
    const float* nears;              // [n]
    const float* fars;               // [n]
    const std::int64_t* order;       // [n]
    const std::int64_t* group_ends;  // [groups]
    const float* group_shares;       // [groups]
};

struct DrawnRays {
    float* origins;     // [B, 3]
    float* directions;  // [B, 3]
    float* radii;       // [B]
    float* near;        // [B]
    float* far;         // [B]
    float* phase;       // [B]
    float* background;  // [B, 3]
    float* target;      // [B, 3]
};

void launch_draw_rays(const DrawRaysArguments& arguments, const DrawnRays& rays, Stream stream);

}  // namespace mipnerf
