// The operators fast_train_step, fast_train_update and fast_render on the CPU: checks, tasks, ordered
// reductions. The loops are in fast_step_group.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../sparse_adam/sparse_adam_arguments.h"
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

// A task is a part of one level's entries.
struct LevelParts {
    const HashGrid& grid;
    int64_t of_level;

    // Enough for all threads; the more, the more often corners are computed that lie in another part.
    explicit LevelParts(const HashGrid& of)
        : grid(of), of_level(std::max<int64_t>(1, 2 * torch::stable::get_num_threads() / of.levels)) {}

    int64_t tasks() const { return grid.levels * of_level; }
    // The finest levels first: they take longest.
    int level(int64_t task) const { return grid.levels - 1 - static_cast<int>(task / of_level); }
    int64_t begin(int64_t task) const { return at(level(task), task % of_level); }
    int64_t end(int64_t task) const { return at(level(task), task % of_level + 1); }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t task = 0; task < tasks(); ++task) most = std::max(most, end(task) - begin(task));
        return most;
    }

  private:
    int64_t at(int l, int64_t part) const {
        const int64_t offset = grid.level[l].offset;
        const int64_t next = l + 1 < grid.levels ? grid.level[l + 1].offset : grid.entries;
        return offset + (next - offset) * part / of_level;
    }
};

// The gradients of all samples, in their order, to the entries of one part: whatever the number of parts and
// threads, an entry receives the same sum. `gradients` begins with that of the entry `origin`.
template <int F>
MIPNERF_INLINE void scatter_part(const FastModel& model, const std::vector<const GroupResult*>& groups,
                                 const LevelParts& parts, int64_t task, int64_t origin, float* gradients) {
    const int l = parts.level(task);
    const TableGradient<F> to{gradients, static_cast<uint32_t>(origin),
                              static_cast<uint32_t>(parts.begin(task)),
                              static_cast<uint32_t>(parts.end(task)), parts.of_level == 1};
    for (const GroupResult* group : groups)
        for (int64_t at = 0; at < group->counted; at += kTile) {
            Rows rows = group->grad_features.from(at);
            rows.data += l * F;
            scatter_tile<F>(model.grid.level[l], model.encode, group->places.from(at), rows,
                            static_cast<int>(std::min<int64_t>(kTile, group->counted - at)), to);
        }
}

template <int F>
struct Scatter {
    const FastModel& model;
    const std::vector<const GroupResult*>& groups;
    const LevelParts& parts;
    float* grad_tables;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        scatter_part<F>(model, groups, parts, task, 0, grad_tables);
    }
};

// Adam right behind the scatter, while a part's gradients are in the cache: they need no memory of their own,
// and a step goes through three arrays of the tables' size instead of five.
template <int F>
struct ScatterAndUpdate {
    const FastModel& model;
    const std::vector<const GroupResult*>& groups;
    const LevelParts& parts;
    AdamOptions options;
    float *tables, *moment1, *moment2;
    std::deque<std::vector<float>>& rooms;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        float* const gradients = rooms[thread].data();
        const int64_t begin = parts.begin(task), first = begin * F;
        scatter_part<F>(model, groups, parts, task, begin, gradients);
        const AdamArrays arrays{options, tables + first, gradients, moment1 + first, moment2 + first};
        arrays.update(0, (parts.end(task) - begin) * F);
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

// Buffers like the networks' weights.
struct NetworkGradients {
    Tensor density_in, density_out, colour_in;
    std::optional<Tensor> colour_hidden;
    Tensor colour_out;
};

// From rays to gradients. Those of the networks are added to their buffers and to_tables(groups) sees to
// those of the encoding, unless something is not finite. Returns float64 [5]: mean loss, mean squared error,
// samples, samples that counted, and whether all of it is finite (1 or 0).
template <typename ToTables>
Tensor train_step(const Checker& check, const FastModelArguments& given, const CheckedModel& checked,
                  CheckedRays& checked_rays, const Tensor& target, double loss_beta,
                  const NetworkGradients& gradients, FastWorkspace& workspace, const ToTables& to_tables) {
    const float* target_rgb = checked_rays.hold(check, "target", target, 3);
    check.that(loss_beta > 0, "loss_beta", "positive", loss_beta);
    check.that(given.colour_hidden.has_value() == gradients.colour_hidden.has_value(), "grad_colour_hidden",
               "given where colour_hidden is", "one of them");
    const FastModel& model = checked.model();
    const FastSizes& sizes = model.sizes;
    const FastRays& rays = checked_rays.rays();
    const auto to = [&](const char* name, const Tensor& gradient, const Tensor& like) {
        return checked_array_like(check, name, gradient, "the weights", like);
    };
    struct Part {
        float* gradient;
        int64_t begin, end;
    };
    std::vector<Part> parts = {
        {to("grad_density_in", gradients.density_in, given.density_in), 0, sizes.density_out_at()},
        {to("grad_density_out", gradients.density_out, given.density_out), sizes.density_out_at(),
         sizes.colour_in_at()},
        {to("grad_colour_in", gradients.colour_in, given.colour_in), sizes.colour_in_at(),
         sizes.colour_hidden_at()},
        {to("grad_colour_out", gradients.colour_out, given.colour_out), sizes.colour_out_at(),
         sizes.weights()}};
    if (given.colour_hidden.has_value())
        parts.push_back({to("grad_colour_hidden", *gradients.colour_hidden, *given.colour_hidden),
                         sizes.colour_hidden_at(), sizes.colour_out_at()});

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
        to_tables(groups);
    }
    const Tensor stats = torch::stable::new_empty(target, {5}, ScalarType::Double);
    double* const out = mutable_tensor_data<double>(stats);
    const double elements = 3.0 * static_cast<double>(std::max<int64_t>(1, rays.count));
    out[0] = loss / elements;
    out[1] = squared_error / elements;
    out[2] = static_cast<double>(samples);
    out[3] = static_cast<double>(counted);
    out[4] = is_finite ? 1.0 : 0.0;
    return stats;
}

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
    const FastModelArguments given{tables,     density_in,  density_out, colour_in,  colour_hidden,
                                   colour_out, masks,       resolutions, table_size, attenuation,
                                   cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                   box_half,   step_scale,  min_step,    max_step,   tf32};
    const CheckedModel checked(check, given);
    CheckedRays rays(check, origins, directions, radii, near, far, phase, background);
    float* const to = checked_array_like(check, "grad_tables", grad_tables, "tables", tables);
    const WorkspaceLease workspace;
    return train_step(
        check, given, checked, rays, target, loss_beta,
        {grad_density_in, grad_density_out, grad_colour_in, grad_colour_hidden, grad_colour_out}, *workspace,
        [&](const std::vector<const GroupResult*>& groups) {
            const LevelParts parts(checked.model().grid);
            with_features(checked.features(), [&](auto features) {
                constexpr int F = decltype(features)::value;
                for_tasks(parts.tasks(), Scatter<F>{checked.model(), groups, parts, to});
            });
        });
}

Tensor fast_train_update_cpu(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far,
                             std::optional<Tensor> phase, Tensor background, Tensor target, double loss_beta,
                             Tensor tables, Tensor density_in, Tensor density_out, Tensor colour_in,
                             std::optional<Tensor> colour_hidden, Tensor colour_out, Tensor masks,
                             std::vector<int64_t> resolutions, int64_t table_size, int64_t attenuation,
                             double cutoff, bool scale_input, double scale_low, double scale_high,
                             int64_t occupancy_resolution, double box_half, double step_scale,
                             double min_step, double max_step, bool tf32, Tensor grad_density_in,
                             Tensor grad_density_out, Tensor grad_colour_in,
                             std::optional<Tensor> grad_colour_hidden, Tensor grad_colour_out, Tensor moment1,
                             Tensor moment2, double learning_rate, double beta1, double beta2, double eps,
                             int64_t step) {
    const Checker check{"fast_train_update"};
    const FastModelArguments given{tables,     density_in,  density_out, colour_in,  colour_hidden,
                                   colour_out, masks,       resolutions, table_size, attenuation,
                                   cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                   box_half,   step_scale,  min_step,    max_step,   tf32};
    const CheckedModel checked(check, given);
    CheckedRays rays(check, origins, directions, radii, near, far, phase, background);
    const AdamOptions options = checked_adam_options(check, learning_rate, beta1, beta2, eps, step);
    float* const first = checked_array_like(check, "moment1", moment1, "tables", tables);
    float* const second = checked_array_like(check, "moment2", moment2, "tables", tables);
    const WorkspaceLease workspace;
    return train_step(
        check, given, checked, rays, target, loss_beta,
        {grad_density_in, grad_density_out, grad_colour_in, grad_colour_hidden, grad_colour_out}, *workspace,
        [&](const std::vector<const GroupResult*>& groups) {
            const LevelParts parts(checked.model().grid);
            auto& rooms = (*workspace).table_gradients;
            const size_t threads = static_cast<size_t>(task_threads(parts.tasks()));
            const size_t numbers = static_cast<size_t>(parts.longest() * checked.features());
            if (rooms.size() < threads) rooms.resize(threads);
            for (std::vector<float>& room : rooms)
                if (room.size() < numbers) room.resize(numbers, 0.0f);
            with_features(checked.features(), [&](auto features) {
                constexpr int F = decltype(features)::value;
                for_tasks(parts.tasks(),
                          ScatterAndUpdate<F>{checked.model(), groups, parts, options,
                                              mutable_tensor_data<float>(tables), first, second, rooms});
            });
        });
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
    m.impl("fast_train_update", TORCH_BOX(&mipnerf::fast_train_update_cpu));
    m.impl("fast_render", TORCH_BOX(&mipnerf::fast_render_cpu));
}
