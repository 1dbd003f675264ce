// The CPU loops of compositing: vectorised along the samples of a ray, the sums before and after a sample
// included. These accumulate in double, as torch.cumsum does, so that the error of a transmittance does not
// grow with N. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "composite_math.h"

#ifndef MIPNERF_INLINE
#define MIPNERF_INLINE inline __attribute__((always_inline))
#endif

namespace mipnerf {

// 16-bit storage: the bits, and which format they are in.
struct Bfloat16Storage {
    uint16_t bits;
};
struct HalfStorage {
    uint16_t bits;
};

MIPNERF_INLINE float widen(float x) {
    return x;
}
MIPNERF_INLINE double widen(double x) {
    return x;
}
MIPNERF_INLINE float widen(Bfloat16Storage x) {
    return from_bfloat16_bits(x.bits);
}
MIPNERF_INLINE float widen(HalfStorage x) {
    return from_half_bits(x.bits);
}
MIPNERF_INLINE void narrow(float x, float& y) {
    y = x;
}
MIPNERF_INLINE void narrow(double x, double& y) {
    y = x;
}
MIPNERF_INLINE void narrow(float x, Bfloat16Storage& y) {
    y.bits = to_bfloat16_bits(x);
}
MIPNERF_INLINE void narrow(float x, HalfStorage& y) {
    y.bits = to_half_bits(x);
}

template <typename T, typename S>
struct CompositeInputs {
    int64_t samples;
    const S* rgb;         // [B, N, 3]
    const S* density;     // [B, N]
    const T* t_vals;      // [B, N+1]
    const T* directions;  // [B, 3]
    CompositeOptions<T> options;
};

template <typename T>
struct CompositeOutputs {
    T* rgb;       // [B, 3]
    T* distance;  // [B]
    T* acc;       // [B]
    T* weights;   // [B, N]
};

template <typename T, typename S>
struct CompositeGradients {
    const T* rgb;       // dL/d output; null: zero
    const T* distance;  // null: zero
    const T* acc;       // null: zero
    const T* weights;   // null: zero
    S* grad_rgb;
    S* grad_density;
    T* grad_t_vals;      // null: not wanted
    T* grad_directions;  // null: not wanted
};

// ---- rows ---------------------------------------------------------------------------------------

// The activated row: `raw` itself where there is nothing to do, otherwise written to `room`.
template <typename T, typename S>
MIPNERF_INLINE const T* density_row(const S* raw, int64_t samples, const CompositeOptions<T>& options,
                                    T* room) {
    const T bias = options.density_bias;
    switch (options.density_activation) {
        case DensityActivation::kNone:
            if constexpr (std::is_same_v<T, S>) return raw;
#pragma omp simd
            for (int64_t i = 0; i < samples; ++i) room[i] = widen(raw[i]);
            break;
        case DensityActivation::kSoftplus:
#pragma omp simd
            for (int64_t i = 0; i < samples; ++i)
                room[i] = activate_density<T>(widen(raw[i]), DensityActivation::kSoftplus, bias);
            break;
        case DensityActivation::kRelu:
#pragma omp simd
            for (int64_t i = 0; i < samples; ++i)
                room[i] = activate_density<T>(widen(raw[i]), DensityActivation::kRelu, bias);
            break;
    }
    return room;
}

template <typename T, typename S>
MIPNERF_INLINE const T* rgb_row(const S* raw, int64_t samples, const CompositeOptions<T>& options, T* room) {
    if (options.rgb_activation == RgbActivation::kSigmoid) {
        const T padding = options.rgb_padding;
#pragma omp simd
        for (int64_t i = 0; i < 3 * samples; ++i)
            room[i] = activate_rgb<T>(widen(raw[i]), RgbActivation::kSigmoid, padding);
        return room;
    }
    if constexpr (std::is_same_v<T, S>) return raw;
#pragma omp simd
    for (int64_t i = 0; i < 3 * samples; ++i) room[i] = widen(raw[i]);
    return room;
}

template <typename T>
MIPNERF_INLINE void depth_row(const T* density, const T* t, int64_t samples, T norm, T* depth) {
#pragma omp simd
    for (int64_t i = 0; i < samples; ++i)
        depth[i] = optical_depth(density[i], interval_length(t[i], t[i + 1], norm));
}

// before[i] = sum of depth[0..i-1] for i = 0..samples.
template <typename T>
MIPNERF_INLINE void sums_before(const T* depth, int64_t samples, T* before) {
    double sum = 0;
#pragma omp simd reduction(inscan, + : sum)
    for (int64_t i = 0; i < samples; ++i) {
        before[i] = static_cast<T>(sum);
#pragma omp scan exclusive(sum)
        sum += depth[i];
    }
    before[samples] = static_cast<T>(sum);
}

// after[i] = sum of value[i+1..samples-1].
template <typename T>
MIPNERF_INLINE void sums_after(const T* value, int64_t samples, T* after) {
    double sum = 0;
#pragma omp simd reduction(inscan, + : sum)
    for (int64_t i = 0; i < samples; ++i) {
        after[samples - 1 - i] = static_cast<T>(sum);
#pragma omp scan exclusive(sum)
        sum += value[samples - 1 - i];
    }
}

// ---- forward ------------------------------------------------------------------------------------

// Room for the rows of one ray, kept from ray to ray.
template <typename T>
class CompositeRoom {
  public:
    explicit CompositeRoom(int64_t samples)
        : numbers_(static_cast<size_t>(5 * (samples + 1) + 3 * samples)),
          depth(numbers_.data()),
          through(depth + samples + 1),
          density(through + samples + 1),
          weights(density + samples + 1),
          product(weights + samples + 1),
          rgb(product + samples + 1) {}

  private:
    std::vector<T> numbers_;

  public:
    T* const depth;    // [N], then T_{i+1} dL/dw_i, then dL/ddepth
    T* const through;  // [N+1] sums before, T_i, sums after
    T* const density;  // [N]
    T* const weights;  // [N]
    T* const product;  // [N] w_i dL/dw_i
    T* const rgb;      // [N, 3]
};

template <typename T, typename S>
MIPNERF_INLINE void composite_forward_ray(const CompositeInputs<T, S>& in, const CompositeOutputs<T>& out,
                                          const CompositeRoom<T>& room, int64_t ray) {
    const int64_t n = in.samples;
    const T* t = in.t_vals + ray * (n + 1);
    const T* density = density_row(in.density + ray * n, n, in.options, room.density);
    depth_row(density, t, n, direction_norm(in.directions + 3 * ray), room.depth);
    sums_before(room.depth, n, room.through);
    const T* rgb = rgb_row(in.rgb + ray * 3 * n, n, in.options, room.rgb);
    const T* depth = room.depth;
    const T* before = room.through;
    T* weights = out.weights + ray * n;
    T red = 0, green = 0, blue = 0, acc = 0, sum_middle = 0;
#pragma omp simd reduction(+ : red, green, blue, acc, sum_middle)
    for (int64_t i = 0; i < n; ++i) {
        const T w = transmittance(before[i]) * opacity(depth[i]);
        weights[i] = w;
        red += w * rgb[3 * i];
        green += w * rgb[3 * i + 1];
        blue += w * rgb[3 * i + 2];
        acc += w;
        sum_middle += w * interval_middle(t[i], t[i + 1]);
    }
    const T left = in.options.background * (T(1) - acc);
    out.rgb[3 * ray] = red + left;
    out.rgb[3 * ray + 1] = green + left;
    out.rgb[3 * ray + 2] = blue + left;
    out.acc[ray] = acc;
    out.distance[ray] = expected_distance(sum_middle, acc, t[0], t[n]).value;
}

// ---- backward -----------------------------------------------------------------------------------

// dL/dw as a function of the sample; needs the weights only for the distance.
template <typename T>
MIPNERF_INLINE WeightCotangent<T> weight_cotangent(const T* grad_rgb, const T* grad_distance,
                                                   const T* grad_acc, int64_t ray, T background,
                                                   const T* weights, const T* t, int64_t n) {
    WeightCotangent<T> cotangent{{0, 0, 0}, 0, 0, 0};
    if (grad_rgb != nullptr) {
        for (int k = 0; k < 3; ++k) cotangent.rgb[k] = grad_rgb[3 * ray + k];
        cotangent.constant = -background * (cotangent.rgb[0] + cotangent.rgb[1] + cotangent.rgb[2]);
    }
    if (grad_acc != nullptr) cotangent.constant += grad_acc[ray];
    if (grad_distance != nullptr) {
        T acc = 0, sum_middle = 0;
#pragma omp simd reduction(+ : acc, sum_middle)
        for (int64_t i = 0; i < n; ++i) {
            acc += weights[i];
            sum_middle += weights[i] * interval_middle(t[i], t[i + 1]);
        }
        const Distance<T> distance = expected_distance(sum_middle, acc, t[0], t[n]);
        cotangent.distance = distance.value;
        if (distance.is_inside) cotangent.towards_distance = grad_distance[ray] / acc;
    }
    return cotangent;
}

template <typename T, typename S>
MIPNERF_INLINE void store_grad_rgb(const T* weights, const WeightCotangent<T>& cotangent, const S* raw,
                                   const CompositeOptions<T>& options, int64_t n, T* room, S* grad) {
    const T red = cotangent.rgb[0], green = cotangent.rgb[1], blue = cotangent.rgb[2];
    T* target = room;
    if constexpr (std::is_same_v<T, S>) target = grad;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        target[3 * i] = weights[i] * red;
        target[3 * i + 1] = weights[i] * green;
        target[3 * i + 2] = weights[i] * blue;
    }
    if (options.rgb_activation == RgbActivation::kSigmoid) {
        const T padding = options.rgb_padding;
#pragma omp simd
        for (int64_t i = 0; i < 3 * n; ++i)
            narrow(target[i] * activate_rgb_derivative<T>(widen(raw[i]), RgbActivation::kSigmoid, padding),
                   grad[i]);
    } else if constexpr (!std::is_same_v<T, S>) {
#pragma omp simd
        for (int64_t i = 0; i < 3 * n; ++i) narrow(target[i], grad[i]);
    }
}

template <typename T, typename S>
MIPNERF_INLINE void store_grad_density(const T* grad_depth, const T* density, const T* t, T norm,
                                       const S* raw, const CompositeOptions<T>& options, int64_t n, S* grad) {
    const T bias = options.density_bias;
    if (options.density_activation == DensityActivation::kSoftplus) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            narrow(grad_depth[i] *
                       optical_depth_by_density(density[i], interval_length(t[i], t[i + 1], norm)) *
                       activate_density_derivative<T>(widen(raw[i]), DensityActivation::kSoftplus, bias),
                   grad[i]);
    } else if (options.density_activation == DensityActivation::kRelu) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            narrow(grad_depth[i] *
                       optical_depth_by_density(density[i], interval_length(t[i], t[i + 1], norm)) *
                       activate_density_derivative<T>(widen(raw[i]), DensityActivation::kRelu, bias),
                   grad[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            narrow(
                grad_depth[i] * optical_depth_by_density(density[i], interval_length(t[i], t[i + 1], norm)),
                grad[i]);
    }
}

// dL/dt of the fenceposts, and dL/d||d|| as the result: through the lengths, and through the middles that the
// distance averages.
template <typename T>
MIPNERF_INLINE T store_grad_t_vals(const T* grad_depth, const T* density, const T* weights, const T* t,
                                   T norm, T towards_distance, int64_t n, T* room, T* grad_t) {
    T* const grad_length = room;
    T grad_norm = 0;
#pragma omp simd reduction(+ : grad_norm)
    for (int64_t i = 0; i < n; ++i) {
        grad_length[i] = grad_depth[i] * optical_depth_by_length(density[i]);
        grad_norm += grad_length[i] * (t[i + 1] - t[i]);
    }
    const T half = T(0.5) * towards_distance;
    grad_t[0] = half * weights[0] - grad_length[0] * norm;
#pragma omp simd
    for (int64_t i = 1; i < n; ++i)
        grad_t[i] = half * (weights[i - 1] + weights[i]) + (grad_length[i - 1] - grad_length[i]) * norm;
    grad_t[n] = half * weights[n - 1] + grad_length[n - 1] * norm;
    return grad_norm;
}

template <typename T, typename S>
MIPNERF_INLINE void composite_backward_ray(const CompositeInputs<T, S>& in,
                                           const CompositeGradients<T, S>& grads,
                                           const CompositeRoom<T>& room, int64_t ray) {
    const int64_t n = in.samples;
    const T* t = in.t_vals + ray * (n + 1);
    const T* direction = in.directions + 3 * ray;
    const T norm = direction_norm(direction);
    T* const depth = room.depth;
    T* const through = room.through;
    T* const weights = room.weights;
    T* const product = room.product;

    const T* density = density_row(in.density + ray * n, n, in.options, room.density);
    depth_row(density, t, n, norm, depth);
    sums_before(depth, n, through);
#pragma omp simd
    for (int64_t i = 0; i <= n; ++i) through[i] = transmittance(through[i]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) weights[i] = through[i] * opacity(depth[i]);

    const WeightCotangent<T> cotangent =
        weight_cotangent(grads.rgb, grads.distance, grads.acc, ray, in.options.background, weights, t, n);
    const T* rgb = rgb_row(in.rgb + ray * 3 * n, n, in.options, room.rgb);
    T* const grad_weight = depth;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        grad_weight[i] =
            cotangent(rgb[3 * i], rgb[3 * i + 1], rgb[3 * i + 2], interval_middle(t[i], t[i + 1]));
    if (grads.weights != nullptr) {
        const T* extra = grads.weights + ray * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) grad_weight[i] += extra[i];
    }
    T* const own = depth;  // the part of dL/ddepth_i that comes through its own weight
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        product[i] = weights[i] * grad_weight[i];
        own[i] = through[i + 1] * grad_weight[i];
    }
    T* const after = through;
    sums_after(product, n, after);
    T* const grad_depth = depth;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad_depth[i] = own[i] - after[i];

    store_grad_rgb(weights, cotangent, in.rgb + ray * 3 * n, in.options, n, room.rgb,
                   grads.grad_rgb + ray * 3 * n);
    store_grad_density(grad_depth, density, t, norm, in.density + ray * n, in.options, n,
                       grads.grad_density + ray * n);
    if (grads.grad_t_vals != nullptr) {
        const T grad_norm =
            store_grad_t_vals(grad_depth, density, weights, t, norm, cotangent.towards_distance, n,
                              room.product, grads.grad_t_vals + ray * (n + 1));
        for (int k = 0; k < 3; ++k)
            grads.grad_directions[3 * ray + k] = norm > T(0) ? grad_norm * direction[k] / norm : T(0);
    }
}

}  // namespace mipnerf
