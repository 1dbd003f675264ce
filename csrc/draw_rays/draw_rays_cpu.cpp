// The operator draw_rays on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../common/checks.h"
#include "draw_rays_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
const T* checked_data(const Checker& check, const char* name, const Tensor& tensor, ScalarType dtype,
                      std::initializer_list<int64_t> shape, const char* meaning) {
    check.dtype(name, tensor, {dtype});
    check.shape(name, tensor, shape, meaning);
    check.that(tensor.is_cpu() && tensor.is_contiguous(), name, "contiguous and on the CPU",
               device_text(tensor));
    return static_cast<const T*>(tensor.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> draw_rays_cpu(
    Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w, Tensor focals, Tensor nears,
    Tensor fars, Tensor order, Tensor group_ends, Tensor group_shares, int64_t seed, int64_t step,
    int64_t count, bool random_background, double background) {
    const Checker check{"draw_rays"};
    check.dims("pixels", pixels, 2, "[P, 3 or 4]");
    const int64_t channels = pixels.size(1), images = heights.numel(), groups = group_ends.numel();
    check.that(channels == 3 || channels == 4, "pixels", "of 3 or 4 channels", channels);
    check.that(images >= 1 && groups >= 1, "heights", "at least one image", images);
    check.that(count >= 0, "count", "0 or more", count);
    const uint8_t* colours = checked_data<uint8_t>(check, "pixels", pixels, ScalarType::Byte,
                                                   {pixels.size(0), channels}, "[P, C]");
    const int64_t* first =
        checked_data<int64_t>(check, "offsets", offsets, ScalarType::Long, {images + 1}, "[n+1]");
    const int64_t* height =
        checked_data<int64_t>(check, "heights", heights, ScalarType::Long, {images}, "[n]");
    const int64_t* width = checked_data<int64_t>(check, "widths", widths, ScalarType::Long, {images}, "[n]");
    const float* camera =
        checked_data<float>(check, "c2w", c2w, ScalarType::Float, {images, 3, 4}, "[n, 3, 4]");
    const float* focal = checked_data<float>(check, "focals", focals, ScalarType::Float, {images}, "[n]");
    const float* near = checked_data<float>(check, "nears", nears, ScalarType::Float, {images}, "[n]");
    const float* far = checked_data<float>(check, "fars", fars, ScalarType::Float, {images}, "[n]");
    const int64_t* sorted = checked_data<int64_t>(check, "order", order, ScalarType::Long, {images}, "[n]");
    const int64_t* ends =
        checked_data<int64_t>(check, "group_ends", group_ends, ScalarType::Long, {groups}, "[scales]");
    const float* shares =
        checked_data<float>(check, "group_shares", group_shares, ScalarType::Float, {groups}, "[scales]");
    check.that(ends[groups - 1] == images, "group_ends", "ending at the number of images", ends[groups - 1]);

    const auto output = [&](int64_t columns) { return torch::stable::new_empty(c2w, {count, columns}); };
    const Tensor origins = output(3), directions = output(3), radii = output(1), to_near = output(1),
                 to_far = output(1), phase = output(1), to_background = output(3), target = output(3);
    const auto out = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
    float *o = out(origins), *d = out(directions), *r = out(radii), *n = out(to_near), *f = out(to_far),
          *u = out(phase), *b = out(to_background), *c = out(target);
    const auto pixels_of = [&](uint32_t image) { return height[image] * width[image]; };
    // Pixels lie all over the images: some rows' are asked for together before they are read.
    constexpr int64_t kRows = 64;
    const auto draw_rows = [&](int64_t begin, int64_t end) {
        const uint8_t* at[kRows];
        for (int64_t row = begin; row < end; ++row) {
            const PixelDraw draw = draw_pixel(static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                                              static_cast<uint32_t>(row), shares, ends, sorted,
                                              static_cast<int>(groups), pixels_of);
            pixel_ray(camera + 12 * draw.image, height[draw.image], width[draw.image], focal[draw.image],
                      draw.pixel, o + 3 * row, d + 3 * row, r + row);
            n[row] = near[draw.image];
            f[row] = far[draw.image];
            u[row] = draw.phase;
            for (int k = 0; k < 3; ++k)
                b[3 * row + k] = random_background ? draw.background[k] : static_cast<float>(background);
            at[row - begin] = colours + channels * (first[draw.image] + draw.pixel);
            __builtin_prefetch(at[row - begin]);
        }
        for (int64_t row = begin; row < end; ++row)
            pixel_colour(at[row - begin], static_cast<int>(channels), b + 3 * row, c + 3 * row);
    };
    torch::stable::parallel_for(0, count, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row += kRows) draw_rows(row, std::min(end, row + kRows));
    });
    return {origins, directions, radii, to_near, to_far, phase, to_background, target};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("draw_rays", TORCH_BOX(&mipnerf::draw_rays_cpu));
}
