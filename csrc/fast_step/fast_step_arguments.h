// What the operators fast_* take in common, checked once: the model and its rays.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "fast_step_checks.h"
#include "fast_step_group.h"

namespace mipnerf {

// Holds what a FastModel points to.
class CheckedModel {
  public:
    CheckedModel(const Checker& check, const FastModelArguments& given)
        : tables_(given.tables), masks_(given.masks) {
        const FastModelNumbers numbers = checked_numbers(check, given, "on the CPU");
        model_.grid = numbers.grid;
        features_ = numbers.features;
        model_.sizes = numbers.sizes;
        model_.encode = numbers.encode;
        model_.march = numbers.march;
        model_.occupancy = numbers.occupancy;
        const FastSizes& sizes = model_.sizes;
        model_.table = tensor_data<float>(tables_);
        model_.masks = reinterpret_cast<const uint32_t*>(tensor_data<int32_t>(masks_));
        networks_ = std::make_unique<PackedNetworks>(
            sizes, tensor_data<float>(given.density_in), tensor_data<float>(given.density_out),
            tensor_data<float>(given.colour_in),
            given.colour_hidden.has_value() ? tensor_data<float>(*given.colour_hidden) : nullptr,
            tensor_data<float>(given.colour_out));
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
