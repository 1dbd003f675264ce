// The operator march on CUDA. How many samples there are decides how large the results are, so the host waits
// once for their number; the fused step does not (fast_step_cuda.cu).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_call.h"
#include "march_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> march_cuda(
    Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor phase, Tensor masks,
    int64_t occupancy_resolution, double box_half, double step_scale, double min_step, double max_step) {
    const Checker check{"march"};
    check.dims("origins", origins, 2, "[B, 3]");
    check.that(occupancy_resolution >= 32 && occupancy_resolution <= 512 && occupancy_resolution % 32 == 0,
               "occupancy_resolution", "a multiple of 32 up to 512", occupancy_resolution);
    check.that(box_half > 0, "box_half", "positive", box_half);
    check.that(min_step > 0 && max_step >= min_step, "min_step", "positive and at most max_step", min_step);
    const torch::stable::accelerator::DeviceGuard guard(origins.get_device_index());
    CudaArrays arrays(check, "origins", origins);
    MarchArguments in{};
    const int64_t rays = in.rays = origins.size(0);
    in.options = {static_cast<float>(box_half), static_cast<float>(step_scale), static_cast<float>(min_step),
                  static_cast<float>(max_step), static_cast<int32_t>(occupancy_resolution)};
    in.layout = occupancy_layout(in.options.resolution);
    in.masks = reinterpret_cast<const uint32_t*>(
        arrays.input<int32_t>("masks", masks, ScalarType::Int, {in.layout.total_words}, "[words]"));
    in.origins = arrays.floats("origins", origins, {rays, 3}, "[B, 3]");
    in.directions = arrays.floats("directions", directions, {rays, 3}, "[B, 3]");
    in.radii = arrays.floats("radii", radii, {rays, 1}, "[B, 1]");
    in.near = arrays.floats("near", near, {rays, 1}, "[B, 1]");
    in.far = arrays.floats("far", far, {rays, 1}, "[B, 1]");
    in.phase = arrays.floats("phase", phase, {rays, 1}, "[B, 1]");

    const Stream stream = current_cuda_stream(origins);
    const Tensor starts = torch::stable::new_zeros(origins, {rays + 1}, ScalarType::Long);
    int64_t* const to_starts = mutable_cuda_data<int64_t>(starts);
    CudaRoom room(origins);
    int32_t* const counts = room.take<int32_t>(rays);
    int32_t* const totals = room.take<int32_t>(ray_blocks(rays));
    launch_march_count(in, counts, totals, stream);
    launch_ray_starts(rays, nullptr, counts, totals, to_starts, {0, nullptr, nullptr}, stream);
    const int64_t samples = rays == 0 ? 0 : read_back(to_starts + rays, stream);
    const Tensor ray_of = torch::stable::new_empty(origins, {samples}, ScalarType::Long);
    const Tensor first = torch::stable::new_empty(origins, {samples});
    const Tensor last = torch::stable::new_empty(origins, {samples});
    const Tensor means = torch::stable::new_empty(origins, {samples, 3});
    const Tensor scales = torch::stable::new_empty(origins, {samples});
    launch_march_write(
        in, to_starts,
        {mutable_cuda_data<int64_t>(ray_of), mutable_cuda_data<float>(first), mutable_cuda_data<float>(last),
         mutable_cuda_data<float>(means), mutable_cuda_data<float>(scales)},
        stream);
    return {starts, ray_of, first, last, means, scales};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("march", TORCH_BOX(&mipnerf::march_cuda));
}
