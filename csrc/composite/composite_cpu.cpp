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

template <typename T, typename S>
struct Forward {
    CompositeInputs<T, S> in;
    CompositeOutputs<T> out;

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const CompositeRoom<T> room(in.samples);
        for (int64_t ray = begin; ray < end; ++ray) {
            prefetch_ray(in, ray + kPrefetchRays, end);
            composite_forward_ray(in, out, room, ray);
        }
    }
};

template <typename T, typename S>
struct Backward {
    CompositeInputs<T, S> in;
    CompositeGradients<T, S> grads;

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const CompositeRoom<T> room(in.samples);
        for (int64_t ray = begin; ray < end; ++ray) {
            prefetch_ray(in, ray + kPrefetchRays, end);
            composite_backward_ray(in, grads, room, ray);
        }
    }
};

template <typename T, typename S>
struct ForwardAndResample {
    CompositeInputs<T, S> in;
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

// Calls run(T, S) with null pointers to the dtype of the geometry and of the samples.
template <typename Run>
void with_dtypes(const Tensor& t_vals, const Tensor& rgb, const Run& run) {
    if (t_vals.scalar_type() == ScalarType::Double)
        return run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    float* const geometry = nullptr;
    switch (rgb.scalar_type()) {
        case ScalarType::BFloat16:
            return run(geometry, static_cast<Bfloat16Storage*>(nullptr));
        case ScalarType::Half:
            return run(geometry, static_cast<HalfStorage*>(nullptr));
        default:
            return run(geometry, static_cast<float*>(nullptr));
    }
}

template <typename T, typename S>
CompositeInputs<T, S> inputs_of(const ContiguousInputs& inputs, int64_t samples,
                                const CompositeOptions<double>& options) {
    return {samples,
            data<S>(inputs.rgb),
            data<S>(inputs.density),
            data<T>(inputs.t_vals),
            data<T>(inputs.directions),
            options.as<T>()};
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
    const CompositeSizes sizes = check_composite(check, rgb, density, t_vals, directions, true);
    const CompositeOptions<double> options = composite_options(check, white_background, density_activation,
                                                               density_bias, rgb_activation, rgb_padding);
    const ContiguousInputs inputs = contiguous_inputs(rgb, density, t_vals, directions);
    const CompositeTensors out(t_vals, sizes);
    with_dtypes(t_vals, rgb, [&](auto* geometry, auto* samples) {
        using T = std::remove_pointer_t<decltype(geometry)>;
        using S = std::remove_pointer_t<decltype(samples)>;
        for_rays(sizes.rays, sizes.samples,
                 Forward<T, S>{inputs_of<T, S>(inputs, sizes.samples, options), outputs_of<T>(out)});
    });
    return {out.rgb, out.distance, out.acc, out.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> composite_backward_cpu(
    std::optional<Tensor> grad_rgb, std::optional<Tensor> grad_distance, std::optional<Tensor> grad_acc,
    std::optional<Tensor> grad_weights, Tensor rgb, Tensor density, Tensor t_vals, Tensor directions,
    bool white_background, int64_t density_activation, double density_bias, int64_t rgb_activation,
    double rgb_padding, bool geometry) {
    const Checker check{"composite_backward"};
    const CompositeSizes sizes = check_composite(check, rgb, density, t_vals, directions, true);
    const CompositeOptions<double> options = composite_options(check, white_background, density_activation,
                                                               density_bias, rgb_activation, rgb_padding);
    const OutputGradient cotangent_rgb(check, "grad_rgb", grad_rgb, {sizes.rays, 3}, "[B, 3]", t_vals);
    const OutputGradient cotangent_distance(check, "grad_distance", grad_distance, {sizes.rays}, "[B]",
                                            t_vals);
    const OutputGradient cotangent_acc(check, "grad_acc", grad_acc, {sizes.rays}, "[B]", t_vals);
    const OutputGradient cotangent_weights(check, "grad_weights", grad_weights, {sizes.rays, sizes.samples},
                                           "[B, N]", t_vals);
    const ContiguousInputs inputs = contiguous_inputs(rgb, density, t_vals, directions);
    const InputGradients to(rgb, density, t_vals, sizes, geometry);
    with_dtypes(t_vals, rgb, [&](auto* geometry_type, auto* samples_type) {
        using T = std::remove_pointer_t<decltype(geometry_type)>;
        using S = std::remove_pointer_t<decltype(samples_type)>;
        const CompositeGradients<T, S> grads{cotangent_rgb.data<T>(),
                                             cotangent_distance.data<T>(),
                                             cotangent_acc.data<T>(),
                                             cotangent_weights.data<T>(),
                                             mutable_data<S>(to.rgb),
                                             mutable_data<S>(to.density),
                                             geometry ? mutable_data<T>(to.t_vals) : nullptr,
                                             geometry ? mutable_data<T>(to.directions) : nullptr};
        for_rays(sizes.rays, sizes.samples,
                 Backward<T, S>{inputs_of<T, S>(inputs, sizes.samples, options), grads});
    });
    return {to.rgb, to.density, to.t_vals, to.directions};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> composite_resample_forward_cpu(
    Tensor rgb, Tensor density, Tensor t_vals, Tensor directions, bool white_background,
    int64_t density_activation, double density_bias, int64_t rgb_activation, double rgb_padding,
    int64_t num_samples, std::optional<Tensor> u, double padding) {
    const Checker check{"composite_resample_forward"};
    const CompositeSizes sizes = check_composite(check, rgb, density, t_vals, directions, true);
    const ResampleSizes resample_sizes = check_positions(check, t_vals, num_samples, u);
    const CompositeOptions<double> options = composite_options(check, white_background, density_activation,
                                                               density_bias, rgb_activation, rgb_padding);
    const ContiguousInputs inputs = contiguous_inputs(rgb, density, t_vals, directions);
    if (u.has_value()) u = torch::stable::contiguous(*u);
    const CompositeTensors out(t_vals, sizes);
    const Tensor new_t_vals = torch::stable::new_empty(t_vals, {sizes.rays, resample_sizes.num_fenceposts});
    with_dtypes(t_vals, rgb, [&](auto* geometry, auto* samples) {
        using T = std::remove_pointer_t<decltype(geometry)>;
        using S = std::remove_pointer_t<decltype(samples)>;
        const CompositeInputs<T, S> in = inputs_of<T, S>(inputs, sizes.samples, options);
        const ResampleInputs<T> resample{sizes.samples, resample_sizes.num_fenceposts, in.t_vals,
                                         u.has_value() ? data<T>(*u) : nullptr, padding};
        for_rays(sizes.rays, sizes.samples + resample_sizes.num_fenceposts,
                 ForwardAndResample<T, S>{in, outputs_of<T>(out), resample, mutable_data<T>(new_t_vals)});
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
