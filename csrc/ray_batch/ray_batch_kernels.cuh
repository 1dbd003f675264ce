// The CUDA kernel of ray_batch: a thread per ray.
#pragma once

#include "ray_batch_launch.h"

namespace mipnerf {

constexpr int kRayBatchThreads = 64;

// Thread i of block b draws and writes ray b * kRayBatchThreads + i. The step is read on the device, so a
// recorded launch follows it.
__global__ void __launch_bounds__(kRayBatchThreads)
    ray_batch_kernel(RayBatchArguments in, RayBatchOutputs out) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRayBatchThreads + threadIdx.x;
    if (row < in.count) write_batch_ray(in, out, static_cast<std::uint64_t>(*in.step), row);
}

void launch_ray_batch(const RayBatchArguments& in, const RayBatchOutputs& out, Stream stream) {
    MIPNERF_LAUNCH(ray_batch_kernel, grid_size(ceil_div(in.count, std::int64_t{kRayBatchThreads})),
                   dim3(kRayBatchThreads), 0, stream, in, out);
}

}  // namespace mipnerf
