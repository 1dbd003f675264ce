// What the CUDA launch of ray_batch takes. ray_batch_kernels.cuh defines it, ray_batch_launch.cu compiles it.
#pragma once

#include "../common/device.cuh"
#include "ray_batch_math.h"

namespace mipnerf {

void launch_ray_batch(const RayBatchArguments& arguments, const RayBatchOutputs& rays, Stream stream);

}  // namespace mipnerf
