// The operator ray_batch on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ray_batch_arguments.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

// Rays of a task: about as many as are worth another thread.
constexpr int64_t kRaysPerTask = 1024;

RayBatchTensors ray_batch_cpu(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w,
                              Tensor focals, Tensor nears, Tensor fars, Tensor lossmults, int64_t seed,
                              Tensor step, int64_t count, bool single_image, int64_t common_size,
                              bool white_background) {
    RayBatchImages images(pixels, offsets, heights, widths, c2w, focals, nears, fars, lossmults, common_size);
    const RayBatchArguments in = images.drawn(seed, step, count, single_image, white_background);
    const RayBatchTensors rays = images.new_outputs(count);
    const RayBatchOutputs out = pointers(rays);
    torch::stable::parallel_for(0, count, kRaysPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            write_batch_ray(in, out, static_cast<uint64_t>(*in.step), row);
    });
    return rays;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("ray_batch", TORCH_BOX(&mipnerf::ray_batch_cpu));
}
