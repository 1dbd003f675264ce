// What the CUDA operators fast_* and occupancy_update take in common, checked once: the model and its rays.
#pragma once

#include <memory>
#include <type_traits>

#include "../common/cuda_call.h"
#include "fast_step_checks.h"
#include "fast_step_launch.h"

namespace mipnerf {

class CudaModel {
  public:
    CudaModel(const Checker& check, const FastModelArguments& given)
        : given_(given),
          numbers_(checked_numbers(check, given, "on the GPU of tables", true)),
          layout_(numbers_.sizes,
                  {cuda_data<float>(given.density_in), cuda_data<float>(given.density_out),
                   cuda_data<float>(given.colour_in),
                   given.colour_hidden.has_value() ? cuda_data<float>(*given.colour_hidden) : nullptr,
                   cuda_data<float>(given.colour_out)},
                  given.tf32) {
        check_tf32(check, given.tf32);
    }

    const FastModelNumbers& numbers() const { return numbers_; }
    const NetworkLayout& layout() const { return layout_; }
    std::size_t table_bytes() const {
        return given_.tables.scalar_type() == torch::headeronly::ScalarType::Half ? sizeof(Half)
                                                                                  : sizeof(float);
    }

    // Calls run(model, features) with a DeviceModel of the tables' type and the number of features as a
    // constant; packs the weights first.
    template <typename Run>
    void with(float* packed, Stream stream, const Run& run) const {
        launch_pack_networks(layout_, packed, stream);
        const auto of = [&](auto* tables) {
            using S = std::remove_const_t<std::remove_pointer_t<decltype(tables)>>;
            const DeviceModel<S> model{numbers_.grid, numbers_.encode, tables,
                                       DeviceNetworks(numbers_.sizes, layout_, packed)};
            if (numbers_.features == 2)
                run(model, std::integral_constant<int, 2>{});
            else
                run(model, std::integral_constant<int, 4>{});
        };
        if (table_bytes() == sizeof(Half))
            of(cuda_data<Half>(given_.tables));
        else
            of(cuda_data<float>(given_.tables));
    }

    const std::uint32_t* masks() const {
        return reinterpret_cast<const std::uint32_t*>(cuda_data<std::int32_t>(given_.masks));
    }
    const torch::stable::Tensor& tables() const { return given_.tables; }

  private:
    FastModelArguments given_;
    FastModelNumbers numbers_;
    NetworkLayout layout_;
};

// Contiguous rays [B, 3] and [B, 1] on the model's device.
class CudaRays {
  public:
    CudaRays(const Checker& check, const CudaModel& model, const torch::stable::Tensor& origins,
             const torch::stable::Tensor& directions, const torch::stable::Tensor& radii,
             const torch::stable::Tensor& near, const torch::stable::Tensor& far,
             const std::optional<torch::stable::Tensor>& phase, const torch::stable::Tensor& background)
        : arrays_(check, "tables", model.tables()) {
        check.dims("origins", origins, 2, "[B, 3]");
        const int64_t rays = march_.rays = origins.size(0);
        march_.options = model.numbers().march;
        march_.layout = model.numbers().occupancy;
        march_.masks = model.masks();
        march_.origins = arrays_.floats("origins", origins, {rays, 3}, "[B, 3]");
        march_.directions = arrays_.floats("directions", directions, {rays, 3}, "[B, 3]");
        march_.radii = arrays_.floats("radii", radii, {rays, 1}, "[B, 1]");
        march_.near = arrays_.floats("near", near, {rays, 1}, "[B, 1]");
        march_.far = arrays_.floats("far", far, {rays, 1}, "[B, 1]");
        if (phase.has_value()) march_.phase = arrays_.floats("phase", *phase, {rays, 1}, "[B, 1]");
        background_ = arrays_.floats("background", background, {rays, 3}, "[B, 3]");
    }

    MarchArguments& march() { return march_; }
    const float* background() const { return background_; }
    CudaArrays& arrays() { return arrays_; }

  private:
    CudaArrays arrays_;
    MarchArguments march_{};
    const float* background_;
};

}  // namespace mipnerf
