// What the CPU and the CUDA operators composite_* take, checked once and alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/checks.h"
#include "composite_math.h"

namespace mipnerf {

struct CompositeSizes {
    int64_t rays;
    int64_t samples;
};

inline CompositeOptions<double> composite_options(const Checker& check, bool white_background,
                                                  int64_t density_activation, double density_bias,
                                                  int64_t rgb_activation, double rgb_padding) {
    check.that(
        density_activation >= 0 && density_activation <= static_cast<int64_t>(DensityActivation::kRelu),
        "density_activation", "0 (none), 1 (softplus) or 2 (relu)", density_activation);
    check.that(rgb_activation >= 0 && rgb_activation <= static_cast<int64_t>(RgbActivation::kSigmoid),
               "rgb_activation", "0 (none) or 1 (sigmoid)", rgb_activation);
    return {white_background ? 1.0 : 0.0, density_bias, rgb_padding,
            static_cast<DensityActivation>(density_activation), static_cast<RgbActivation>(rgb_activation)};
}

// Shapes, devices, dtypes.
inline CompositeSizes check_composite(const Checker& check, const torch::stable::Tensor& rgb,
                                      const torch::stable::Tensor& density,
                                      const torch::stable::Tensor& t_vals,
                                      const torch::stable::Tensor& directions, bool allow_float64) {
    using torch::headeronly::ScalarType;
    check.dims("t_vals", t_vals, 2, "[B, N+1]");
    const int64_t rays = t_vals.size(0);
    const int64_t samples = t_vals.size(1) - 1;
    if (samples < 1)
        check.that(false, "t_vals", "of shape [B, N+1] with N at least 1", sizes_text(t_vals.sizes()));
    check.shape("rgb", rgb, {rays, samples, 3}, "[B, N, 3]");
    if (density.dim() == 2)
        check.shape("density", density, {rays, samples}, "[B, N]");
    else
        check.shape("density", density, {rays, samples, 1}, "[B, N, 1]");
    check.shape("directions", directions, {rays, 3}, "[B, 3]");
    check.same_device("rgb", rgb, "t_vals", t_vals);
    check.same_device("density", density, "t_vals", t_vals);
    check.same_device("directions", directions, "t_vals", t_vals);
    if (allow_float64)
        check.dtype("t_vals", t_vals, {ScalarType::Float, ScalarType::Double});
    else
        check.dtype("t_vals", t_vals, {ScalarType::Float});
    check.same_dtype("directions", directions, "t_vals", t_vals);
    if (t_vals.scalar_type() == ScalarType::Double)
        check.dtype("rgb", rgb, {ScalarType::Double});
    else
        check.dtype("rgb", rgb, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check.same_dtype("density", density, "rgb", rgb);
    return {rays, samples};
}

// One gradient of an output: contiguous, or null where the output was not used.
class OutputGradient {
  public:
    OutputGradient(const Checker& check, const char* name, const std::optional<torch::stable::Tensor>& grad,
                   std::initializer_list<int64_t> shape, const char* meaning,
                   const torch::stable::Tensor& t_vals) {
        if (!grad.has_value()) return;
        check.shape(name, *grad, shape, meaning);
        check.same_device(name, *grad, "t_vals", t_vals);
        check.same_dtype(name, *grad, "t_vals", t_vals);
        contiguous_ = grad->is_contiguous() ? *grad : torch::stable::contiguous(*grad);
    }

    template <typename T>
    const T* data() const {
        return contiguous_.has_value() ? static_cast<const T*>(contiguous_->const_data_ptr()) : nullptr;
    }

  private:
    std::optional<torch::stable::Tensor> contiguous_;
};

template <typename T>
const T* data(const torch::stable::Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const torch::stable::Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

struct ContiguousInputs {
    torch::stable::Tensor rgb, density, t_vals, directions;
};

inline ContiguousInputs contiguous_inputs(const torch::stable::Tensor& rgb,
                                          const torch::stable::Tensor& density,
                                          const torch::stable::Tensor& t_vals,
                                          const torch::stable::Tensor& directions) {
    const auto contiguous = [](const torch::stable::Tensor& tensor) {
        return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    };
    return {contiguous(rgb), contiguous(density), contiguous(t_vals), contiguous(directions)};
}

// The outputs, of the dtype of t_vals.
struct CompositeTensors {
    torch::stable::Tensor rgb, distance, acc, weights;

    CompositeTensors(const torch::stable::Tensor& t_vals, const CompositeSizes& sizes)
        : rgb(torch::stable::new_empty(t_vals, {sizes.rays, 3})),
          distance(torch::stable::new_empty(t_vals, {sizes.rays})),
          acc(torch::stable::new_empty(t_vals, {sizes.rays})),
          weights(torch::stable::new_empty(t_vals, {sizes.rays, sizes.samples})) {}
};

// The gradients of the inputs; those of the geometry have no rows where they are not wanted. Explicit sizes:
// empty_like would keep the strides of a view that counts as contiguous.
struct InputGradients {
    torch::stable::Tensor rgb, density, t_vals, directions;

    InputGradients(const torch::stable::Tensor& like_rgb, const torch::stable::Tensor& like_density,
                   const torch::stable::Tensor& like_t_vals, const CompositeSizes& sizes, bool geometry)
        : rgb(torch::stable::new_empty(like_rgb, {sizes.rays, sizes.samples, 3})),
          density(like_density.dim() == 2
                      ? torch::stable::new_empty(like_density, {sizes.rays, sizes.samples})
                      : torch::stable::new_empty(like_density, {sizes.rays, sizes.samples, 1})),
          t_vals(torch::stable::new_empty(like_t_vals, {geometry ? sizes.rays : 0, sizes.samples + 1})),
          directions(torch::stable::new_empty(like_t_vals, {geometry ? sizes.rays : 0, 3})) {}
};

// What an operator starts from on either path: its arguments checked, the inputs contiguous.
struct CompositeCall {
    CompositeSizes sizes;
    CompositeOptions<double> options;
    ContiguousInputs inputs;

    CompositeCall(const Checker& check, const torch::stable::Tensor& rgb,
                  const torch::stable::Tensor& density, const torch::stable::Tensor& t_vals,
                  const torch::stable::Tensor& directions, bool white_background, int64_t density_activation,
                  double density_bias, int64_t rgb_activation, double rgb_padding, bool allow_float64)
        : sizes(check_composite(check, rgb, density, t_vals, directions, allow_float64)),
          options(composite_options(check, white_background, density_activation, density_bias, rgb_activation,
                                    rgb_padding)),
          inputs(contiguous_inputs(rgb, density, t_vals, directions)) {}
};

// The gradients of the outputs, checked, and room for those of the inputs.
struct CompositeBackwardCall {
    OutputGradient rgb, distance, acc, weights;
    InputGradients to;
    bool geometry;

    CompositeBackwardCall(const Checker& check, const CompositeCall& call,
                          const std::optional<torch::stable::Tensor>& grad_rgb,
                          const std::optional<torch::stable::Tensor>& grad_distance,
                          const std::optional<torch::stable::Tensor>& grad_acc,
                          const std::optional<torch::stable::Tensor>& grad_weights,
                          const torch::stable::Tensor& like_density, bool geometry)
        : rgb(check, "grad_rgb", grad_rgb, {call.sizes.rays, 3}, "[B, 3]", call.inputs.t_vals),
          distance(check, "grad_distance", grad_distance, {call.sizes.rays}, "[B]", call.inputs.t_vals),
          acc(check, "grad_acc", grad_acc, {call.sizes.rays}, "[B]", call.inputs.t_vals),
          weights(check, "grad_weights", grad_weights, {call.sizes.rays, call.sizes.samples}, "[B, N]",
                  call.inputs.t_vals),
          to(call.inputs.rgb, like_density, call.inputs.t_vals, call.sizes, geometry),
          geometry(geometry) {}

    // CompositeGradients of the CPU, CompositeCotangents of CUDA: the same eight pointers.
    template <typename Pointers, typename T, typename S>
    Pointers pointers() const {
        return {rgb.data<T>(),
                distance.data<T>(),
                acc.data<T>(),
                weights.data<T>(),
                mutable_data<S>(to.rgb),
                mutable_data<S>(to.density),
                geometry ? mutable_data<T>(to.t_vals) : nullptr,
                geometry ? mutable_data<T>(to.directions) : nullptr};
    }
};

}  // namespace mipnerf
