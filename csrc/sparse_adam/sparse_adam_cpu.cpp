// The operator sparse_adam on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "sparse_adam_arguments.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

struct UpdatePart {
    AdamArrays arrays;
    int64_t count;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        const int64_t begin = task * AdamArrays::kAtATime;
        arrays.update(begin, std::min(count, begin + AdamArrays::kAtATime));
    }
};

void sparse_adam_cpu(Tensor values, Tensor gradient, Tensor moment1, Tensor moment2, double learning_rate,
                     double beta1, double beta2, double eps, int64_t step) {
    const Checker check{"sparse_adam"};
    const auto array = [&](const char* name, const Tensor& tensor) {
        return checked_array_like(check, name, tensor, "values", values);
    };
    const UpdatePart update{
        {checked_adam_options(check, learning_rate, beta1, beta2, eps, step), array("values", values),
         array("gradient", gradient), array("moment1", moment1), array("moment2", moment2)},
        values.numel()};
    for_tasks((update.count + AdamArrays::kAtATime - 1) / AdamArrays::kAtATime, update);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("sparse_adam", TORCH_BOX(&mipnerf::sparse_adam_cpu));
}
