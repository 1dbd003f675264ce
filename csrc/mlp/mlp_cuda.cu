// The operators of the fused network on CUDA: checks, allocation, launch on the current stream, by the
// kernels that the device is best served by.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "../composite/composite_arguments.h"
#include "mlp_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Stream current_stream(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return static_cast<Stream>(stream);
}

// Calls run with the width and a null pointer to the type of the operands.
template <typename Run>
void with_instance(int width, ScalarType dtype, const Run& run) {
    const auto with_width = [&](auto* type) {
        switch (width) {
            case 64:
                return run(std::integral_constant<int, 64>{}, type);
            case 128:
                return run(std::integral_constant<int, 128>{}, type);
            default:
                return run(std::integral_constant<int, 256>{}, type);
        }
    };
    if (dtype == ScalarType::Half)
        with_width(static_cast<Half*>(nullptr));
    else
        with_width(static_cast<Bfloat16*>(nullptr));
}

// All operators of one device take the same kernels, so that each understands what the others have packed and
// stashed.
#if defined(MIPNERF_HOPPER_KERNELS)
bool is_hopper(const Tensor& tensor) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()) !=
        cudaSuccess)
        throw std::runtime_error("mlp: the device's compute capability cannot be read");
    return major == 9;
}
#define MIPNERF_LAUNCH_MLP(operation, device, arguments, stream) \
    if (is_hopper(device))                                       \
        mlp_hopper::operation<W, T>(arguments, stream);          \
    else                                                         \
        mlp_mma::operation<W, T>(arguments, stream)
#else
#define MIPNERF_LAUNCH_MLP(operation, device, arguments, stream) mlp_mma::operation<W, T>(arguments, stream)
#endif

MlpSizes sizes_of(const Tensor& tensor, const MlpPlan& plan, int64_t samples) {
#if defined(MIPNERF_HOPPER_KERNELS)
    if (is_hopper(tensor)) return mlp_hopper::mlp_sizes(plan, samples);
#endif
    static_cast<void>(tensor);
    return mlp_mma::mlp_sizes(plan, samples);
}

MlpPlan plan_of(int64_t features, int64_t width, int64_t depth, int64_t skip_layer, int64_t view_width,
                int64_t view_depth) {
    return make_mlp_plan({static_cast<int>(features), static_cast<int>(width), static_cast<int>(depth),
                          static_cast<int>(skip_layer), view_depth > 0, static_cast<int>(view_width),
                          static_cast<int>(view_depth)});
}

// Side by side in memory, from a multiple of 16 bytes on.
Tensor aligned(const Tensor& tensor) {
    const Tensor contiguous = torch::stable::contiguous(tensor);
    return is_aligned(contiguous.const_data_ptr(), 16) ? contiguous : torch::stable::clone(contiguous);
}
std::optional<Tensor> aligned(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional<Tensor>(aligned(*tensor)) : std::nullopt;
}

const float* floats_or_null(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? data<float>(*tensor) : nullptr;
}
float* floats(const Tensor& tensor) {
    return static_cast<float*>(tensor.mutable_data_ptr());
}
Tensor new_bytes(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}
Tensor new_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
    return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// An array of bytes that another operator made.
void check_bytes(const Checker& check, const char* argument, const Tensor& tensor, int64_t bytes,
                 const Tensor& device) {
    check.dtype(argument, tensor, {ScalarType::Byte});
    check.shape(argument, tensor, {bytes}, "[bytes], as made for this network and device");
    check.same_device(argument, tensor, "features", device);
}

void check_floats(const Checker& check, const char* argument, const std::optional<Tensor>& tensor,
                  std::initializer_list<int64_t> sizes, const char* meaning, const Tensor& device) {
    if (!tensor.has_value()) return;
    check.shape(argument, *tensor, sizes, meaning);
    check.dtype(argument, *tensor, {ScalarType::Float});
    check.same_device(argument, *tensor, "features", device);
}

// How many rays these samples are of.
int64_t check_rays(const Checker& check, int64_t samples, int64_t samples_per_ray) {
    check.that(samples_per_ray >= 1 && samples_per_ray <= (int64_t{1} << 30), "samples_per_ray", "1 to 2^30",
               samples_per_ray);
    check.that(samples % samples_per_ray == 0, "features",
               "of a multiple of samples_per_ray (" + std::to_string(samples_per_ray) + ") rows", samples);
    return samples / samples_per_ray;
}

void check_ray_bias(const Checker& check, const MlpPlan& plan, const std::optional<Tensor>& ray_bias,
                    int64_t rays, const Tensor& device) {
    check.that(ray_bias.has_value() == plan.shape.has_view, "ray_bias",
               plan.shape.has_view ? "given for a network with views" : "none for a network without views",
               ray_bias.has_value() ? "a tensor" : "none");
    check_floats(check, "ray_bias", ray_bias, {rays, plan.shape.view_width}, "[rays, view_width]", device);
}

Tensor mlp_pack_cuda(Tensor parameters, int64_t features, int64_t width, int64_t depth, int64_t skip_layer,
                     int64_t view_width, int64_t view_depth, ScalarType dtype) {
    const Checker check{"mlp_pack"};
    MlpPackArguments arguments{};
    arguments.plan = plan_of(features, width, depth, skip_layer, view_width, view_depth);
    const MlpPlan& plan = arguments.plan;
    check.shape("parameters", parameters, {plan.gradients}, "[weights and biases, each at a multiple of 4]");
    check.dtype("parameters", parameters, {ScalarType::Float});
    check.dtype("dtype", dtype, {ScalarType::BFloat16, ScalarType::Half});
    const torch::stable::accelerator::DeviceGuard guard(parameters.get_device_index());
    parameters = aligned(parameters);
    for (int l = 0; l < plan.layers; ++l) {
        arguments.weights[l] = data<float>(parameters) + plan.layer[l].weight_offset;
        if (!plan.layer[l].has_ray_bias)
            arguments.biases[l] = data<float>(parameters) + plan.layer[l].bias_offset;
    }
    const Tensor packed = new_bytes(parameters, sizes_of(parameters, plan, 0).packed);
    arguments.packed = packed.mutable_data_ptr();
    with_instance(plan.shape.width, dtype, [&](auto width_constant, auto* type) {
        constexpr int W = decltype(width_constant)::value;
        using T = std::remove_pointer_t<decltype(type)>;
        MIPNERF_LAUNCH_MLP(launch_mlp_pack, parameters, arguments, current_stream(parameters));
    });
    return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_forward_cuda(Tensor features, std::optional<Tensor> ray_bias,
                                                            Tensor packed, int64_t samples_per_ray,
                                                            int64_t width, int64_t depth, int64_t skip_layer,
                                                            int64_t view_width, int64_t view_depth,
                                                            bool training) {
    const Checker check{"mlp_forward"};
    check.dims("features", features, 2, "[samples, features]");
    check.dtype("features", features, {ScalarType::BFloat16, ScalarType::Half});
    const MlpPlan plan = plan_of(features.size(1), width, depth, skip_layer, view_width, view_depth);
    const int64_t samples = features.size(0);
    const int64_t rays = check_rays(check, samples, samples_per_ray);
    check_ray_bias(check, plan, ray_bias, rays, features);
    const MlpSizes sizes = sizes_of(features, plan, samples);
    check_bytes(check, "packed", packed, sizes.packed, features);
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    features = aligned(features);
    ray_bias = aligned(ray_bias);
    packed = aligned(packed);
    const Tensor rgb = new_floats(features, {samples, 3}), density = new_floats(features, {samples});
    const Tensor activations = new_bytes(features, training ? sizes.activations : 0);
    const Tensor masks = new_bytes(features, training ? sizes.masks : 0);
    with_instance(plan.shape.width, features.scalar_type(), [&](auto width_constant, auto* type) {
        constexpr int W = decltype(width_constant)::value;
        using T = std::remove_pointer_t<decltype(type)>;
        MlpForwardArguments<T> arguments{};
        arguments.plan = plan;
        arguments.samples = samples;
        arguments.samples_per_ray = samples_per_ray;
        arguments.features = data<T>(features);
        arguments.ray_bias = floats_or_null(ray_bias);
        arguments.packed = packed.const_data_ptr();
        arguments.rgb = floats(rgb);
        arguments.density = floats(density);
        arguments.activations = training ? activations.mutable_data_ptr() : nullptr;
        arguments.masks = training ? masks.mutable_data_ptr() : nullptr;
        MIPNERF_LAUNCH_MLP(launch_mlp_forward, features, arguments, current_stream(features));
    });
    return {rgb, density, activations, masks};
}

// What the forwards that encode take; the tensors contiguous and aligned after `align`.
struct EncodedInputs {
    Tensor t_vals, origins, directions, radii;
    std::optional<Tensor> ray_bias;
    Tensor packed;
    int64_t min_deg, max_deg;
    bool cylinder, integrated;
    MlpPlan plan{};
    int64_t rays = 0, samples_per_ray = 0;

    void validate(const Checker& check, int64_t width, int64_t depth, int64_t skip_layer, int64_t view_width,
                  int64_t view_depth, ScalarType dtype) {
        check.dims("t_vals", t_vals, 2, "[B, N+1]");
        check.dtype("t_vals", t_vals, {ScalarType::Float});
        check.dtype("dtype", dtype, {ScalarType::BFloat16, ScalarType::Half});
        rays = t_vals.size(0), samples_per_ray = t_vals.size(1) - 1;
        check.that(samples_per_ray >= 1, "t_vals", "of shape [B, N+1] with N at least 1",
                   sizes_text(t_vals.sizes()));
        check_floats(check, "origins", origins, {rays, 3}, "[B, 3]", t_vals);
        check_floats(check, "directions", directions, {rays, 3}, "[B, 3]", t_vals);
        check_floats(check, "radii", radii, {rays, 1}, "[B, 1]", t_vals);
        check.that(min_deg >= 0, "min_deg", "0 or more", min_deg);
        check.that(max_deg > min_deg && max_deg <= 16, "max_deg", "above min_deg, at most 16", max_deg);
        plan = plan_of(6 * (max_deg - min_deg), width, depth, skip_layer, view_width, view_depth);
        check_rays(check, samples(), samples_per_ray);
        check_ray_bias(check, plan, ray_bias, rays, t_vals);
        check_bytes(check, "packed", packed, sizes_of(t_vals, plan, samples()).packed, t_vals);
    }
    int64_t samples() const { return rays * samples_per_ray; }

    void align() {
        t_vals = aligned(t_vals);
        origins = aligned(origins);
        directions = aligned(directions);
        radii = aligned(radii);
        ray_bias = aligned(ray_bias);
        packed = aligned(packed);
    }
    template <typename T>
    MlpForwardArguments<T> arguments() const {
        MlpForwardArguments<T> arguments{};
        arguments.plan = plan;
        arguments.samples = samples();
        arguments.samples_per_ray = samples_per_ray;
        arguments.encoding = {data<float>(t_vals), data<float>(origins),      data<float>(directions),
                              data<float>(radii),  static_cast<int>(min_deg), cylinder,
                              integrated};
        arguments.ray_bias = floats_or_null(ray_bias);
        arguments.packed = packed.const_data_ptr();
        return arguments;
    }
};

std::tuple<Tensor, Tensor> mlp_encoded_forward_cuda(Tensor t_vals, Tensor origins, Tensor directions,
                                                    Tensor radii, std::optional<Tensor> ray_bias,
                                                    Tensor packed, int64_t min_deg, int64_t max_deg,
                                                    bool cylinder, bool integrated, int64_t width,
                                                    int64_t depth, int64_t skip_layer, int64_t view_width,
                                                    int64_t view_depth, ScalarType dtype) {
    EncodedInputs in{t_vals, origins, directions, radii,    ray_bias,
                     packed, min_deg, max_deg,    cylinder, integrated};
    in.validate(Checker{"mlp_encoded_forward"}, width, depth, skip_layer, view_width, view_depth, dtype);
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    in.align();
    const Tensor rgb = new_floats(t_vals, {in.samples(), 3}), density = new_floats(t_vals, {in.samples()});
    with_instance(in.plan.shape.width, dtype, [&](auto width_constant, auto* type) {
        constexpr int W = decltype(width_constant)::value;
        using T = std::remove_pointer_t<decltype(type)>;
        MlpForwardArguments<T> arguments = in.arguments<T>();
        arguments.rgb = floats(rgb);
        arguments.density = floats(density);
        MIPNERF_LAUNCH_MLP(launch_mlp_forward, t_vals, arguments, current_stream(t_vals));
    });
    return {rgb, density};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_composited_forward_cuda(
    Tensor t_vals, Tensor origins, Tensor directions, Tensor radii, std::optional<Tensor> ray_bias,
    Tensor packed, int64_t min_deg, int64_t max_deg, bool cylinder, bool integrated, int64_t width,
    int64_t depth, int64_t skip_layer, int64_t view_width, int64_t view_depth, ScalarType dtype,
    bool white_background, int64_t density_activation, double density_bias, int64_t rgb_activation,
    double rgb_padding) {
    const Checker check{"mlp_composited_forward"};
    EncodedInputs in{t_vals, origins, directions, radii,    ray_bias,
                     packed, min_deg, max_deg,    cylinder, integrated};
    in.validate(check, width, depth, skip_layer, view_width, view_depth, dtype);
    check.that(mlp_composites(in.plan.shape), "skip_layer",
               "such that the heads of a network without views do not read the features", skip_layer);
    const CompositeOptions<float> options = composite_options(check, white_background, density_activation,
                                                              density_bias, rgb_activation, rgb_padding)
                                                .as<float>();
    const torch::stable::accelerator::DeviceGuard guard(t_vals.get_device_index());
    in.align();
    const CompositeTensors out(t_vals, {in.rays, in.samples_per_ray});
    with_instance(in.plan.shape.width, dtype, [&](auto width_constant, auto* type) {
        constexpr int W = decltype(width_constant)::value;
        using T = std::remove_pointer_t<decltype(type)>;
        MlpForwardArguments<T> arguments = in.arguments<T>();
        arguments.compositing = {
            options, {floats(out.rgb), floats(out.distance), floats(out.acc), floats(out.weights)}};
        MIPNERF_LAUNCH_MLP(launch_mlp_forward, t_vals, arguments, current_stream(t_vals));
    });
    return {out.rgb, out.distance, out.acc, out.weights};
}

std::tuple<Tensor, Tensor, Tensor> mlp_backward_cuda(
    std::optional<Tensor> grad_rgb, std::optional<Tensor> grad_density, Tensor features, Tensor packed,
    Tensor activations, Tensor masks, int64_t samples_per_ray, int64_t width, int64_t depth,
    int64_t skip_layer, int64_t view_width, int64_t view_depth, bool deterministic, bool to_features) {
    const Checker check{"mlp_backward"};
    check.dims("features", features, 2, "[samples, features]");
    check.dtype("features", features, {ScalarType::BFloat16, ScalarType::Half});
    const MlpPlan plan = plan_of(features.size(1), width, depth, skip_layer, view_width, view_depth);
    const int64_t samples = features.size(0);
    const int64_t rays = check_rays(check, samples, samples_per_ray);
    check_floats(check, "grad_rgb", grad_rgb, {samples, 3}, "[samples, 3]", features);
    check_floats(check, "grad_density", grad_density, {samples}, "[samples]", features);
    const MlpSizes sizes = sizes_of(features, plan, samples);
    check_bytes(check, "packed", packed, sizes.packed, features);
    check_bytes(check, "activations", activations, sizes.activations, features);
    check_bytes(check, "masks", masks, sizes.masks, features);
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    features = aligned(features);
    packed = aligned(packed);
    activations = aligned(activations);
    masks = aligned(masks);
    grad_rgb = aligned(grad_rgb);
    grad_density = aligned(grad_density);
    const Tensor gradients = new_floats(features, {plan.gradients});
    const Tensor ray_sums = new_floats(features, {rays, view_width});
    const Tensor grad_features = new_floats(features, {to_features ? samples : 0, features.size(1)});
    const Tensor deltas = new_bytes(features, sizes.deltas);
    const Tensor workspace = new_bytes(features, deterministic ? sizes.workspace : 0);
    with_instance(plan.shape.width, features.scalar_type(), [&](auto width_constant, auto* type) {
        constexpr int W = decltype(width_constant)::value;
        using T = std::remove_pointer_t<decltype(type)>;
        const MlpDgradArguments<T> dgrad{plan,
                                         samples,
                                         floats_or_null(grad_rgb),
                                         floats_or_null(grad_density),
                                         packed.const_data_ptr(),
                                         masks.const_data_ptr(),
                                         deltas.mutable_data_ptr(),
                                         to_features ? floats(grad_features) : nullptr};
        MIPNERF_LAUNCH_MLP(launch_mlp_dgrad, features, dgrad, current_stream(features));
        const MlpWgradArguments<T> wgrad{
            plan,
            samples,
            samples_per_ray,
            data<T>(features),
            activations.const_data_ptr(),
            deltas.const_data_ptr(),
            floats(gradients),
            plan.shape.has_view ? floats(ray_sums) : nullptr,
            deterministic && sizes.workspace > 0 ? workspace.mutable_data_ptr() : nullptr};
        MIPNERF_LAUNCH_MLP(launch_mlp_wgrad, features, wgrad, current_stream(features));
    });
    return {gradients, ray_sums, grad_features};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("mlp_pack", TORCH_BOX(&mipnerf::mlp_pack_cuda));
    m.impl("mlp_forward", TORCH_BOX(&mipnerf::mlp_forward_cuda));
    m.impl("mlp_encoded_forward", TORCH_BOX(&mipnerf::mlp_encoded_forward_cuda));
    m.impl("mlp_composited_forward", TORCH_BOX(&mipnerf::mlp_composited_forward_cuda));
    m.impl("mlp_backward", TORCH_BOX(&mipnerf::mlp_backward_cuda));
}
