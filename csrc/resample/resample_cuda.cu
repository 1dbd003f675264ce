// The operator resample on CUDA: checks, allocation, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "../common/checks.h"
#include "resample_arguments.h"
#include "resample_launch.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

Tensor resample_cuda(Tensor t_vals, Tensor weights, int64_t num_samples, std::optional<Tensor> u,
                     double padding) {
    const Checker check{"resample"};
    const ResampleSizes sizes = check_resample(check, t_vals, weights, num_samples, u, false);
    check.that(sizes.samples <= kMaxCudaSamples, "t_vals",
               "of at most " + std::to_string(kMaxCudaSamples) + " intervals", sizes.samples);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    t_vals = torch::stable::contiguous(t_vals);
    weights = torch::stable::contiguous(weights);
    if (u.has_value()) u = torch::stable::contiguous(*u);
    const Tensor new_t_vals = torch::stable::new_empty(t_vals, {sizes.rays, sizes.num_fenceposts});
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t_vals.get_device_index(), &stream));
    launch_resample<float>(sizes.rays, static_cast<int>(sizes.samples),
                           static_cast<int>(sizes.num_fenceposts), static_cast<float>(padding),
                           static_cast<const float*>(t_vals.const_data_ptr()),
                           static_cast<const float*>(weights.const_data_ptr()),
                           u.has_value() ? static_cast<const float*>(u->const_data_ptr()) : nullptr,
                           static_cast<float*>(new_t_vals.mutable_data_ptr()), static_cast<Stream>(stream));
    return new_t_vals;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("resample", TORCH_BOX(&mipnerf::resample_cuda));
}
