// What Adam takes on the CPU, checked alike by the operators that run it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/checks.h"
#include "sparse_adam_blocks.h"

namespace mipnerf {

inline AdamOptions checked_adam_options(const Checker& check, double learning_rate, double beta1,
                                        double beta2, double eps, int64_t step) {
    check.that(step >= 1, "step", "1 or more", step);
    return adam_options(learning_rate, beta1, beta2, eps, static_cast<double>(step));
}

// The numbers of an array that is written: float32, contiguous, of the same shape and device as `like`.
inline float* checked_array_like(const Checker& check, const char* name, const torch::stable::Tensor& tensor,
                                 const char* like_name, const torch::stable::Tensor& like) {
    check.dtype(name, tensor, {torch::headeronly::ScalarType::Float});
    const auto sizes = tensor.sizes(), wanted = like.sizes();
    if (!std::equal(sizes.begin(), sizes.end(), wanted.begin(), wanted.end()))
        check.that(false, name, sizes_text(wanted), sizes_text(sizes));
    check.that(tensor.is_contiguous(), name, "contiguous", "a view with other strides");
    check.same_device(name, tensor, like_name, like);
    return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace mipnerf
