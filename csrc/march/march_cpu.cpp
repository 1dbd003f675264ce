// The operator march on the CPU: every ray is walked twice, to count its samples and to write them where the
// counts before it say.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "march_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRaysPerTask = 64;

template <typename T>
struct Rays {
    MarchOptions options;
    OccupancyLayout layout;
    const uint32_t* masks;
    const T *origins, *directions, *radii, *near, *far, *phase;

    MarchRay<T> begin(int64_t ray) const {
        return march_begin(origins + 3 * ray, directions + 3 * ray, radii[ray], near[ray], far[ray],
                           phase[ray], options);
    }
    bool next(MarchRay<T>& ray, T& t0, T& t1) const {
        return march_next(ray, layout.mask[ray.mask], masks, t0, t1);
    }
};

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Packed march_rays(const Rays<T>& in, int64_t rays, const Tensor& like) {
    const Tensor ray_starts = torch::stable::new_empty(like, {rays + 1}, ScalarType::Long);
    int64_t* const starts = static_cast<int64_t*>(ray_starts.mutable_data_ptr());
    starts[0] = 0;
    torch::stable::parallel_for(0, rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            MarchRay<T> ray = in.begin(r);
            T t0, t1;
            int64_t count = 0;
            while (in.next(ray, t0, t1)) ++count;
            starts[r + 1] = count;
        }
    });
    for (int64_t r = 0; r < rays; ++r) starts[r + 1] += starts[r];
    const int64_t samples = starts[rays];
    const Tensor ray_of = torch::stable::new_empty(like, {samples}, ScalarType::Long);
    const Tensor first = torch::stable::new_empty(like, {samples}),
                 last = torch::stable::new_empty(like, {samples});
    const Tensor means = torch::stable::new_empty(like, {samples, 3}),
                 scales = torch::stable::new_empty(like, {samples});
    int64_t* const to_ray = static_cast<int64_t*>(ray_of.mutable_data_ptr());
    T* const to_first = static_cast<T*>(first.mutable_data_ptr());
    T* const to_last = static_cast<T*>(last.mutable_data_ptr());
    T* const to_means = static_cast<T*>(means.mutable_data_ptr());
    T* const to_scales = static_cast<T*>(scales.mutable_data_ptr());
    torch::stable::parallel_for(0, rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            MarchRay<T> ray = in.begin(r);
            for (int64_t at = starts[r]; at < starts[r + 1]; ++at) {
                in.next(ray, to_first[at], to_last[at]);
                const MarchSample<T> sample = march_sample(ray, to_first[at], to_last[at]);
                for (int k = 0; k < 3; ++k) to_means[3 * at + k] = sample.mean[k];
                to_scales[at] = sample.scale;
                to_ray[at] = r;
            }
        }
    });
    return {ray_starts, ray_of, first, last, means, scales};
}

Packed march_cpu(Tensor origins, Tensor directions, Tensor radii, Tensor near, Tensor far, Tensor phase,
                 Tensor masks, int64_t occupancy_resolution, double box_half, double step_scale,
                 double min_step, double max_step) {
    const Checker check{"march"};
    check.dims("origins", origins, 2, "[B, 3]");
    check.dtype("origins", origins, {ScalarType::Float, ScalarType::Double});
    const int64_t rays = origins.size(0);
    std::vector<Tensor> held;
    const auto data = [&](const char* name, const Tensor& tensor, int64_t channels) -> const void* {
        check.shape(name, tensor, {rays, channels}, channels == 3 ? "[B, 3]" : "[B, 1]");
        check.same_dtype(name, tensor, "origins", origins);
        check.same_device(name, tensor, "origins", origins);
        held.push_back(torch::stable::contiguous(tensor));
        return held.back().const_data_ptr();
    };
    check.that(occupancy_resolution >= 32 && occupancy_resolution <= 512 && occupancy_resolution % 32 == 0,
               "occupancy_resolution", "a multiple of 32 up to 512", occupancy_resolution);
    const OccupancyLayout layout = occupancy_layout(static_cast<int32_t>(occupancy_resolution));
    check.dtype("masks", masks, {ScalarType::Int});
    check.shape("masks", masks, {layout.total_words}, "[words]");
    check.same_device("masks", masks, "origins", origins);
    check.that(box_half > 0, "box_half", "positive", box_half);
    check.that(min_step > 0 && max_step >= min_step, "min_step", "positive and at most max_step", min_step);
    const Tensor words = torch::stable::contiguous(masks);
    const MarchOptions options{box_half, step_scale, min_step, max_step,
                               static_cast<int32_t>(occupancy_resolution)};
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        const auto of = [&](const char* name, const Tensor& tensor, int64_t channels) {
            return static_cast<const T*>(data(name, tensor, channels));
        };
        const Rays<T> in{options,
                         layout,
                         static_cast<const uint32_t*>(words.const_data_ptr()),
                         of("origins", origins, 3),
                         of("directions", directions, 3),
                         of("radii", radii, 1),
                         of("near", near, 1),
                         of("far", far, 1),
                         of("phase", phase, 1)};
        return march_rays(in, rays, origins);
    };
    return origins.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("march", TORCH_BOX(&mipnerf::march_cpu));
}
