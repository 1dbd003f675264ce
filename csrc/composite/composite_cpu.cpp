// The operators composite_forward, composite_backward and the fused composite_resample_forward on the CPU:
// checks, allocation, dispatch over dtypes. The loops are in composite_rays.h and resample_rays.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "../common/for_rays.h"
#include "../resample/resample_arguments.h"
#include "../resample/resample_rays.h"
#include "composite_arguments.h"
#include "composite_rays.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Forward {
    CompositeInputs<T> in;
    CompositeOutputs<T> out;

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const CompositeRoom<T> room(in.samples);
        for (int64_t ray = begin; ray < end; ++ray) {
            prefetch_ray(in, ray + kPrefetchRays, end);
            if (ray + kPrefetchRays < end)
                prefetch_row<true>(out.weights + (ray + kPrefetchRays) * in.samples, in.samples);
            composite_forward_ray(in, out, room, ray);
        }
    }
};

template <typename T>
struct Backward {
    CompositeInputs<T> in;
    CompositeGradients<T> grads;

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const CompositeRoom<T> room(in.samples);
        for (int64_t ray = begin; ray < end; ++ray) {
            prefetch_ray(in, ray + kPrefetchRays, end);
            if (ray + kPrefetchRays < end)
                prefetch_samples<T, true>(grads.grad_rgb, grads.grad_density, in.storage, in.samples,
                                          ray + kPrefetchRays);
            composite_backward_ray(in, grads, room, ray);
        }
    }
};

template <typename T>
struct ForwardAndResample {
    CompositeInputs<T> in;
    CompositeOutputs<T> out;
    ResampleInputs<T> resample;
    T* new_t_vals;  // [B, M]

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const CompositeRoom<T> room(in.samples);
        const Positions<T> positions(resample.num_fenceposts);
        const ResampleRoom<T> resample_room(resample, positions);
        for (int64_t first = begin; first < end; first += kResampleRays) {
            const int64_t last = std::min(first + kResampleRays, end);
            for (int64_t ray = first; ray < last; ++ray) composite_forward_ray(in, out, room, ray);
            resample_block(resample, positions, resample_room, first, last, out.weights, new_t_vals);
        }
    }
};

// Calls run(T) with a null pointer to the dtype that the loops compute in.
template <typename Run>
void with_dtype(const Tensor& t_vals, const Run& run) {
    if (t_vals.scalar_type() == ScalarType::Double)
        run(static_cast<double*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}

template <typename T>
CompositeInputs<T> inputs_of(const CompositeCall& call) {
    return {call.sizes.samples,
            storage_of(call.inputs.rgb.scalar_type()),
            call.inputs.rgb.const_data_ptr(),
            call.inputs.density.const_data_ptr(),
            data<T>(call.inputs.t_vals),
            data<T>(call.inputs.directions),
            call.options.as<T>()};
}

template <typename T>
CompositeOutputs<T> outputs_of(const CompositeTensors& out) {
    return {mutable_data<T>(out.rgb), mutable_data<T>(out.distance), mutable_data<T>(out.acc),
            mutable_data<T>(out.weights)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_forward_cpu(Tensor rgb, Tensor density, Tensor t_vals,
                                                                 Tensor directions, bool white_background,
                                                                 int64_t density_activation,
                                                                 double density_bias, int64_t rgb_activation,
                                                                 double rgb_padding) {
    const Checker check{"composite_forward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/true);
    const CompositeTensors out(t_vals, call.sizes);
    with_dtype(t_vals, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_rays<T>(call.sizes.rays, call.sizes.samples, Forward<T>{inputs_of<T>(call), outputs_of<T>(out)});
    });
    return {out.rgb, out.distance, out.acc, out.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_backward_cpu(
    std::optional<Tensor> grad_rgb, std::optional<Tensor> grad_distance, std::optional<Tensor> grad_acc,
    std::optional<Tensor> grad_weights, Tensor rgb, Tensor density, Tensor t_vals, Tensor directions,
    bool white_background, int64_t density_activation, double density_bias, int64_t rgb_activation,
    double rgb_padding, bool geometry) {
    const Checker check{"composite_backward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/true);
    const CompositeBackwardCall backward(check, call, grad_rgb, grad_distance, grad_acc, grad_weights,
                                         density, geometry);
    with_dtype(t_vals, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_rays<T>(call.sizes.rays, call.sizes.samples,
                    Backward<T>{inputs_of<T>(call), backward.pointers<CompositeGradients<T>, T, void>()});
    });
    return {backward.to.rgb, backward.to.density, backward.to.t_vals, backward.to.directions};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_resample_forward_cpu(
    Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, bool white_background,
    int64_t density_activation, double density_bias, int64_t rgb_activation, double rgb_padding,
    int64_t num_samples, std::optional<Tensor> u, double padding) {
    const Checker check{"composite_resample_forward"};
    const CompositeCall call(check, rgb, density, t_vals, directions, white_background, density_activation,
                             density_bias, rgb_activation, rgb_padding, /*allow_float64=*/true);
    const ResampleSizes resample_sizes = check_positions(check, t_vals, num_samples, u);
    if (u.has_value()) u = torch::stable::contiguous(*u);
    const CompositeTensors out(t_vals, call.sizes);
    const Tensor new_t_vals =
        torch::stable::new_empty(t_vals, {call.sizes.rays, resample_sizes.num_fenceposts});
    with_dtype(t_vals, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const CompositeInputs<T> in = inputs_of<T>(call);
        const ResampleInputs<T> resample{call.sizes.samples, resample_sizes.num_fenceposts, in.t_vals,
                                         u.has_value() ? data<T>(*u) : nullptr, padding};
        for_rays<T>(call.sizes.rays, call.sizes.samples + resample_sizes.num_fenceposts,
                    ForwardAndResample<T>{in, outputs_of<T>(out), resample, mutable_data<T>(new_t_vals)});
    });
    return {out.rgb, out.distance, out.acc, out.weights, new_t_vals};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("composite_forward", TORCH_BOX(&mipnerf::composite_forward_cpu));
    m.impl("composite_backward", TORCH_BOX(&mipnerf::composite_backward_cpu));
    m.impl("composite_resample_forward", TORCH_BOX(&mipnerf::composite_resample_forward_cpu));
}
