// The operators draw_rays and draw_rays_captured on CUDA: the same numbers as on the CPU.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/cuda_call.h"
#include "draw_rays_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Source {
    Tensor pixels, offsets, heights, widths, c2w, focals, nears, fars, order, group_ends, group_shares;
};

// `in` holds how many are drawn, by which numbers.
Eight draw(const Checker& check, const Source& from, CudaArrays& arrays, DrawRaysArguments in) {
    check.dims("pixels", from.pixels, 2, "[P, 3 or 4]");
    const int64_t channels = from.pixels.size(1), images = from.heights.numel(),
                  groups = from.group_ends.numel();
    check.that(channels == 3 || channels == 4, "pixels", "of 3 or 4 channels", channels);
    check.that(images >= 1 && groups >= 1, "heights", "at least one image", images);
    check.that(in.count >= 0, "count", "0 or more", in.count);
    in.channels = static_cast<int>(channels);
    in.groups = static_cast<int>(groups);
    in.pixels = arrays.input<uint8_t>("pixels", from.pixels, ScalarType::Byte,
                                      {from.pixels.size(0), channels}, "[P, C]");
    const auto whole = [&](const char* name, const Tensor& tensor, int64_t count, const char* meaning) {
        return arrays.input<int64_t>(name, tensor, ScalarType::Long, {count}, meaning);
    };
    in.offsets = whole("offsets", from.offsets, images + 1, "[n+1]");
    in.heights = whole("heights", from.heights, images, "[n]");
    in.widths = whole("widths", from.widths, images, "[n]");
    in.c2w = arrays.floats("c2w", from.c2w, {images, 3, 4}, "[n, 3, 4]");
    in.focals = arrays.floats("focals", from.focals, {images}, "[n]");
    in.nears = arrays.floats("nears", from.nears, {images}, "[n]");
    in.fars = arrays.floats("fars", from.fars, {images}, "[n]");
    in.order = whole("order", from.order, images, "[n]");
    in.group_ends = whole("group_ends", from.group_ends, groups, "[scales]");
    in.group_shares = arrays.floats("group_shares", from.group_shares, {groups}, "[scales]");
    const auto output = [&](int64_t columns) {
        return torch::stable::new_empty(from.c2w, {in.count, columns});
    };
    const Tensor origins = output(3), directions = output(3), radii = output(1), near = output(1),
                 far = output(1), phase = output(1), background = output(3), target = output(3);
    launch_draw_rays(in,
                     {mutable_cuda_data<float>(origins), mutable_cuda_data<float>(directions),
                      mutable_cuda_data<float>(radii), mutable_cuda_data<float>(near),
                      mutable_cuda_data<float>(far), mutable_cuda_data<float>(phase),
                      mutable_cuda_data<float>(background), mutable_cuda_data<float>(target)},
                     current_cuda_stream(from.c2w));
    return {origins, directions, radii, near, far, phase, background, target};
}

Eight draw_rays_cuda(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w, Tensor focals,
                     Tensor nears, Tensor fars, Tensor order, Tensor group_ends, Tensor group_shares,
                     int64_t seed, int64_t step, int64_t count, bool random_background, double background) {
    const Checker check{"draw_rays"};
    const torch::stable::accelerator::DeviceGuard guard(c2w.get_device_index());
    CudaArrays arrays(check, "c2w", c2w);
    DrawRaysArguments in{};
    in.count = count;
    in.seed = static_cast<uint64_t>(seed);
    in.step = static_cast<uint64_t>(step);
    in.random_background = random_background;
    in.background = static_cast<float>(background);
    return draw(check,
                {pixels, offsets, heights, widths, c2w, focals, nears, fars, order, group_ends, group_shares},
                arrays, in);
}

Eight draw_rays_captured_cuda(Tensor pixels, Tensor offsets, Tensor heights, Tensor widths, Tensor c2w,
                              Tensor focals, Tensor nears, Tensor fars, Tensor order, Tensor group_ends,
                              Tensor group_shares, int64_t seed, Tensor step, Tensor active_rays,
                              int64_t count, bool random_background, double background) {
    const Checker check{"draw_rays_captured"};
    const torch::stable::accelerator::DeviceGuard guard(c2w.get_device_index());
    CudaArrays arrays(check, "c2w", c2w);
    DrawRaysArguments in{};
    in.count = count;
    in.active_rays = arrays.input<int32_t>("active_rays", active_rays, ScalarType::Int, {1}, "[1]");
    in.seed = static_cast<uint64_t>(seed);
    in.step_on_device = arrays.input<int64_t>("step", step, ScalarType::Long, {1}, "[1]");
    in.random_background = random_background;
    in.background = static_cast<float>(background);
    return draw(check,
                {pixels, offsets, heights, widths, c2w, focals, nears, fars, order, group_ends, group_shares},
                arrays, in);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("draw_rays", TORCH_BOX(&mipnerf::draw_rays_cuda));
    m.impl("draw_rays_captured", TORCH_BOX(&mipnerf::draw_rays_captured_cuda));
}
