// What the operators fast_* take in common, checked once: the model and its rays.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "../hash_encode/hash_encode_arguments.h"
#include "fast_step_group.h"

namespace mipnerf {

// The arguments as they come from the dispatcher, in the order of the schemas.
struct FastModelArguments {
    torch::stable::Tensor tables, density_in, density_out, colour_in;
    std::optional<torch::stable::Tensor> colour_hidden;
    torch::stable::Tensor colour_out, masks;
    std::vector<int64_t> resolutions;
    int64_t table_size;
    int64_t attenuation;
    double cutoff;
    bool scale_input;
    double scale_low, scale_high;
    int64_t occupancy_resolution;
    double box_half, step_scale, min_step, max_step;
};

template <typename T>
const T* tensor_data(const torch::stable::Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_tensor_data(const torch::stable::Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Holds what a FastModel points to.
class CheckedModel {
  public:
    CheckedModel(const Checker& check, const FastModelArguments& given)
        : tables_(given.tables), masks_(given.masks) {
        using torch::headeronly::ScalarType;
        model_.grid = checked_hash_grid(check, given.tables, given.resolutions, given.table_size);
        features_ = static_cast<int>(given.tables.size(1));
        FastSizes& sizes = model_.sizes;
        sizes.encoded = model_.grid.levels * features_;
        sizes.inputs = (sizes.encoded + 3 + 3) / 4 * 4;
        check.dims("density_in", given.density_in, 2, "[hidden, inputs]");
        const int64_t hidden = given.density_in.size(0);
        check.that(hidden >= 8 && hidden <= 256 && hidden % 8 == 0, "density_in",
                   "a multiple of 8 up to 256 rows", hidden);
        sizes.hidden = static_cast<int>(hidden);
        sizes.colour_layers = given.colour_hidden.has_value() ? 2 : 1;
        check.shape("density_in", given.density_in, {hidden, sizes.inputs}, "[hidden, inputs]");
        check.shape("density_out", given.density_out, {kGeometryFeatures, hidden}, "[16, hidden]");
        check.shape("colour_in", given.colour_in, {hidden, sizes.colour_inputs()}, "[hidden, 32]");
        if (given.colour_hidden.has_value())
            check.shape("colour_hidden", *given.colour_hidden, {hidden, hidden}, "[hidden, hidden]");
        check.shape("colour_out", given.colour_out, {3, hidden}, "[3, hidden]");
        const auto float_array = [&](const char* name, const torch::stable::Tensor& tensor) {
            check.dtype(name, tensor, {ScalarType::Float});
            check.that(tensor.is_cpu() && tensor.is_contiguous(), name, "contiguous and on the CPU",
                       device_text(tensor));
        };
        float_array("tables", given.tables);
        float_array("density_in", given.density_in);
        float_array("density_out", given.density_out);
        float_array("colour_in", given.colour_in);
        if (given.colour_hidden.has_value()) float_array("colour_hidden", *given.colour_hidden);
        float_array("colour_out", given.colour_out);
        const int64_t resolution = given.occupancy_resolution;
        check.that(resolution >= 32 && resolution <= 512 && resolution % 32 == 0, "occupancy_resolution",
                   "a multiple of 32 up to 512", resolution);
        model_.occupancy = occupancy_layout(static_cast<int32_t>(resolution));
        check.dtype("masks", given.masks, {ScalarType::Int});
        check.shape("masks", given.masks, {model_.occupancy.total_words}, "[words]");
        check.that(given.box_half > 0, "box_half", "positive", given.box_half);
        check.that(given.min_step > 0 && given.max_step >= given.min_step, "min_step",
                   "positive and at most max_step", given.min_step);
        model_.encode = {attenuation_coded(check, given.attenuation), static_cast<float>(given.cutoff),
                         given.scale_input, static_cast<float>(given.scale_low),
                         static_cast<float>(given.scale_high)};
        model_.march = {given.box_half, given.step_scale, given.min_step, given.max_step,
                        static_cast<int32_t>(resolution)};
        model_.table = tensor_data<float>(tables_);
        model_.masks = reinterpret_cast<const uint32_t*>(tensor_data<int32_t>(masks_));
        networks_ = std::make_unique<PackedNetworks>(
            sizes, tensor_data<float>(given.density_in), tensor_data<float>(given.density_out),
            tensor_data<float>(given.colour_in),
            given.colour_hidden.has_value() ? tensor_data<float>(*given.colour_hidden) : nullptr,
            tensor_data<float>(given.colour_out), dispatched_row_block());
        model_.networks = networks_.get();
    }

    const FastModel& model() const { return model_; }
    int features() const { return features_; }

  private:
    torch::stable::Tensor tables_, masks_;
    FastModel model_{};
    int features_;
    std::unique_ptr<PackedNetworks> networks_;
};

// Contiguous rays [B, 3] and [B, 1].
class CheckedRays {
  public:
    CheckedRays(const Checker& check, const torch::stable::Tensor& origins,
                const torch::stable::Tensor& directions, const torch::stable::Tensor& radii,
                const torch::stable::Tensor& near, const torch::stable::Tensor& far,
                const std::optional<torch::stable::Tensor>& phase, const torch::stable::Tensor& background) {
        check.dims("origins", origins, 2, "[B, 3]");
        rays_.count = origins.size(0);
        rays_.origins = hold(check, "origins", origins, 3);
        rays_.directions = hold(check, "directions", directions, 3);
        rays_.radii = hold(check, "radii", radii, 1);
        rays_.near = hold(check, "near", near, 1);
        rays_.far = hold(check, "far", far, 1);
        rays_.phase = phase.has_value() ? hold(check, "phase", *phase, 1) : nullptr;
        rays_.background = hold(check, "background", background, 3);
    }
    const FastRays& rays() const { return rays_; }

    const float* hold(const Checker& check, const char* name, const torch::stable::Tensor& tensor,
                      int64_t channels) {
        check.shape(name, tensor, {rays_.count, channels}, channels == 3 ? "[B, 3]" : "[B, 1]");
        check.dtype(name, tensor, {torch::headeronly::ScalarType::Float});
        check.that(tensor.is_cpu(), name, "on the CPU", device_text(tensor));
        held_.push_back(torch::stable::contiguous(tensor));
        return tensor_data<float>(held_.back());
    }

  private:
    FastRays rays_{};
    std::vector<torch::stable::Tensor> held_;
};

// Calls run with the number of features as a constant.
template <typename Run>
void with_features(int features, const Run& run) {
    if (features == 2)
        run(std::integral_constant<int, 2>{});
    else
        run(std::integral_constant<int, 4>{});
}

inline void grow_rooms(FastWorkspace& workspace, int64_t tasks) {
    const size_t threads = static_cast<size_t>(task_threads(tasks));
    if (workspace.rooms.size() < threads) workspace.rooms.resize(threads);
}

}  // namespace mipnerf
