// The CUDA kernels of marching. A thread per ray: neighbours walk through the same cells.
#pragma once

#include "march_device.cuh"

namespace mipnerf {

// Thread i of block b counts the samples of ray b * kRayThreads + i.
__global__ void __launch_bounds__(kRayThreads)
    march_count_kernel(MarchArguments in, std::int32_t* counts, std::int32_t* block_totals) {
    const std::int64_t r = ray_of_thread();
    std::int32_t count = 0;
    if (ray_is_active(in.rays, in.active_rays, r)) {
        MarchRay<float> ray = begin_marching(in, r);
        const OccupancyMask& mask = in.layout.mask[ray.mask];
        float t0, t1;
        while (march_next(ray, mask, in.masks, t0, t1)) ++count;
    }
    if (r < in.rays) counts[r] = count;
    const std::int32_t sum = block_sum(count, shared_memory<std::int32_t>());
    if (threadIdx.x == 0) block_totals[blockIdx.x] = sum;
}

// Thread i of block b writes the start of ray b * kRayThreads + i, that of the last ray the end of all.
__global__ void __launch_bounds__(kRayThreads)
    ray_starts_kernel(std::int64_t rays, const std::int32_t* active_rays, const std::int32_t* counts,
                      const std::int32_t* block_totals, std::int64_t* starts, RayTotals totals) {
    const std::int64_t r = ray_of_thread();
    const std::int32_t count = r < rays ? counts[r] : 0;
    const std::int64_t start = start_of_ray(count, block_totals);
    if (r >= rays) return;
    starts[r] = start;
    if (r == rays - 1) starts[rays] = start + count;
    limit_rays(rays, active_rays, r, start, count, totals);
}

// Thread i of block b writes the samples of ray b * kRayThreads + i.
__global__ void __launch_bounds__(kRayThreads)
    march_write_kernel(MarchArguments in, const std::int64_t* starts, PackedSampleArrays out) {
    const std::int64_t r = ray_of_thread();
    if (!ray_is_active(in.rays, in.active_rays, r)) return;
    MarchRay<float> ray = begin_marching(in, r);
    const OccupancyMask& mask = in.layout.mask[ray.mask];
    const std::int64_t end = starts[r + 1];
    for (std::int64_t at = starts[r]; at < end; ++at) {
        float t0, t1;
        march_next(ray, mask, in.masks, t0, t1);
        const MarchSample<float> sample = march_sample(ray, t0, t1);
        out.rays[at] = r;
        out.t0[at] = t0;
        out.t1[at] = t1;
#pragma unroll
        for (int k = 0; k < 3; ++k) out.means[3 * at + k] = sample.mean[k];
        out.scales[at] = sample.scale;
    }
}

void launch_march_count(const MarchArguments& in, std::int32_t* counts, std::int32_t* block_totals,
                        Stream stream) {
    MIPNERF_LAUNCH(march_count_kernel, grid_size(ray_blocks(in.rays)), dim3(kRayThreads),
                   kRayThreads / kWarpSize * sizeof(std::int32_t), stream, in, counts, block_totals);
}

void launch_ray_starts(std::int64_t rays, const std::int32_t* active_rays, const std::int32_t* counts,
                       const std::int32_t* block_totals, std::int64_t* starts, const RayTotals& totals,
                       Stream stream) {
    MIPNERF_LAUNCH(ray_starts_kernel, grid_size(ray_blocks(rays)), dim3(kRayThreads), kRayStartBytes, stream,
                   rays, active_rays, counts, block_totals, starts, totals);
}

void launch_march_write(const MarchArguments& in, const std::int64_t* starts, const PackedSampleArrays& out,
                        Stream stream) {
    MIPNERF_LAUNCH(march_write_kernel, grid_size(ray_blocks(in.rays)), dim3(kRayThreads), 0, stream, in,
                   starts, out);
}

}  // namespace mipnerf
