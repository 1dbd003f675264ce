// The operator frustum_ipe on CUDA: checks, allocation, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "frustum_ipe_arguments.h"
#include "frustum_ipe_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Stream current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<Stream>(stream);
}

// Calls run with a null pointer to the dtype of the features.
template <typename Run>
void with_dtype(ScalarType features, const Run& run) {
    switch (features) {
        case ScalarType::BFloat16:
            return run(static_cast<Bfloat16*>(nullptr));
        case ScalarType::Half:
            return run(static_cast<Half*>(nullptr));
        default:
            return run(static_cast<float*>(nullptr));
    }
}

void check_dtypes(const Checker& check, const char* features_name, ScalarType features,
                  const Tensor& t_vals) {
    check.dtype("t_vals", t_vals, {ScalarType::Float});
    check.dtype(features_name, features, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

// The inputs side by side in memory, kept for as long as their pointers are used.
struct Contiguous {
    Tensor t_vals, origins, directions, radii;

    Contiguous(const Tensor& t_vals_in, const Tensor& origins_in, const Tensor& directions_in,
               const Tensor& radii_in)
        : t_vals(torch::stable::contiguous(t_vals_in)),
          origins(torch::stable::contiguous(origins_in)),
          directions(torch::stable::contiguous(directions_in)),
          radii(torch::stable::contiguous(radii_in)) {}

    FrustumIpeInputs inputs(const FrustumIpeSizes& sizes, int64_t min_deg, bool cylinder,
                            bool integrated) const {
        return {static_cast<const float*>(t_vals.const_data_ptr()),
                static_cast<const float*>(origins.const_data_ptr()),
                static_cast<const float*>(directions.const_data_ptr()),
                static_cast<const float*>(radii.const_data_ptr()),
                sizes.rays,
                sizes.intervals,
                static_cast<int>(min_deg),
                static_cast<int>(sizes.degrees),
                cylinder,
                integrated};
    }
};

float* floats(const Tensor& tensor) {
    return static_cast<float*>(tensor.mutable_data_ptr());
}

Tensor frustum_ipe_forward_cuda(Tensor t_vals, Tensor origins, Tensor directions, Tensor radii,
                                int64_t min_deg, int64_t max_deg, bool cylinder, bool integrated,
                                ScalarType out_dtype) {
    const Checker check{"frustum_ipe_forward"};
    check_dtypes(check, "out_dtype", out_dtype, t_vals);
    const FrustumIpeSizes sizes =
        check_frustum_ipe(check, t_vals, origins, directions, radii, min_deg, max_deg);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    const Contiguous contiguous(t_vals, origins, directions, radii);
    const Tensor features =
        torch::stable::new_empty(t_vals, {sizes.rays, sizes.intervals, sizes.features()}, out_dtype);
    with_dtype(out_dtype, [&](auto* type) {
        using Out = std::remove_pointer_t<decltype(type)>;
        launch_frustum_ipe_forward(contiguous.inputs(sizes, min_deg, cylinder, integrated),
                                   static_cast<Out*>(features.mutable_data_ptr()), current_stream(t_vals));
    });
    return features;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frustum_ipe_backward_cuda(Tensor grad_features, Tensor t_vals,
                                                                     Tensor origins, Tensor directions,
                                                                     Tensor radii, int64_t min_deg,
                                                                     int64_t max_deg, bool cylinder,
                                                                     bool integrated) {
    const Checker check{"frustum_ipe_backward"};
    check_dtypes(check, "grad_features", grad_features.scalar_type(), t_vals);
    const FrustumIpeSizes sizes =
        check_frustum_ipe(check, t_vals, origins, directions, radii, min_deg, max_deg);
    check_frustum_ipe_grad(check, grad_features, t_vals, sizes);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    const Contiguous contiguous(t_vals, origins, directions, radii);
    grad_features = torch::stable::contiguous(grad_features);
    const Tensor grad_t_vals = torch::stable::new_empty(t_vals, {sizes.rays, sizes.intervals + 1});
    const Tensor grad_origins = torch::stable::new_empty(t_vals, {sizes.rays, 3});
    const Tensor grad_directions = torch::stable::new_empty(t_vals, {sizes.rays, 3});
    const Tensor grad_radii = torch::stable::new_empty(t_vals, {sizes.rays, 1});
    const FrustumIpeGradients gradients = {floats(grad_t_vals), floats(grad_origins), floats(grad_directions),
                                           floats(grad_radii)};
    with_dtype(grad_features.scalar_type(), [&](auto* type) {
        using Out = std::remove_pointer_t<decltype(type)>;
        launch_frustum_ipe_backward(contiguous.inputs(sizes, min_deg, cylinder, integrated),
                                    static_cast<const Out*>(grad_features.const_data_ptr()), gradients,
                                    current_stream(t_vals));
    });
    return {grad_t_vals, grad_origins, grad_directions, grad_radii};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("frustum_ipe_forward", TORCH_BOX(&mipnerf::frustum_ipe_forward_cuda));
    m.impl("frustum_ipe_backward", TORCH_BOX(&mipnerf::frustum_ipe_backward_cuda));
}
