// The operators packed_composite_forward and packed_composite_backward on the CPU: one ray after the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "packed_composite_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRaysPerTask = 256;

template <typename T>
struct Inputs {
    const T *rgb, *density, *lengths, *middles;
    const int64_t* ray_starts;
    const T *background, *near;
};

template <typename T>
void composite_ray(const Inputs<T>& in, int64_t ray, T* rgb, T* distance, T* acc, T* weights) {
    T transmittance = T(1), depth_before = T(0), colour[3] = {T(0), T(0), T(0)}, weighted = T(0);
    for (int64_t i = in.ray_starts[ray]; i < in.ray_starts[ray + 1]; ++i) {
        weights[i] = T(0);
        if (!counts(transmittance)) continue;
        const T depth = in.density[i] * in.lengths[i];
        weights[i] = transmittance * one_minus_exp_negative(depth);
        for (int k = 0; k < 3; ++k) colour[k] += weights[i] * in.rgb[3 * i + k];
        weighted += weights[i] * in.middles[i];
        depth_before += depth;
        transmittance = exp_nonpositive(-depth_before);
    }
    acc[ray] = one_minus_exp_negative(depth_before);
    distance[ray] = acc[ray] > T(0) ? weighted / acc[ray] : in.near[ray];
    for (int k = 0; k < 3; ++k) rgb[3 * ray + k] = colour[k] + transmittance * in.background[3 * ray + k];
}

template <typename T>
struct Cotangents {
    const T *rgb, *distance, *acc, *weights;
};

// With g_i = dL/dw_i, acc being the sum of the weights:
//   g_i = dL/drgb . (c_i - background) + dL/dacc + dL/dweight_i + dL/ddistance (m_i - distance) / acc
//   dL/ddepth_i = T_{i+1} g_i - sum_{j > i} w_j g_j
// from the back, over the samples that count.
template <typename T>
void differentiate_ray(const Inputs<T>& in, const Cotangents<T>& given, int64_t ray, std::vector<T>& before,
                       T* grad_rgb, T* grad_density, T* grad_lengths, T* grad_background) {
    const int64_t first = in.ray_starts[ray], end = in.ray_starts[ray + 1];
    before.clear();
    T depth_before = T(0), transmittance = T(1), weighted = T(0);
    int64_t last = first;
    for (; last < end && counts(transmittance); ++last) {
        before.push_back(transmittance);
        const T depth = in.density[last] * in.lengths[last];
        weighted += transmittance * one_minus_exp_negative(depth) * in.middles[last];
        depth_before += depth;
        transmittance = exp_nonpositive(-depth_before);
    }
    const T acc = one_minus_exp_negative(depth_before);
    const T by_distance = acc > T(0) ? given.distance[ray] / acc : T(0);
    const T distance = acc > T(0) ? weighted / acc : T(0);
    for (int k = 0; k < 3; ++k) grad_background[3 * ray + k] = transmittance * given.rgb[3 * ray + k];
    for (int64_t i = last; i < end; ++i) {
        for (int k = 0; k < 3; ++k) grad_rgb[3 * i + k] = T(0);
        grad_density[i] = grad_lengths[i] = T(0);
    }
    T behind = T(0), after = transmittance;
    for (int64_t i = last - 1; i >= first; --i) {
        const T depth = in.density[i] * in.lengths[i];
        const T weight = before[i - first] * one_minus_exp_negative(depth);
        T g = given.acc[ray] + given.weights[i] + by_distance * (in.middles[i] - distance);
        for (int k = 0; k < 3; ++k) {
            g += given.rgb[3 * ray + k] * (in.rgb[3 * i + k] - in.background[3 * ray + k]);
            grad_rgb[3 * i + k] = weight * given.rgb[3 * ray + k];
        }
        const T by_depth = after * g - behind;
        grad_density[i] = by_depth * in.lengths[i];
        grad_lengths[i] = by_depth * in.density[i];
        behind += weight * g;
        after = before[i - first];
    }
}

struct Checked {
    int64_t rays, samples;
    Tensor rgb, density, lengths, middles, ray_starts, background, near;

    Checked(const Checker& check, const Tensor& given_rgb, const Tensor& given_density,
            const Tensor& given_lengths, const Tensor& given_middles, const Tensor& given_starts,
            const Tensor& given_background, const Tensor& given_near) {
        check.dims("density", given_density, 1, "[S]");
        samples = given_density.size(0);
        check.dims("ray_starts", given_starts, 1, "[B + 1]");
        rays = given_starts.size(0) - 1;
        check.that(rays >= 0, "ray_starts", "of shape [B + 1]", sizes_text(given_starts.sizes()));
        check.dtype("ray_starts", given_starts, {ScalarType::Long});
        check.dtype("density", given_density, {ScalarType::Float, ScalarType::Double});
        const auto hold = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                              const char* meaning) {
            check.shape(name, tensor, shape, meaning);
            check.same_dtype(name, tensor, "density", given_density);
            check.same_device(name, tensor, "density", given_density);
            return torch::stable::contiguous(tensor);
        };
        rgb = hold("rgb", given_rgb, {samples, 3}, "[S, 3]");
        density = hold("density", given_density, {samples}, "[S]");
        lengths = hold("lengths", given_lengths, {samples}, "[S]");
        middles = hold("middles", given_middles, {samples}, "[S]");
        background = hold("background", given_background, {rays, 3}, "[B, 3]");
        near = hold("near", given_near, {rays, 1}, "[B, 1]");
        ray_starts = torch::stable::contiguous(given_starts);
        // Memory is read and written by these: they must ascend from 0 to S.
        const int64_t* starts = static_cast<const int64_t*>(ray_starts.const_data_ptr());
        bool ascends = starts[0] == 0 && starts[rays] == samples;
        for (int64_t ray = 0; ray < rays; ++ray) ascends = ascends && starts[ray] <= starts[ray + 1];
        check.that(ascends, "ray_starts", "ascending from 0 to the number of samples", "other values");
    }

    template <typename T>
    Inputs<T> of() const {
        const auto data = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
        return {data(rgb),
                data(density),
                data(lengths),
                data(middles),
                static_cast<const int64_t*>(ray_starts.const_data_ptr()),
                data(background),
                data(near)};
    }
};

template <typename Run>
void with_dtype(const Tensor& tensor, const Run& run) {
    if (tensor.scalar_type() == ScalarType::Double)
        run(double());
    else
        run(float());
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four packed_composite_forward_cpu(Tensor rgb, Tensor density, Tensor lengths, Tensor middles,
                                  Tensor ray_starts, Tensor background, Tensor near) {
    const Checked checked(Checker{"packed_composite_forward"}, rgb, density, lengths, middles, ray_starts,
                          background, near);
    const Tensor out_rgb = torch::stable::new_empty(density, {checked.rays, 3});
    const Tensor distance = torch::stable::new_empty(density, {checked.rays});
    const Tensor acc = torch::stable::new_empty(density, {checked.rays});
    const Tensor weights = torch::stable::new_empty(density, {checked.samples});
    with_dtype(density, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in = checked.of<T>();
        const auto out = [](const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); };
        T *c = out(out_rgb), *d = out(distance), *a = out(acc), *w = out(weights);
        torch::stable::parallel_for(0, checked.rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
            for (int64_t ray = begin; ray < end; ++ray) composite_ray(in, ray, c, d, a, w);
        });
    });
    return {out_rgb, distance, acc, weights};
}

Four packed_composite_backward_cpu(Tensor grad_rgb, Tensor grad_distance, Tensor grad_acc,
                                   Tensor grad_weights, Tensor rgb, Tensor density, Tensor lengths,
                                   Tensor middles, Tensor ray_starts, Tensor background, Tensor near) {
    const Checker check{"packed_composite_backward"};
    const Checked checked(check, rgb, density, lengths, middles, ray_starts, background, near);
    const auto hold = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                          const char* meaning) {
        check.shape(name, tensor, shape, meaning);
        check.same_dtype(name, tensor, "density", density);
        return torch::stable::contiguous(tensor);
    };
    const Tensor given_rgb = hold("grad_rgb", grad_rgb, {checked.rays, 3}, "[B, 3]");
    const Tensor given_distance = hold("grad_distance", grad_distance, {checked.rays}, "[B]");
    const Tensor given_acc = hold("grad_acc", grad_acc, {checked.rays}, "[B]");
    const Tensor given_weights = hold("grad_weights", grad_weights, {checked.samples}, "[S]");
    const Tensor to_rgb = torch::stable::new_empty(density, {checked.samples, 3});
    const Tensor to_density = torch::stable::new_empty(density, {checked.samples});
    const Tensor to_lengths = torch::stable::new_empty(density, {checked.samples});
    const Tensor to_background = torch::stable::new_empty(density, {checked.rays, 3});
    with_dtype(density, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in = checked.of<T>();
        const auto data = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
        const auto out = [](const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); };
        const Cotangents<T> given{data(given_rgb), data(given_distance), data(given_acc),
                                  data(given_weights)};
        T *c = out(to_rgb), *d = out(to_density), *l = out(to_lengths), *b = out(to_background);
        torch::stable::parallel_for(0, checked.rays, kRaysPerTask, [&](int64_t begin, int64_t end) {
            std::vector<T> before;
            for (int64_t ray = begin; ray < end; ++ray) differentiate_ray(in, given, ray, before, c, d, l, b);
        });
    });
    return {to_rgb, to_density, to_lengths, to_background};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("packed_composite_forward", TORCH_BOX(&mipnerf::packed_composite_forward_cpu));
    m.impl("packed_composite_backward", TORCH_BOX(&mipnerf::packed_composite_backward_cpu));
}
