// What the CUDA launch of resampling takes. resample_kernels.cuh defines it, resample_launch.cu instantiates
// it for float.
#pragma once

#include "../common/device.cuh"

namespace mipnerf {

// The longest ray of the kernels: 32 tiles, and a CDF that fits the shared memory of a warp. Also in
// ops/composite.py and ops/resample.py.
constexpr int kMaxCudaSamples = 4096;

// t_vals [B, N+1], weights [B, N], u [B, num_fenceposts] or null for even positions, new_t_vals [B,
// num_fenceposts].
template <typename T>
void launch_resample(std::int64_t rays, int samples, int num_fenceposts, T padding, const T* t_vals,
                     const T* weights, const T* u, T* new_t_vals, Stream stream);

}  // namespace mipnerf
