// The operators tiny_mlp_forward and tiny_mlp_backward on CUDA: checks, allocation, launch on the current
// stream. The values of `rays` are not read by the host: they must lie in [0, B).
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cuda_call.h"
#include "tiny_mlp_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Also packs the weights.
struct Checked {
    CudaArrays arrays;
    CudaRoom room;
    FastSizes sizes{};
    int64_t samples, rays;
    TinyMlpArguments in{};

    Checked(const Checker& check, const Tensor& features, const Tensor& harmonics, const Tensor& ray_of,
            const Tensor& density_in, const Tensor& density_out, const Tensor& colour_in,
            const std::optional<Tensor>& colour_hidden, const Tensor& colour_out, bool tf32)
        : arrays(check, "features", features), room(features) {
        check_tf32(check, tf32);
        check.dims("features", features, 2, "[S, E]");
        check.dims("harmonics", harmonics, 2, "[B, 16]");
        check.dims("density_in", density_in, 2, "[H, I]");
        samples = features.size(0), rays = harmonics.size(0);
        const int64_t encoded = features.size(1), hidden = density_in.size(0), inputs = density_in.size(1);
        check.that(hidden >= 8 && hidden <= kTileWidth && hidden % 8 == 0, "density_in",
                   "a multiple of 8 up to 64 rows", hidden);
        check.that(inputs >= 4 && inputs <= kMaxTileInputs && inputs % 4 == 0 && encoded <= inputs,
                   "density_in", "a multiple of 4 up to 96 columns, at least as many as features", inputs);
        sizes = {static_cast<int>(encoded), static_cast<int>(inputs), static_cast<int>(hidden),
                 colour_hidden.has_value() ? 2 : 1};
        in.samples = samples;
        in.features = arrays.floats("features", features, {samples, encoded}, "[S, E]");
        in.harmonics = arrays.floats("harmonics", harmonics, {rays, kHarmonics}, "[B, 16]");
        in.rays = arrays.input<int64_t>("rays", ray_of, ScalarType::Long, {samples}, "[S]");
        const NetworkLayout layout(
            sizes,
            {arrays.floats("density_in", density_in, {hidden, inputs}, "[H, I]"),
             arrays.floats("density_out", density_out, {kGeometryFeatures, hidden}, "[16, H]"),
             arrays.floats("colour_in", colour_in, {hidden, kGeometryFeatures + kHarmonics}, "[H, 32]"),
             colour_hidden.has_value()
                 ? arrays.floats("colour_hidden", *colour_hidden, {hidden, hidden}, "[H, H]")
                 : nullptr,
             arrays.floats("colour_out", colour_out, {3, hidden}, "[3, H]")},
            tf32);
        float* const packed = room.take<float>(layout.total);
        launch_pack_networks(layout, packed, current_cuda_stream(features));
        in.networks = DeviceNetworks(sizes, layout, packed);
    }
};

std::tuple<Tensor, Tensor> tiny_mlp_forward_cuda(Tensor features, Tensor harmonics, Tensor rays,
                                                 Tensor density_in, Tensor density_out, Tensor colour_in,
                                                 std::optional<Tensor> colour_hidden, Tensor colour_out,
                                                 bool tf32) {
    const Checker check{"tiny_mlp_forward"};
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    const Checked checked(check, features, harmonics, rays, density_in, density_out, colour_in, colour_hidden,
                          colour_out, tf32);
    const Tensor rgb = torch::stable::new_empty(features, {checked.samples, 3});
    const Tensor density = torch::stable::new_empty(features, {checked.samples});
    launch_tiny_mlp_forward(checked.in, mutable_cuda_data<float>(rgb), mutable_cuda_data<float>(density),
                            current_cuda_stream(features));
    return {rgb, density};
}

Seven tiny_mlp_backward_cuda(Tensor grad_rgb, Tensor grad_density, Tensor features, Tensor harmonics,
                             Tensor rays, Tensor density_in, Tensor density_out, Tensor colour_in,
                             std::optional<Tensor> colour_hidden, Tensor colour_out, bool tf32,
                             bool wants_features, bool wants_harmonics) {
    const Checker check{"tiny_mlp_backward"};
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    Checked checked(check, features, harmonics, rays, density_in, density_out, colour_in, colour_hidden,
                    colour_out, tf32);
    const FastSizes& sizes = checked.sizes;
    const int64_t H = sizes.hidden;
    const Tensor to_features =
        torch::stable::new_empty(features, {wants_features ? checked.samples : 0, sizes.encoded});
    const Tensor to_harmonics =
        torch::stable::new_zeros(features, {wants_harmonics ? checked.rays : 0, kHarmonics});
    const Stream stream = current_cuda_stream(features);
    const TinyMlpCotangents given{
        checked.arrays.floats("grad_rgb", grad_rgb, {checked.samples, 3}, "[S, 3]"),
        checked.arrays.floats("grad_density", grad_density, {checked.samples}, "[S]"),
        wants_features ? mutable_cuda_data<float>(to_features) : nullptr,
        wants_harmonics ? mutable_cuda_data<float>(to_harmonics) : nullptr,
        checked.room.take<float>(kBackwardParts * sizes.weights())};
    launch_tiny_mlp_backward(checked.in, given, kBackwardParts, stream);
    float* const sums = checked.room.take<float>(sizes.weights());
    launch_sum_parts(sizes.weights(), kBackwardParts, given.weight_parts, sums, nullptr, stream);
    const float* next = sums;
    const auto part = [&](int64_t rows, int64_t columns) {
        const Tensor to = torch::stable::new_empty(features, {rows, columns});
        const size_t count = static_cast<size_t>(rows * columns);
        if (count > 0)
            detail::check_cuda(cudaMemcpyAsync(mutable_cuda_data<float>(to), next, count * sizeof(float),
                                               cudaMemcpyDeviceToDevice, stream),
                               "tiny_mlp_backward");
        next += count;
        return to;
    };
    const Tensor to_density_in = part(H, sizes.inputs), to_density_out = part(kGeometryFeatures, H);
    const Tensor to_colour_in = part(H, sizes.colour_inputs());
    const Tensor to_colour_hidden = part(colour_hidden.has_value() ? H : 0, H), to_colour_out = part(3, H);
    return {to_features,  to_harmonics,     to_density_in, to_density_out,
            to_colour_in, to_colour_hidden, to_colour_out};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("tiny_mlp_forward", TORCH_BOX(&mipnerf::tiny_mlp_forward_cuda));
    m.impl("tiny_mlp_backward", TORCH_BOX(&mipnerf::tiny_mlp_backward_cuda));
}
