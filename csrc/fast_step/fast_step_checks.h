// What the operators fast_* take of a model, checked alike on the CPU and on CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/checks.h"
#include "../hash_encode/hash_encode_arguments.h"
#include "../march/march_math.h"
#include "../tiny_mlp/tiny_mlp_sizes.h"

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
    bool tf32;
};

template <typename T>
const T* tensor_data(const torch::stable::Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_tensor_data(const torch::stable::Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

struct FastModelNumbers {
    HashGrid grid;
    int features;
    FastSizes sizes;
    EncodeOptions encode;
    MarchOptions march;
    OccupancyLayout occupancy;
};

// Shapes, dtypes, ranges. Every array is on the device of the tables; `place` says in words where they must
// be, and `on_cuda` whether that is a GPU, where the tables may also be float16 and the networks are at most
// as large as the kernels' tiles.
inline FastModelNumbers checked_numbers(const Checker& check, const FastModelArguments& given,
                                        const char* place, bool on_cuda = false) {
    using torch::headeronly::ScalarType;
    FastModelNumbers numbers{};
    numbers.grid = checked_hash_grid(check, given.tables, given.resolutions, given.table_size);
    numbers.features = static_cast<int>(given.tables.size(1));
    FastSizes& sizes = numbers.sizes;
    sizes.encoded = numbers.grid.levels * numbers.features;
    sizes.inputs = (sizes.encoded + 3 + 3) / 4 * 4;
    check.dims("density_in", given.density_in, 2, "[hidden, inputs]");
    const int64_t hidden = given.density_in.size(0), widest = on_cuda ? 64 : 256;
    check.that(hidden >= 8 && hidden <= widest && hidden % 8 == 0, "density_in",
               "a multiple of 8 up to " + std::to_string(widest) + " rows", hidden);
    sizes.hidden = static_cast<int>(hidden);
    sizes.colour_layers = given.colour_hidden.has_value() ? 2 : 1;
    check.shape("density_in", given.density_in, {hidden, sizes.inputs}, "[hidden, inputs]");
    check.shape("density_out", given.density_out, {kGeometryFeatures, hidden}, "[16, hidden]");
    check.shape("colour_in", given.colour_in, {hidden, sizes.colour_inputs()}, "[hidden, 32]");
    if (given.colour_hidden.has_value())
        check.shape("colour_hidden", *given.colour_hidden, {hidden, hidden}, "[hidden, hidden]");
    check.shape("colour_out", given.colour_out, {3, hidden}, "[3, hidden]");
    const auto is_there = [&](const char* name, const torch::stable::Tensor& tensor) {
        const bool is_near =
            on_cuda ? tensor.is_cuda() && tensor.device() == given.tables.device() : tensor.is_cpu();
        check.that(is_near && tensor.is_contiguous(), name, std::string("contiguous and ") + place,
                   device_text(tensor));
    };
    const auto float_array = [&](const char* name, const torch::stable::Tensor& tensor) {
        check.dtype(name, tensor, {ScalarType::Float});
        is_there(name, tensor);
    };
    if (on_cuda) {
        check.dtype("tables", given.tables, {ScalarType::Float, ScalarType::Half});
        is_there("tables", given.tables);
    } else {
        float_array("tables", given.tables);
    }
    float_array("density_in", given.density_in);
    float_array("density_out", given.density_out);
    float_array("colour_in", given.colour_in);
    if (given.colour_hidden.has_value()) float_array("colour_hidden", *given.colour_hidden);
    float_array("colour_out", given.colour_out);
    const int64_t resolution = given.occupancy_resolution;
    check.that(resolution >= 32 && resolution <= 512 && resolution % 32 == 0, "occupancy_resolution",
               "a multiple of 32 up to 512", resolution);
    numbers.occupancy = occupancy_layout(static_cast<int32_t>(resolution));
    check.dtype("masks", given.masks, {ScalarType::Int});
    check.shape("masks", given.masks, {numbers.occupancy.total_words}, "[words]");
    is_there("masks", given.masks);
    check.that(on_cuda || !given.tf32, "tf32", "false on the CPU", "true");
    check.that(given.box_half > 0, "box_half", "positive", given.box_half);
    check.that(given.min_step > 0 && given.max_step >= given.min_step, "min_step",
               "positive and at most max_step", given.min_step);
    numbers.encode = {attenuation_coded(check, given.attenuation), static_cast<float>(given.cutoff),
                      given.scale_input, static_cast<float>(given.scale_low),
                      static_cast<float>(given.scale_high)};
    numbers.march = {static_cast<float>(given.box_half), static_cast<float>(given.step_scale),
                     static_cast<float>(given.min_step), static_cast<float>(given.max_step),
                     static_cast<int32_t>(resolution)};
    return numbers;
}

}  // namespace mipnerf
