// What the CPU and the CUDA operator frustum_ipe take, checked once and alike.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../common/checks.h"
#include "frustum_ipe_math.h"

namespace mipnerf {

struct FrustumIpeSizes {
    int64_t rays;
    int64_t intervals;
    int64_t degrees;

    int64_t features() const { return 6 * degrees; }
};

// Shapes, devices and degrees. The dtypes are each device's own business.
inline FrustumIpeSizes check_frustum_ipe(const Checker& check, const torch::stable::Tensor& t_vals,
                                         const torch::stable::Tensor& origins,
                                         const torch::stable::Tensor& directions,
                                         const torch::stable::Tensor& radii, int64_t min_deg,
                                         int64_t max_deg) {
    check.dims("t_vals", t_vals, 2, "[B, N+1]");
    const int64_t rays = t_vals.size(0);
    check.that(t_vals.size(1) >= 2, "t_vals", "of shape [B, N+1] with N at least 1",
               sizes_text(t_vals.sizes()));
    check.shape("origins", origins, {rays, 3}, "[B, 3]");
    check.shape("directions", directions, {rays, 3}, "[B, 3]");
    check.shape("radii", radii, {rays, 1}, "[B, 1]");
    check.same_device("origins", origins, "t_vals", t_vals);
    check.same_device("directions", directions, "t_vals", t_vals);
    check.same_device("radii", radii, "t_vals", t_vals);
    check.same_dtype("origins", origins, "t_vals", t_vals);
    check.same_dtype("directions", directions, "t_vals", t_vals);
    check.same_dtype("radii", radii, "t_vals", t_vals);
    check.that(min_deg >= 0, "min_deg", "0 or more", min_deg);
    check.that(max_deg > min_deg, "max_deg", "greater than min_deg (" + std::to_string(min_deg) + ")",
               max_deg);
    check.that(max_deg <= kMaxDegrees, "max_deg", "at most " + std::to_string(kMaxDegrees), max_deg);
    return {rays, t_vals.size(1) - 1, max_deg - min_deg};
}

inline void check_frustum_ipe_grad(const Checker& check, const torch::stable::Tensor& grad_features,
                                   const torch::stable::Tensor& t_vals, const FrustumIpeSizes& sizes) {
    check.shape("grad_features", grad_features, {sizes.rays, sizes.intervals, sizes.features()},
                "[B, N, 6 (max_deg - min_deg)]");
    check.same_device("grad_features", grad_features, "t_vals", t_vals);
}

}  // namespace mipnerf
