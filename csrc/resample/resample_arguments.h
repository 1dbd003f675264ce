// What the CPU and the CUDA operators that resample take, checked once and alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>

#include "../common/checks.h"

namespace mipnerf {

struct ResampleSizes {
    int64_t rays;
    int64_t samples;
    int64_t num_fenceposts;
};

inline ResampleSizes check_positions(const Checker& check, const torch::stable::Tensor& t_vals,
                                     int64_t num_samples, const std::optional<torch::stable::Tensor>& u) {
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 8;
    const int64_t rays = t_vals.size(0), samples = t_vals.size(1) - 1;
    if (num_samples < 1 || num_samples >= kMost)
        check.that(false, "num_samples", "at least 1 and less than 2^28", num_samples);
    if (samples >= kMost) check.that(false, "t_vals", "of fewer than 2^28 intervals", samples);
    if (u.has_value()) {
        check.shape("u", *u, {rays, num_samples + 1}, "[B, num_samples + 1]");
        check.same_device("u", *u, "t_vals", t_vals);
        check.same_dtype("u", *u, "t_vals", t_vals);
    }
    return {rays, samples, num_samples + 1};
}

inline ResampleSizes check_resample(const Checker& check, const torch::stable::Tensor& t_vals,
                                    const torch::stable::Tensor& weights, int64_t num_samples,
                                    const std::optional<torch::stable::Tensor>& u, bool allow_float64) {
    using torch::headeronly::ScalarType;
    check.dims("t_vals", t_vals, 2, "[B, N+1]");
    const int64_t samples = t_vals.size(1) - 1;
    if (samples < 1)
        check.that(false, "t_vals", "of shape [B, N+1] with N at least 1", sizes_text(t_vals.sizes()));
    check.shape("weights", weights, {t_vals.size(0), samples}, "[B, N]");
    check.same_device("weights", weights, "t_vals", t_vals);
    if (allow_float64)
        check.dtype("t_vals", t_vals, {ScalarType::Float, ScalarType::Double});
    else
        check.dtype("t_vals", t_vals, {ScalarType::Float});
    check.same_dtype("weights", weights, "t_vals", t_vals);
    return check_positions(check, t_vals, num_samples, u);
}

}  // namespace mipnerf
