// The operators fast_train_step and fast_render on the CPU: checks, tasks, ordered reductions.
// The loops are in fast_step_group.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "fast_step_arguments.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <int F>
struct TrainGroups {
    const FastModel& model;
    const FastRays& rays;
    StepTarget target;
    FastWorkspace& workspace;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        train_group<W, F>(model, rays, target, task, workspace.rooms[thread], workspace.groups[task]);
    }
};

// One task adds the gradients of all samples, in their order, to a part of one level's entries: whatever the
// number of parts and threads, an entry receives the same sum.
template <int F>
struct Scatter {
    const FastModel& model;
    const std::vector<const GroupResult*>& groups;
    int64_t parts;
    float* grad_tables;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        // The finest levels first: they take longest.
        const int l = model.grid.levels - 1 - static_cast<int>(task / parts);
        const int64_t part = task % parts;
        const HashLevel& level = model.grid.level[l];
        const int64_t end = l + 1 < model.grid.levels ? model.grid.level[l + 1].offset : model.grid.entries;
        const int64_t size = end - level.offset;
        const uint32_t first = static_cast<uint32_t>(parts == 1 ? 0 : level.offset + size * part / parts);
        const uint32_t last =
            parts == 1 ? 0xffffffffu : static_cast<uint32_t>(level.offset + size * (part + 1) / parts);
        for (const GroupResult* group : groups)
            for (int64_t at = 0; at < group->counted; at += kTile) {
                Rows gradients = group->grad_features.from(at);
                gradients.data += l * F;
                scatter_tile<F>(level, model.encode, group->places.from(at), gradients,
                                static_cast<int>(std::min<int64_t>(kTile, group->counted - at)), first, last,
                                grad_tables);
            }
    }
};

template <int F>
struct RenderGroups {
    const FastModel& model;
    const FastRays& rays;
    RenderOutputs out;
    FastWorkspace& workspace;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        render_group<W, F>(model, rays, out, task, workspace.rooms[thread]);
    }
};

int64_t group_count(const FastRays& rays) {
    return (rays.count + kGroupRays - 1) / kGroupRays;
}

float* gradient_data(const Checker& check, const char* name, const Tensor& gradient, const Tensor& like) {
    check.that(sizes_text(gradient.sizes()) == sizes_text(like.sizes()), name, sizes_text(like.sizes()),
               sizes_text(gradient.sizes()));
    check.dtype(name, gradient, {ScalarType::Float});
    check.that(gradient.is_cpu() && gradient.is_contiguous(), name, "contiguous and on the CPU",
               device_text(gradient));
    return mutable_tensor_data<float>(gradient);
}

// Adds the gradients to the buffers given and returns float64 [5]: mean loss, mean squared error, samples,
// samples that counted, and whether all of it is finite (1 or 0; if not, nothing was added).
Tensor fast_train_step_cpu(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far,
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
    check.that(!table_sums.has_value(), "table_sums", "none on the CPU", "a tensor");
    const CheckedModel checked(check, {tables,     density_in,  density_out, colour_in,  colour_hidden,
                                       colour_out, masks,       resolutions, table_size, attenuation,
                                       cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                       box_half,   step_scale,  min_step,    max_step,   tf32});
    CheckedRays checked_rays(check, origins, directions, radii, near, far, phase, background);
    const float* target_rgb = checked_rays.hold(check, "target", target, 3);
    check.that(loss_beta > 0, "loss_beta", "positive", loss_beta);
    check.that(colour_hidden.has_value() == grad_colour_hidden.has_value(), "grad_colour_hidden",
               "given where colour_hidden is", "one of them");
    const FastModel& model = checked.model();
    const FastSizes& sizes = model.sizes;
    const FastRays& rays = checked_rays.rays();
    float* const to_tables = gradient_data(check, "grad_tables", grad_tables, tables);
    struct Part {
        float* gradient;
        int64_t begin, end;
    };
    std::vector<Part> parts = {
        {gradient_data(check, "grad_density_in", grad_density_in, density_in), 0, sizes.density_out_at()},
        {gradient_data(check, "grad_density_out", grad_density_out, density_out), sizes.density_out_at(),
         sizes.colour_in_at()},
        {gradient_data(check, "grad_colour_in", grad_colour_in, colour_in), sizes.colour_in_at(),
         sizes.colour_hidden_at()},
        {gradient_data(check, "grad_colour_out", grad_colour_out, colour_out), sizes.colour_out_at(),
         sizes.weights()}};
    if (colour_hidden.has_value())
        parts.push_back({gradient_data(check, "grad_colour_hidden", *grad_colour_hidden, *colour_hidden),
                         sizes.colour_hidden_at(), sizes.colour_out_at()});

    const WorkspaceLease lease;
    FastWorkspace& workspace = *lease;
    const int64_t count = group_count(rays);
    grow_rooms(workspace, count);
    if (static_cast<int64_t>(workspace.groups.size()) < count) workspace.groups.resize(count);
    with_features(checked.features(), [&](auto features) {
        constexpr int F = decltype(features)::value;
        for_tasks(count, TrainGroups<F>{model, rays, {target_rgb, static_cast<float>(loss_beta)}, workspace});
    });

    double loss = 0, squared_error = 0;
    int64_t samples = 0, counted = 0;
    const GradientSums layout(sizes);
    std::vector<float> sums(layout.total, 0.0f), weights(sizes.weights());
    std::vector<const GroupResult*> groups;
    for (int64_t g = 0; g < count; ++g) {
        const GroupResult& group = workspace.groups[g];
        loss += group.loss;
        squared_error += group.squared_error;
        samples += group.samples;
        counted += group.counted;
        const float* const part = group.weight_gradient.at(0);
        for (int64_t i = 0; i < layout.total; ++i) sums[i] += part[i];
        groups.push_back(&group);
    }
    layout.unpack(sums.data(), weights.data());
    // A NaN anywhere in the backward pass reaches the weights: the density network's inputs hold a constant.
    bool is_finite = std::isfinite(loss);
    for (const float value : weights) is_finite = is_finite && std::isfinite(value);
    if (is_finite) {
        for (const Part& part : parts)
            for (int64_t i = part.begin; i < part.end; ++i) part.gradient[i - part.begin] += weights[i];
        const int64_t threads = torch::stable::get_num_threads();
        const int64_t per_level = std::max<int64_t>(1, 2 * threads / model.grid.levels);
        with_features(checked.features(), [&](auto features) {
            constexpr int F = decltype(features)::value;
            for_tasks(model.grid.levels * per_level, Scatter<F>{model, groups, per_level, to_tables});
        });
    }
    const Tensor stats = torch::stable::new_empty(origins, {5}, ScalarType::Double);
    double* const out = mutable_tensor_data<double>(stats);
    const double elements = 3.0 * static_cast<double>(std::max<int64_t>(1, rays.count));
    out[0] = loss / elements;
    out[1] = squared_error / elements;
    out[2] = static_cast<double>(samples);
    out[3] = static_cast<double>(counted);
    out[4] = is_finite ? 1.0 : 0.0;
    return stats;
}

std::tuple<Tensor, Tensor, Tensor> fast_render_cpu(
    Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, std::optional<Tensor> phase,
    Tensor background, Tensor tables, Tensor density_in, Tensor density_out, Tensor colour_in,
    std::optional<Tensor> colour_hidden, Tensor colour_out, Tensor masks, std::vector<int64_t> resolutions,
    int64_t table_size, int64_t attenuation, double cutoff, bool scale_input, double scale_low,
    double scale_high, int64_t occupancy_resolution, double box_half, double step_scale, double min_step,
    double max_step, bool tf32) {
    const Checker check{"fast_render"};
    const CheckedModel checked(check, {tables,     density_in,  density_out, colour_in,  colour_hidden,
                                       colour_out, masks,       resolutions, table_size, attenuation,
                                       cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                       box_half,   step_scale,  min_step,    max_step,   tf32});
    const CheckedRays checked_rays(check, origins, directions, radii, near, far, phase, background);
    const FastRays& rays = checked_rays.rays();
    const Tensor rgb = torch::stable::new_empty(origins, {rays.count, 3});
    const Tensor distance = torch::stable::new_empty(origins, {rays.count});
    const Tensor acc = torch::stable::new_empty(origins, {rays.count});
    const WorkspaceLease lease;
    grow_rooms(*lease, group_count(rays));
    with_features(checked.features(), [&](auto features) {
        constexpr int F = decltype(features)::value;
        for_tasks(group_count(rays),
                  RenderGroups<F>{checked.model(),
                                  rays,
                                  {mutable_tensor_data<float>(rgb), mutable_tensor_data<float>(distance),
                                   mutable_tensor_data<float>(acc)},
                                  *lease});
    });
    return {rgb, distance, acc};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("fast_train_step", TORCH_BOX(&mipnerf::fast_train_step_cpu));
    m.impl("fast_render", TORCH_BOX(&mipnerf::fast_render_cpu));
}
