// What the CUDA launches of marching take: the rays are walked twice, to count their samples and to write
// them where the counts before them say. march_kernels.cuh defines the launches, march_launch.cu instantiates
// them.
#pragma once

#include "../common/device.cuh"
#include "march_math.h"

namespace mipnerf {

constexpr int kRayThreads = 128;  // rays of a block

struct MarchArguments {
    std::int64_t rays;
    const std::int32_t* active_rays;  // how many of them there are this time; null: all
    MarchOptions options;
    OccupancyLayout layout;
    const std::uint32_t* masks;
    const float* origins;     // [B, 3]
    const float* directions;  // [B, 3]
    const float* radii;       // [B]
    const float* near;        // [B]
    const float* far;         // [B]
    const float* phase;       // [B]; null: 1/2
};

// How many rays fit into room for `capacity` samples: all before the first that does not.
struct RayTotals {
    std::int64_t capacity;
    std::int32_t* rays;     // [1], those that fit
    std::int32_t* samples;  // [1], of those
};

struct PackedSampleArrays {
    std::int64_t* rays;  // [S]
    float* t0;           // [S]
    float* t1;           // [S]
    float* means;        // [S, 3]
    float* scales;       // [S]
};

inline std::int64_t ray_blocks(std::int64_t rays) {
    return ceil_div(rays, std::int64_t{kRayThreads});
}

// Samples of each ray to counts [B], 0 beyond active_rays; sums of kRayThreads rays to block_totals
// [ray_blocks(B)].
void launch_march_count(const MarchArguments& arguments, std::int32_t* counts, std::int32_t* block_totals,
                        Stream stream);

// The sums before each ray to starts [B + 1]. totals.rays null: nothing is limited. active_rays as above.
void launch_ray_starts(std::int64_t rays, const std::int32_t* active_rays, const std::int32_t* counts,
                       const std::int32_t* block_totals, std::int64_t* starts, const RayTotals& totals,
                       Stream stream);

void launch_march_write(const MarchArguments& arguments, const std::int64_t* starts,
                        const PackedSampleArrays& samples, Stream stream);

}  // namespace mipnerf
