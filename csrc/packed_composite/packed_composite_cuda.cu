// The operators packed_composite_forward and packed_composite_backward on CUDA: checks, allocation, launch on
// the current stream. The values of ray_starts are not read by the host; the kernels stay inside the arrays
// whatever they are.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_call.h"
#include "packed_composite_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Checked {
    CudaArrays arrays;
    PackedCompositeArguments in{};

    Checked(const Checker& check, const Tensor& rgb, const Tensor& density, const Tensor& lengths,
            const Tensor& middles, const Tensor& ray_starts, const Tensor& background, const Tensor& near)
        : arrays(check, "density", density) {
        check.dims("density", density, 1, "[S]");
        in.samples = density.size(0);
        check.dims("ray_starts", ray_starts, 1, "[B + 1]");
        in.rays = ray_starts.size(0) - 1;
        check.that(in.rays >= 0, "ray_starts", "of shape [B + 1]", sizes_text(ray_starts.sizes()));
        in.rgb = arrays.floats("rgb", rgb, {in.samples, 3}, "[S, 3]");
        in.density = arrays.floats("density", density, {in.samples}, "[S]");
        in.lengths = arrays.floats("lengths", lengths, {in.samples}, "[S]");
        in.middles = arrays.floats("middles", middles, {in.samples}, "[S]");
        in.ray_starts =
            arrays.input<int64_t>("ray_starts", ray_starts, ScalarType::Long, {in.rays + 1}, "[B + 1]");
        in.background = arrays.floats("background", background, {in.rays, 3}, "[B, 3]");
        in.near = arrays.floats("near", near, {in.rays, 1}, "[B, 1]");
    }
};

Four packed_composite_forward_cuda(Tensor rgb, Tensor density, Tensor lengths, Tensor middles,
                                   Tensor ray_starts, Tensor background, Tensor near) {
    const Checker check{"packed_composite_forward"};
    const torch::stable::accelerator::DeviceGuard guard(density.get_device_index());
    const Checked checked(check, rgb, density, lengths, middles, ray_starts, background, near);
    const Tensor out_rgb = torch::stable::new_empty(density, {checked.in.rays, 3});
    const Tensor distance = torch::stable::new_empty(density, {checked.in.rays});
    const Tensor acc = torch::stable::new_empty(density, {checked.in.rays});
    const Tensor weights = torch::stable::new_empty(density, {checked.in.samples});
    launch_packed_composite_forward(checked.in,
                                    {mutable_cuda_data<float>(out_rgb), mutable_cuda_data<float>(distance),
                                     mutable_cuda_data<float>(acc), mutable_cuda_data<float>(weights)},
                                    current_cuda_stream(density));
    return {out_rgb, distance, acc, weights};
}

Four packed_composite_backward_cuda(Tensor grad_rgb, Tensor grad_distance, Tensor grad_acc,
                                    Tensor grad_weights, Tensor rgb, Tensor density, Tensor lengths,
                                    Tensor middles, Tensor ray_starts, Tensor background, Tensor near) {
    const Checker check{"packed_composite_backward"};
    const torch::stable::accelerator::DeviceGuard guard(density.get_device_index());
    Checked checked(check, rgb, density, lengths, middles, ray_starts, background, near);
    const int64_t rays = checked.in.rays, samples = checked.in.samples;
    CudaArrays& arrays = checked.arrays;
    const Tensor to_rgb = torch::stable::new_empty(density, {samples, 3});
    const Tensor to_density = torch::stable::new_empty(density, {samples});
    const Tensor to_lengths = torch::stable::new_empty(density, {samples});
    const Tensor to_background = torch::stable::new_empty(density, {rays, 3});
    launch_packed_composite_backward(
        checked.in,
        {arrays.floats("grad_rgb", grad_rgb, {rays, 3}, "[B, 3]"),
         arrays.floats("grad_distance", grad_distance, {rays}, "[B]"),
         arrays.floats("grad_acc", grad_acc, {rays}, "[B]"),
         arrays.floats("grad_weights", grad_weights, {samples}, "[S]"), mutable_cuda_data<float>(to_rgb),
         mutable_cuda_data<float>(to_density), mutable_cuda_data<float>(to_lengths),
         mutable_cuda_data<float>(to_background)},
        current_cuda_stream(density));
    return {to_rgb, to_density, to_lengths, to_background};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("packed_composite_forward", TORCH_BOX(&mipnerf::packed_composite_forward_cuda));
    m.impl("packed_composite_backward", TORCH_BOX(&mipnerf::packed_composite_backward_cuda));
}
