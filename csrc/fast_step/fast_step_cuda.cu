// The operators fast_train_step, fast_render and those of the captured step on CUDA: checks, memory, launches
// on the current stream.
//
// fast_train_step makes as much room as its rays need, for which the host waits once.
// fast_train_step_captured takes the room it is given and never waits: it can be captured in a CUDA graph, as
// can the other operators _captured.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "fast_step_cuda_arguments.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Gradients {
    Tensor tables, density_in, density_out, colour_in;
    std::optional<Tensor> colour_hidden;
    Tensor colour_out;
    std::optional<Tensor> table_sums;
};

StepScratch step_scratch(const CudaModel& model, int64_t rays, int64_t capacity, CudaRoom& room) {
    const auto lay_out = [&](unsigned char* base, std::size_t& bytes) {
        return StepScratch::lay_out(base, model.numbers().sizes, model.layout().total, model.table_bytes(),
                                    rays, capacity, kBackwardParts, bytes);
    };
    std::size_t bytes = 0;
    lay_out(nullptr, bytes);
    return lay_out(room.take<unsigned char>(static_cast<int64_t>(bytes)), bytes);
}

// capacity negative: as much as the rays need. Returns float64 [6].
Tensor train_step(const Checker& check, const FastModelArguments& given, CudaModel& model, CudaRays& rays,
                  const Tensor& target, double loss_beta, int64_t capacity, const Gradients& to) {
    check.that(loss_beta > 0, "loss_beta", "positive", loss_beta);
    check.that(given.colour_hidden.has_value() == to.colour_hidden.has_value(), "grad_colour_hidden",
               "given where colour_hidden is", "one of them");
    const int64_t count = rays.march().rays;
    const StepTargets targets{rays.background(), rays.arrays().floats("target", target, {count, 3}, "[B, 3]"),
                              static_cast<float>(loss_beta)};
    CudaArrays& arrays = rays.arrays();
    int64_t* table_sums = nullptr;
    if (to.table_sums.has_value()) {
        table_sums = arrays.output<int64_t>("table_sums", *to.table_sums, ScalarType::Long,
                                            {given.tables.size(0), given.tables.size(1)}, "[entries, F]");
        check.that(is_aligned(table_sums, 16), "table_sums", "aligned to 16 bytes", "a view that is not");
    }
    float* const grad_tables = arrays.floats_like("grad_tables", to.tables, given.tables);
    const FastWeights<float> grads{
        arrays.floats_like("grad_density_in", to.density_in, given.density_in),
        arrays.floats_like("grad_density_out", to.density_out, given.density_out),
        arrays.floats_like("grad_colour_in", to.colour_in, given.colour_in),
        to.colour_hidden.has_value()
            ? arrays.floats_like("grad_colour_hidden", *to.colour_hidden, *given.colour_hidden)
            : nullptr,
        arrays.floats_like("grad_colour_out", to.colour_out, given.colour_out)};
    const Stream stream = current_cuda_stream(given.tables);
    CudaRoom room(given.tables);
    if (capacity < 0) {
        StepScratch counting = step_scratch(model, count, 0, room);
        counting.capacity = std::numeric_limits<int32_t>::max() - kTileSamples;
        launch_step_march(rays.march(), counting, stream);
        const StepCounters found = read_back(counting.counters, stream);
        check.that(found.rays == count, "origins", "rays of less than 2^31 samples", "more");
        capacity = ceil_div(int64_t{found.samples}, int64_t{kTileSamples}) * kTileSamples;
    }
    const Tensor statistics = torch::stable::new_zeros(given.tables, {kStepStatistics}, ScalarType::Double);
    const StepScratch scratch = step_scratch(model, count, capacity, room);
    model.with(scratch.packed, stream, [&](const auto& of_type, auto features) {
        launch_step_march(rays.march(), scratch, stream);
        launch_train_step<std::remove_const_t<std::remove_pointer_t<decltype(of_type.tables)>>,
                          features.value>(of_type, rays.march(), targets, scratch, grad_tables, table_sums,
                                          grads, mutable_cuda_data<double>(statistics), stream);
    });
    return statistics;
}

Tensor fast_train_step_cuda(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far,
                            std::optional<Tensor> phase, Tensor background, Tensor target, double loss_beta,
                            Tensor tables, Tensor density_in, Tensor density_out, Tensor colour_in,
                            std::optional<Tensor> colour_hidden, Tensor colour_out, Tensor masks,
                            std::vector<int64_t> resolutions, int64_t table_size, int64_t attenuation,
                            double cutoff, bool scale_input, double scale_low, double scale_high,
                            int64_t occupancy_resolution, double box_half, double step_scale, double min_step,
                            double max_step, bool tf32, Tensor grad_tables, Tensor grad_density_in,
                            Tensor grad_density_out, Tensor grad_colour_in,
                            std::optional<Tensor> grad_colour_hidden, Tensor grad_colour_out,
                            std::optional<Tensor> table_sums) {
    const Checker check{"fast_train_step"};
    const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
    const FastModelArguments given{tables,     density_in,  density_out, colour_in,  colour_hidden,
                                   colour_out, masks,       resolutions, table_size, attenuation,
                                   cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                   box_half,   step_scale,  min_step,    max_step,   tf32};
    CudaModel model(check, given);
    CudaRays rays(check, model, origins, directions, radii, near, far, phase, background);
    const Tensor statistics = train_step(check, given, model, rays, target, loss_beta, -1,
                                         {grad_tables, grad_density_in, grad_density_out, grad_colour_in,
                                          grad_colour_hidden, grad_colour_out, table_sums});
    Tensor five = statistics;
    return torch::stable::narrow(five, 0, 0, 5);
}

Tensor fast_train_step_captured_cuda(
    Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, std::optional<Tensor> phase,
    Tensor background, Tensor target, Tensor active_rays, int64_t capacity, double loss_beta, Tensor tables,
    Tensor density_in, Tensor density_out, Tensor colour_in, std::optional<Tensor> colour_hidden,
    Tensor colour_out, Tensor masks, std::vector<int64_t> resolutions, int64_t table_size,
    int64_t attenuation, double cutoff, bool scale_input, double scale_low, double scale_high,
    int64_t occupancy_resolution, double box_half, double step_scale, double min_step, double max_step,
    bool tf32, Tensor grad_tables, Tensor grad_density_in, Tensor grad_density_out, Tensor grad_colour_in,
    std::optional<Tensor> grad_colour_hidden, Tensor grad_colour_out, std::optional<Tensor> table_sums) {
    const Checker check{"fast_train_step_captured"};
    const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
    const FastModelArguments given{tables,     density_in,  density_out, colour_in,  colour_hidden,
                                   colour_out, masks,       resolutions, table_size, attenuation,
                                   cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                   box_half,   step_scale,  min_step,    max_step,   tf32};
    CudaModel model(check, given);
    CudaRays rays(check, model, origins, directions, radii, near, far, phase, background);
    rays.march().active_rays =
        rays.arrays().input<int32_t>("active_rays", active_rays, ScalarType::Int, {1}, "[1]");
    check.that(capacity > 0 && capacity % kTileSamples == 0 && capacity < (int64_t{1} << 31), "capacity",
               "a positive multiple of 64 below 2^31", capacity);
    return train_step(check, given, model, rays, target, loss_beta, capacity,
                      {grad_tables, grad_density_in, grad_density_out, grad_colour_in, grad_colour_hidden,
                       grad_colour_out, table_sums});
}

void fast_pace_captured_cuda(Tensor statistics, Tensor samples_per_ray, Tensor active_rays, Tensor step,
                             double batch, int64_t least, int64_t most) {
    const Checker check{"fast_pace_captured"};
    const torch::stable::accelerator::DeviceGuard guard(statistics.get_device_index());
    CudaArrays arrays(check, "statistics", statistics);
    const StepPace pace{
        arrays.output<float>("samples_per_ray", samples_per_ray, ScalarType::Float, {1}, "[1]"),
        arrays.output<int32_t>("active_rays", active_rays, ScalarType::Int, {1}, "[1]"),
        arrays.output<int64_t>("step", step, ScalarType::Long, {1}, "[1]"),
        static_cast<float>(batch),
        static_cast<int>(least),
        static_cast<int>(most),
        kTileSamples};
    launch_step_pace(
        arrays.input<double>("statistics", statistics, ScalarType::Double, {kStepStatistics}, "[6]"), pace,
        current_cuda_stream(statistics));
}

// More blocks than fit on any GPU at a time would only start late.
constexpr int kRenderBlocks = 2048;

std::tuple<Tensor, Tensor, Tensor> fast_render_cuda(
    Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, std::optional<Tensor> phase,
    Tensor background, Tensor tables, Tensor density_in, Tensor density_out, Tensor colour_in,
    std::optional<Tensor> colour_hidden, Tensor colour_out, Tensor masks, std::vector<int64_t> resolutions,
    int64_t table_size, int64_t attenuation, double cutoff, bool scale_input, double scale_low,
    double scale_high, int64_t occupancy_resolution, double box_half, double step_scale, double min_step,
    double max_step, bool tf32) {
    const Checker check{"fast_render"};
    const torch::stable::accelerator::DeviceGuard guard(tables.get_device_index());
    const CudaModel model(check, {tables,     density_in,  density_out, colour_in,  colour_hidden,
                                  colour_out, masks,       resolutions, table_size, attenuation,
                                  cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                  box_half,   step_scale,  min_step,    max_step,   tf32});
    CudaRays rays(check, model, origins, directions, radii, near, far, phase, background);
    const int64_t count = rays.march().rays;
    check.that(count < (int64_t{1} << 31) - kRenderBlocks * kTileThreads, "origins", "fewer than 2^31 rays",
               count);
    const Tensor rgb = torch::stable::new_empty(origins, {count, 3});
    const Tensor distance = torch::stable::new_empty(origins, {count});
    const Tensor acc = torch::stable::new_empty(origins, {count});
    const Tensor next_ray = torch::stable::new_zeros(origins, {1}, ScalarType::Int);
    const RenderArrays out{rays.background(), mutable_cuda_data<float>(rgb),
                           mutable_cuda_data<float>(distance), mutable_cuda_data<float>(acc),
                           mutable_cuda_data<int32_t>(next_ray)};
    const Stream stream = current_cuda_stream(tables);
    CudaRoom room(tables);
    model.with(room.take<float>(model.layout().total), stream, [&](const auto& of_type, auto features) {
        launch_fast_render<std::remove_const_t<std::remove_pointer_t<decltype(of_type.tables)>>,
                           features.value>(of_type, rays.march(), out, kRenderBlocks, stream);
    });
    return {rgb, distance, acc};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("fast_train_step", TORCH_BOX(&mipnerf::fast_train_step_cuda));
    m.impl("fast_train_step_captured", TORCH_BOX(&mipnerf::fast_train_step_captured_cuda));
    m.impl("fast_pace_captured", TORCH_BOX(&mipnerf::fast_pace_captured_cuda));
    m.impl("fast_render", TORCH_BOX(&mipnerf::fast_render_cuda));
}
