// The operators occupancy_update and occupancy_masks on CUDA: checks, memory, launches on the current stream.
// Nothing waits for the device; the summary lies there.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../fast_step/fast_step_cuda_arguments.h"
#include "occupancy_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t checked_resolution(const Checker& check, const Tensor& densities) {
    check.dims("densities", densities, 3, "[R, R, R]");
    const int64_t resolution = densities.size(0);
    check.that(resolution >= 32 && resolution <= 512 && resolution % 32 == 0, "densities",
               "a multiple of 32 up to 512 cells a side", resolution);
    return static_cast<int32_t>(resolution);
}

float* checked_densities(CudaArrays& arrays, const Tensor& densities, int64_t R) {
    return arrays.output<float>("densities", densities, ScalarType::Float, {R, R, R}, "[R, R, R]");
}

Tensor make_masks(const Tensor& densities, int32_t resolution, double max_threshold, const Tensor& masks,
                  CudaRoom& room) {
    const Tensor summary = torch::stable::new_empty(densities, {2}, ScalarType::Double);
    launch_occupancy_masks(
        {resolution, occupancy_layout(resolution), static_cast<float>(max_threshold),
         cuda_data<float>(densities), reinterpret_cast<uint32_t*>(mutable_cuda_data<int32_t>(masks)),
         room.take<float>(kDensityParts), room.take<float>(1), room.take<int32_t>(1),
         mutable_cuda_data<double>(summary)},
        current_cuda_stream(densities));
    return summary;
}

Tensor occupancy_masks_cuda(Tensor densities, double max_threshold, Tensor masks) {
    const Checker check{"occupancy_masks"};
    const torch::stable::accelerator::DeviceGuard guard(densities.get_device_index());
    CudaArrays arrays(check, "densities", densities);
    const int32_t resolution = checked_resolution(check, densities);
    checked_densities(arrays, densities, resolution);
    arrays.output<int32_t>("masks", masks, ScalarType::Int, {occupancy_layout(resolution).total_words},
                           "[words]");
    CudaRoom room(densities);
    return make_masks(densities, resolution, max_threshold, masks, room);
}

Tensor occupancy_update_cuda(Tensor densities, double cell_scale, int64_t seed, int64_t step, int64_t stride,
                             double decay, double max_threshold, Tensor tables, Tensor density_in,
                             Tensor density_out, Tensor colour_in, std::optional<Tensor> colour_hidden,
                             Tensor colour_out, Tensor masks, std::vector<int64_t> resolutions,
                             int64_t table_size, int64_t attenuation, double cutoff, bool scale_input,
                             double scale_low, double scale_high, int64_t occupancy_resolution,
                             double box_half, double step_scale, double min_step, double max_step,
                             bool tf32) {
    const Checker check{"occupancy_update"};
    const torch::stable::accelerator::DeviceGuard guard(densities.get_device_index());
    const CudaModel model(check, {tables,     density_in,  density_out, colour_in,  colour_hidden,
                                  colour_out, masks,       resolutions, table_size, attenuation,
                                  cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                  box_half,   step_scale,  min_step,    max_step,   tf32});
    CudaArrays arrays(check, "tables", tables);
    const int32_t resolution = checked_resolution(check, densities);
    check.that(resolution == occupancy_resolution, "densities", "of occupancy_resolution cells a side",
               resolution);
    check.that(stride >= 1, "stride", "1 or more", stride);
    const int64_t cells = int64_t{resolution} * resolution * resolution,
                  chunks = occupancy_chunks(resolution);
    const Stream stream = current_cuda_stream(densities);
    CudaRoom room(densities);
    VisitArguments visits{};
    visits.resolution = resolution;
    visits.seed = static_cast<uint64_t>(seed);
    visits.step = static_cast<uint64_t>(step);
    visits.visits = (cells + stride - 1) / stride;
    visits.cell_scale = static_cast<float>(cell_scale);
    visits.decay = static_cast<float>(decay);
    visits.densities = checked_densities(arrays, densities, resolution);
    visits.occupied = {chunks, model.masks() + model.numbers().occupancy.mask[0].words,
                       room.take<int32_t>(chunks), room.take<int32_t>(ray_blocks(chunks)),
                       room.take<int64_t>(chunks + 1)};
    model.with(room.take<float>(model.layout().total), stream, [&](const auto& of_type, auto features) {
        launch_occupancy_visits<std::remove_const_t<std::remove_pointer_t<decltype(of_type.tables)>>,
                                features.value>(of_type, visits, stream);
    });
    return make_masks(densities, resolution, max_threshold, masks, room);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("occupancy_update", TORCH_BOX(&mipnerf::occupancy_update_cuda));
    m.impl("occupancy_masks", TORCH_BOX(&mipnerf::occupancy_masks_cuda));
}
