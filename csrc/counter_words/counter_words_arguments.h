// What the operator counter_words accepts, on either device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../common/checks.h"

namespace mipnerf {

inline void check_counter_words(const torch::stable::Tensor& step, const torch::stable::Tensor& rows,
                                int64_t columns) {
    using torch::headeronly::ScalarType;
    const Checker check{"counter_words"};
    check.dims("step", step, 0, "[]");
    check.dtype("step", step, {ScalarType::Long});
    check.same_device("step", step, "rows", rows);
    check.dims("rows", rows, 1, "[R]");
    check.dtype("rows", rows, {ScalarType::Long});
    check.that(columns >= 0, "columns", "0 or more", columns);
}

}  // namespace mipnerf
