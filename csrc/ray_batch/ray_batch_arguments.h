// What the operator ray_batch accepts and returns, on either device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "ray_batch_math.h"

namespace mipnerf {

using RayBatchTensors =
    std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
               torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>;

// The images, checked, and contiguous as long as this lives.
class RayBatchImages {
  public:
    using Tensor = torch::stable::Tensor;
    using ScalarType = torch::headeronly::ScalarType;

    RayBatchImages(const Tensor& pixels, const Tensor& offsets, const Tensor& heights, const Tensor& widths,
                   const Tensor& c2w, const Tensor& focals, const Tensor& nears, const Tensor& fars,
                   const Tensor& lossmults, int64_t common_size)
        : c2w_(c2w) {
        check_.dims("pixels", pixels, 2, "[P, 3 or 4]");
        check_.dims("heights", heights, 1, "[n]");
        const int64_t all = pixels.size(0), channels = pixels.size(1), images = heights.size(0);
        check_.that(channels == 3 || channels == 4, "pixels", "of 3 or 4 channels", channels);
        check_.that(images >= 1, "heights", "of at least one image", images);
        check_.that(all >= 1 && all < int64_t{1} << 40, "pixels", "1 to 2^40 - 1 pixels", all);
        check_.that(common_size == 0 || (common_size > 0 && common_size * images == all), "common_size",
                    "0 or the " + std::to_string(all) + " pixels / the " + std::to_string(images) + " images",
                    common_size);
        in_.images = images;
        in_.all_pixels = all;
        in_.common_size = common_size;
        in_.channels = static_cast<int>(channels);
        in_.pixels = input<uint8_t>("pixels", pixels, ScalarType::Byte, {all, channels}, "[P, C]");
        in_.offsets = input<int64_t>("offsets", offsets, ScalarType::Long, {images + 1}, "[n + 1]");
        in_.heights = input<int64_t>("heights", heights, ScalarType::Long, {images}, "[n]");
        in_.widths = input<int64_t>("widths", widths, ScalarType::Long, {images}, "[n]");
        in_.c2w = input<float>("c2w", c2w, ScalarType::Float, {images, 3, 4}, "[n, 3, 4]");
        in_.focals = input<float>("focals", focals, ScalarType::Float, {images}, "[n]");
        in_.nears = input<float>("nears", nears, ScalarType::Float, {images}, "[n]");
        in_.fars = input<float>("fars", fars, ScalarType::Float, {images}, "[n]");
        in_.lossmults = input<float>("lossmults", lossmults, ScalarType::Float, {images}, "[n]");
    }

    // What is drawn from them.
    RayBatchArguments drawn(int64_t seed, const Tensor& step, int64_t count, bool single_image,
                            bool white_background) {
        check_.that(count >= 0, "count", "0 or more", count);
        RayBatchArguments in = in_;
        in.count = count;
        in.seed = static_cast<uint64_t>(seed);
        in.step = input<int64_t>("step", step, ScalarType::Long, {}, "[]");
        in.single_image = single_image;
        in.background = white_background ? 1.0f : 0.0f;
        return in;
    }

    RayBatchTensors new_outputs(int64_t count) const {
        const auto output = [&](int64_t columns) { return torch::stable::new_empty(c2w_, {count, columns}); };
        return {output(3), output(3), output(3), output(1), output(1), output(1), output(1), output(3)};
    }

  private:
    template <typename T>
    const T* input(const char* name, const Tensor& tensor, ScalarType dtype,
                   std::initializer_list<int64_t> shape, const char* meaning) {
        check_.shape(name, tensor, shape, meaning);
        check_.dtype(name, tensor, {dtype});
        check_.same_device(name, tensor, "c2w", c2w_);
        held_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
        return static_cast<const T*>(held_.back().const_data_ptr());
    }

    const Checker check_{"ray_batch"};
    const Tensor c2w_;
    RayBatchArguments in_{};
    std::vector<Tensor> held_;
};

inline RayBatchOutputs pointers(const RayBatchTensors& tensors) {
    return std::apply(
        [](const auto&... tensor) {
            return RayBatchOutputs{static_cast<float*>(tensor.mutable_data_ptr())...};
        },
        tensors);
}

}  // namespace mipnerf
