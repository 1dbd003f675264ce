// What kernels with a thread per ray share: the ray of a thread, and the prefix sum over rays that gives each
// ray its place.
#pragma once

#include "march_launch.h"

namespace mipnerf {

MIPNERF_DEVICE std::int64_t ray_of_thread() {
    return static_cast<std::int64_t>(blockIdx.x) * kRayThreads + threadIdx.x;
}

MIPNERF_DEVICE bool ray_is_active(std::int64_t rays, const std::int32_t* active_rays, std::int64_t ray) {
    return ray < rays && (active_rays == nullptr || ray < *active_rays);
}

MIPNERF_DEVICE MarchRay<float> begin_marching(const MarchArguments& in, std::int64_t ray) {
    return march_begin(in.origins + 3 * ray, in.directions + 3 * ray, in.radii[ray], in.near[ray],
                       in.far[ray], in.phase == nullptr ? 0.5f : in.phase[ray], in.options);
}

// Sum of a block of kRayThreads threads, in every thread. Shared memory: a number per warp; a barrier before
// it is used again.
template <typename T>
MIPNERF_DEVICE T block_sum(T value, T* of_warps) {
    value = warp_sum(value);
    if (lane_index() == 0) of_warps[warp_index()] = value;
    block_sync();
    T sum = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < kRayThreads / kWarpSize; ++warp) sum += of_warps[warp];
    return sum;
}

// Where a ray's samples start: the totals of the blocks before, and the counts of the rays before in this
// block. The order of the sums is fixed and they are whole numbers.
MIPNERF_DEVICE std::int64_t start_of_ray(std::int32_t count, const std::int32_t* block_totals) {
    std::int64_t* of_warps = shared_memory<std::int64_t>();
    std::int32_t* own = shared_memory<std::int32_t>(kRayThreads / kWarpSize * sizeof(std::int64_t));
    std::int64_t before = 0;
    for (unsigned b = threadIdx.x; b < blockIdx.x; b += kRayThreads) before += block_totals[b];
    before = block_sum(before, of_warps);
    const std::int32_t inclusive = warp_inclusive_sum(count);
    if (lane_index() == kWarpSize - 1) own[warp_index()] = inclusive;
    block_sync();
    for (int warp = 0; warp < warp_index(); ++warp) before += own[warp];
    return before + (inclusive - count);
}
constexpr std::size_t kRayStartBytes =
    kRayThreads / kWarpSize * (sizeof(std::int64_t) + sizeof(std::int32_t));

// Writes how much fits: done by the one thread at the end of what does.
MIPNERF_DEVICE void limit_rays(std::int64_t rays, const std::int32_t* active_rays, std::int64_t ray,
                               std::int64_t start, std::int32_t count, const RayTotals& totals) {
    if (totals.rays == nullptr) return;
    const std::int64_t active = active_rays != nullptr && *active_rays < rays ? *active_rays : rays;
    const bool fits = start + count <= totals.capacity;
    if (ray < active && !fits && start <= totals.capacity) {
        *totals.rays = static_cast<std::int32_t>(ray);
        *totals.samples = static_cast<std::int32_t>(start);
    }
    if (fits && (ray == active - 1 || (ray == 0 && active == 0))) {
        *totals.rays = static_cast<std::int32_t>(active);
        *totals.samples = static_cast<std::int32_t>(start + count);
    }
}

}  // namespace mipnerf
