// The operators sparse_adam and sparse_adam_captured on CUDA.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../common/cuda_call.h"
#include "sparse_adam_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

SparseAdamArguments checked(const Checker& check, const Tensor& values, const Tensor& gradient,
                            const Tensor& moment1, const Tensor& moment2) {
    const CudaArrays arrays(check, "values", values);
    SparseAdamArguments in{};
    in.count = values.numel();
    in.values = arrays.floats_like("values", values, values);
    in.gradient = arrays.floats_like("gradient", gradient, values);
    in.moment1 = arrays.floats_like("moment1", moment1, values);
    in.moment2 = arrays.floats_like("moment2", moment2, values);
    return in;
}

void sparse_adam_cuda(Tensor values, Tensor gradient, Tensor moment1, Tensor moment2, double learning_rate,
                      double beta1, double beta2, double eps, int64_t step) {
    const Checker check{"sparse_adam"};
    const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
    SparseAdamArguments in = checked(check, values, gradient, moment1, moment2);
    check.that(step >= 1, "step", "1 or more", step);
    in.options = adam_options(learning_rate, beta1, beta2, eps, static_cast<double>(step));
    launch_sparse_adam(in, current_cuda_stream(values));
}

void sparse_adam_captured_cuda(Tensor values, Tensor gradient, Tensor moment1, Tensor moment2,
                               std::optional<Tensor> copy, Tensor learning_rate, double rate_ratio,
                               double beta1, double beta2, double eps, Tensor step) {
    const Checker check{"sparse_adam_captured"};
    const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
    SparseAdamArguments in = checked(check, values, gradient, moment1, moment2);
    CudaArrays arrays(check, "values", values);
    if (copy.has_value()) {
        check.dtype("copy", *copy, {ScalarType::Half});
        check.same_device("copy", *copy, "values", values);
        check.that(copy->numel() == in.count && copy->is_contiguous(), "copy",
                   "contiguous and as large as values", sizes_text(copy->sizes()));
        in.copy = mutable_cuda_data<Half>(*copy);
    }
    // Of these only betas and eps are used: the rest depends on the step.
    in.options = adam_options(0, beta1, beta2, eps, 1);
    in.clock = {arrays.floats("learning_rate", learning_rate, {1}, "[1]"),
                arrays.input<int64_t>("step", step, ScalarType::Long, {1}, "[1]"),
                static_cast<float>(rate_ratio), adam_decays(beta1, beta2)};
    launch_sparse_adam(in, current_cuda_stream(values));
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("sparse_adam", TORCH_BOX(&mipnerf::sparse_adam_cuda));
    m.impl("sparse_adam_captured", TORCH_BOX(&mipnerf::sparse_adam_captured_cuda));
}
