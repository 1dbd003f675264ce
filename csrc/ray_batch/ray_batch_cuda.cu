// The operator ray_batch on CUDA: checks, allocation, launch on the current stream.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_call.h"
#include "ray_batch_arguments.h"
#include "ray_batch_launch.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

RayBatchTensors ray_batch_cuda(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w,
                               Tensor focals, Tensor nears, Tensor fars, Tensor lossmults, int64_t seed,
                               Tensor step, int64_t count, bool single_image, int64_t common_size,
                               bool white_background) {
    const torch::stable::accelerator::DeviceGuard guard(c2w.get_device_index());
    RayBatchImages images(pixels, offsets, heights, widths, c2w, focals, nears, fars, lossmults, common_size);
    const RayBatchArguments in = images.drawn(seed, step, count, single_image, white_background);
    const RayBatchTensors rays = images.new_outputs(count);
    launch_ray_batch(in, pointers(rays), current_cuda_stream(c2w));
    return rays;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("ray_batch", TORCH_BOX(&mipnerf::ray_batch_cuda));
}
