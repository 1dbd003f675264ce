// The operators composite_forward, composite_backward and the fused composite_resample_forward on CUDA:
// checks, allocation, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../resample/resample_arguments.h"
#include "../resample/resample_launch.h"
#include "composite_arguments.h"
#include "composite_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Stream current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<Stream>(stream);
}

void check_cuda_samples(const Checker& check, int64_t samples) {
    check.that(samples <= kMaxCudaSamples, "t_vals",
               "of at most " + std::to_string(kMaxCudaSamples) + " intervals", samples);
}

// Calls run with a null pointer to the dtype of the samples.
template <typename Run>
void with_dtype(const Tensor& rgb, const Run& run) {
    switch (rgb.scalar_type()) {
        case ScalarType::BFloat16:
            return run(static_cast<Bfloat16*>(nullptr));
        case ScalarType::Half:
            return run(static_cast<Half*>(nullptr));
        default:
            return run(static_cast<float*>(nullptr));
    }
}

template <typename S>
CompositeArguments<S> arguments_of(const CompositeCall& call) {
    return {call.sizes.rays,
            static_cast<int>(call.sizes.samples),
            data<S>(call.inputs.rgb),
            data<S>(call.inputs.density),
            data<float>(call.inputs.t_vals),
            data<float>(call.inputs.directions),
            call.options.as<float>()};
}

CompositeResults results_of(const CompositeTensors& out) {
    return {mutable_data<float>(out.rgb), mutable_data<float>(out.distance), mutable_data<float>(out.acc),
            mutable_data<float>(out.weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_forward_cuda(Tensor rgb, Tensor density, Tensor t_vals,
                                                                  Tensor directions, bool white_background,
                                                                  int64_t density_activation,
                                                                  double density_bias, int64_t rgb_activation,
                                                                  double rgb_padding) {
    const Checker check{"composite_forward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/false);
    check_cuda_samples(check, call.sizes.samples);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    const CompositeTensors out(t_vals, call.sizes);
    with_dtype(rgb, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        launch_composite_forward<S>(arguments_of<S>(call), results_of(out), current_stream(t_vals));
    });
    return {out.rgb, out.distance, out.acc, out.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_backward_cuda(
    std::optional<Tensor> grad_rgb, std::optional<Tensor> grad_distance, std::optional<Tensor> grad_acc,
    std::optional<Tensor> grad_weights, Tensor rgb, Tensor density, Tensor t_vals, Tensor directions,
    bool white_background, int64_t density_activation, double density_bias, int64_t rgb_activation,
    double rgb_padding, bool geometry) {
    const Checker check{"composite_backward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/false);
    check_cuda_samples(check, call.sizes.samples);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    const CompositeBackwardCall backward(check, call, grad_rgb, grad_distance, grad_acc, grad_weights,
                                         density, geometry);
    with_dtype(rgb, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        launch_composite_backward<S>(arguments_of<S>(call),
                                     backward.pointers<CompositeCotangents<S>, float, S>(),
                                     current_stream(t_vals));
    });
    return {backward.to.rgb, backward.to.density, backward.to.t_vals, backward.to.directions};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_resample_forward_cuda(
    Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, bool white_background,
    int64_t density_activation, double density_bias, int64_t rgb_activation, double rgb_padding,
    int64_t num_samples, std::optional<Tensor> u, double padding) {
    const Checker check{"composite_resample_forward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/false);
    const ResampleSizes resample_sizes = check_positions(check, t_vals, num_samples, u);
    check_cuda_samples(check, call.sizes.samples);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    if (u.has_value()) u = torch::stable::contiguous(*u);
    const CompositeTensors out(t_vals, call.sizes);
    const Tensor new_t_vals =
        torch::stable::new_empty(t_vals, {call.sizes.rays, resample_sizes.num_fenceposts});
    with_dtype(rgb, [&](auto* type) {
        using S = std::remove_pointer_t<decltype(type)>;
        launch_composite_resample<S>(arguments_of<S>(call), results_of(out),
                                     static_cast<int>(resample_sizes.num_fenceposts),
                                     static_cast<float>(padding), u.has_value() ? data<float>(*u) : nullptr,
                                     mutable_data<float>(new_t_vals), current_stream(t_vals));
    });
    return {out.rgb, out.distance, out.acc, out.weights, new_t_vals};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("composite_forward", TORCH_BOX(&mipnerf::composite_forward_cuda));
    m.impl("composite_backward", TORCH_BOX(&mipnerf::composite_backward_cuda));
    m.impl("composite_resample_forward", TORCH_BOX(&mipnerf::composite_resample_forward_cuda));
}
