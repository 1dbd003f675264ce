// The CPU loops of compositing: vectorised along the samples of a ray, the sums before and after a sample
// included. Sums are of blocks, and of the blocks in double, so that their error does not grow with N. No
// torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../common/storage.h"
#include "composite_math.h"

namespace mipnerf {

// Rows of rgb and density, and of their gradients, lie in memory as they are computed with or in 16 bits.

// Numbers first..first + count - 1: where they lie, or widened into `room`.
template <typename T>
MIPNERF_INLINE const T* wide_row(const void* from, Storage storage, int64_t first, int64_t count, T* room) {
    if (storage == Storage::kSame) return static_cast<const T*>(from) + first;
    load_numbers(static_cast<const uint16_t*>(from) + first, storage, room, count);
    return room;
}

// Where a row is to be written: its place in memory, or `room`, from where store_row() narrows it.
template <typename T>
MIPNERF_INLINE T* row_to_write(void* to, Storage storage, int64_t first, T* room) {
    return storage == Storage::kSame ? static_cast<T*>(to) + first : room;
}

template <typename T>
MIPNERF_INLINE void store_row(const T* room, void* to, Storage storage, int64_t first, int64_t count) {
    if (storage != Storage::kSame) store_numbers(static_cast<uint16_t*>(to) + first, storage, room, count);
}

constexpr int64_t kSumBlock = 64;

template <typename T>
struct CompositeInputs {
    int64_t samples;
    Storage storage;
    const void* rgb;      // [B, N, 3]
    const void* density;  // [B, N]
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

template <typename T>
struct CompositeGradients {
    const T* rgb;       // dL/d output; null: zero
    const T* distance;  // null: zero
    const T* acc;       // null: zero
    const T* weights;   // null: zero
    void* grad_rgb;     // stored as rgb and density are
    void* grad_density;
    T* grad_t_vals;      // null: not wanted
    T* grad_directions;  // null: not wanted
};

// ---- memory -----------------------------------------------------------------------------------

// Asks for what a later ray reads. A row is short (a few hundred bytes), so the processor's own prefetcher
// hardly gets going before it ends.
constexpr int64_t kPrefetchRays = 4;

template <bool kToWrite = false>
MIPNERF_INLINE void prefetch_bytes(const void* row, int64_t begin, int64_t bytes) {
    const char* const from = static_cast<const char*>(row) + begin;
    for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(from + offset, kToWrite);
}

template <bool kToWrite = false, typename S>
MIPNERF_INLINE void prefetch_row(const S* row, int64_t count) {
    prefetch_bytes<kToWrite>(row, 0, count * static_cast<int64_t>(sizeof(S)));
}

// Those of the samples of a ray in [B, N, 3] and [B, N].
template <typename T, bool kToWrite = false>
MIPNERF_INLINE void prefetch_samples(const void* rgb, const void* density, Storage storage, int64_t n,
                                     int64_t ray) {
    const int64_t bytes = n * bytes_of(storage, sizeof(T));
    prefetch_bytes<kToWrite>(rgb, 3 * ray * bytes, 3 * bytes);
    prefetch_bytes<kToWrite>(density, ray * bytes, bytes);
}

template <typename T>
MIPNERF_INLINE void prefetch_ray(const CompositeInputs<T>& in, int64_t ray, int64_t end) {
    if (ray >= end) return;
    prefetch_samples<T>(in.rgb, in.density, in.storage, in.samples, ray);
    prefetch_row(in.t_vals + ray * (in.samples + 1), in.samples + 1);
}

// ---- rows ---------------------------------------------------------------------------------------

// The activated row: `raw` itself where there is nothing to do, otherwise written to `room`. Where the slopes
// are wanted and are not all one they are written to `slopes`.
template <bool kSlopes, DensityActivation kActivation, typename T>
MIPNERF_INLINE void activate_density_row(const T* raw, int64_t samples, T bias, T* room, T* slopes) {
#pragma omp simd
    for (int64_t i = 0; i < samples; ++i) {
        const Activated<T> activated = activate_density<T>(raw[i], kActivation, bias);
        room[i] = activated.value;
        if (kSlopes) slopes[i] = activated.slope;
    }
}

template <bool kSlopes, typename T>
MIPNERF_INLINE const T* density_row(const T* raw, int64_t samples, const CompositeOptions<T>& options,
                                    T* room, T* slopes) {
    if (options.density_activation == DensityActivation::kNone) return raw;
    if (options.density_activation == DensityActivation::kSoftplus)
        activate_density_row<kSlopes, DensityActivation::kSoftplus>(raw, samples, options.density_bias, room,
                                                                    slopes);
    else
        activate_density_row<kSlopes, DensityActivation::kRelu>(raw, samples, options.density_bias, room,
                                                                slopes);
    return room;
}

template <bool kSlopes, typename T>
MIPNERF_INLINE const T* rgb_row(const T* raw, int64_t samples, const CompositeOptions<T>& options, T* room,
                                T* slopes) {
    if (options.rgb_activation == RgbActivation::kNone) return raw;
#pragma omp simd
    for (int64_t i = 0; i < 3 * samples; ++i) {
        const Activated<T> activated = activate_rgb<T>(raw[i], RgbActivation::kSigmoid, options.rgb_padding);
        room[i] = activated.value;
        if (kSlopes) slopes[i] = activated.slope;
    }
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
    for (int64_t begin = 0; begin < samples; begin += kSumBlock) {
        const int64_t count = begin + kSumBlock < samples ? kSumBlock : samples - begin;
        const T base = static_cast<T>(sum);
        T partial = 0;
#pragma omp simd reduction(inscan, + : partial)
        for (int64_t i = 0; i < count; ++i) {
            before[begin + i] = base + partial;
#pragma omp scan exclusive(partial)
            partial += depth[begin + i];
        }
        sum += partial;
    }
    before[samples] = static_cast<T>(sum);
}

// after[i] = sum of value[i+1..samples-1].
template <typename T>
MIPNERF_INLINE void sums_after(const T* value, int64_t samples, T* after) {
    double sum = 0;
    for (int64_t begin = samples - 1; begin >= 0; begin -= kSumBlock) {
        const int64_t count = begin + 1 < kSumBlock ? begin + 1 : kSumBlock;
        const T base = static_cast<T>(sum);
        T partial = 0;
#pragma omp simd reduction(inscan, + : partial)
        for (int64_t i = 0; i < count; ++i) {
            after[begin - i] = base + partial;
#pragma omp scan exclusive(partial)
            partial += value[begin - i];
        }
        sum += partial;
    }
}

// The sum of sixteen numbers, by halves: in vectors, because the compiler adds them one by one.
template <typename T>
MIPNERF_INLINE T halving_sum(const T (&lanes)[16]) {
    typedef T Eight __attribute__((vector_size(8 * sizeof(T))));
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    Eight low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + 8, sizeof(high));
    const Eight eight = low + high;
    Four four[2];
    std::memcpy(four, &eight, sizeof(eight));
    const Four sums = four[0] + four[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// ---- forward ------------------------------------------------------------------------------------

// Room for the rows of one ray, kept from ray to ray.
template <typename T>
class CompositeRoom {
  public:
    explicit CompositeRoom(int64_t samples)
        : numbers_(static_cast<size_t>(6 * (samples + 1) + 6 * samples)),
          depth(numbers_.data()),
          through(depth + samples + 1),
          density(through + samples + 1),
          weights(density + samples + 1),
          product(weights + samples + 1),
          density_slope(product + samples + 1),
          rgb(density_slope + samples + 1),
          rgb_slope(rgb + 3 * samples) {}

  private:
    std::vector<T> numbers_;

  public:
    T* const depth;    // [N], then T_{i+1} dL/dw_i, then dL/ddepth
    T* const through;  // [N+1] sums before, T_i, sums after
    T* const density;  // [N]
    T* const weights;  // [N]
    T* const product;  // [N] w_i dL/dw_i, then dL/ddensity
    T* const density_slope;
    T* const rgb;  // [N, 3]
    T* const rgb_slope;
};

// Adds w c (three of them), w and w m of the samples begin..end-1 to sums. Sixteen running sums of each,
// halved at the end: what the compiler makes of a reduction adds the lanes of a vector one after the other,
// which takes about as long as the samples of a ray.
template <typename T>
MIPNERF_INLINE void add_weighted(const T* weights, const T* rgb, const T* t, int64_t begin, int64_t end,
                                 double (&sums)[5]) {
    constexpr int kLanes = 16;
    alignas(64) T red[kLanes] = {}, green[kLanes] = {}, blue[kLanes] = {}, acc[kLanes] = {},
                  middles[kLanes] = {};
    for (int64_t first = begin; first < end; first += kLanes) {
        const T* w = weights + first;
        const T* c = rgb + 3 * first;
        const T* fence = t + first;
        if (first + kLanes <= end) {
#pragma omp simd
            for (int i = 0; i < kLanes; ++i) {
                red[i] += w[i] * c[3 * i];
                green[i] += w[i] * c[3 * i + 1];
                blue[i] += w[i] * c[3 * i + 2];
                acc[i] += w[i];
                middles[i] += w[i] * interval_middle(fence[i], fence[i + 1]);
            }
        } else {
            for (int i = 0; i < static_cast<int>(end - first); ++i) {
                red[i] += w[i] * c[3 * i];
                green[i] += w[i] * c[3 * i + 1];
                blue[i] += w[i] * c[3 * i + 2];
                acc[i] += w[i];
                middles[i] += w[i] * interval_middle(fence[i], fence[i + 1]);
            }
        }
    }
    sums[0] += halving_sum(red);
    sums[1] += halving_sum(green);
    sums[2] += halving_sum(blue);
    sums[3] += halving_sum(acc);
    sums[4] += halving_sum(middles);
}

template <typename T>
MIPNERF_INLINE void composite_forward_ray(const CompositeInputs<T>& in, const CompositeOutputs<T>& out,
                                          const CompositeRoom<T>& room, int64_t ray) {
    const int64_t n = in.samples;
    const T* t = in.t_vals + ray * (n + 1);
    const T* density = density_row<false>(wide_row(in.density, in.storage, ray * n, n, room.density), n,
                                          in.options, room.density, room.density_slope);
    depth_row(density, t, n, direction_norm(in.directions + 3 * ray), room.depth);
    sums_before(room.depth, n, room.through);
    const T* rgb = rgb_row<false>(wide_row(in.rgb, in.storage, ray * 3 * n, 3 * n, room.rgb), n, in.options,
                                  room.rgb, room.rgb_slope);
    const T* depth = room.depth;
    const T* before = room.through;
    T* weights = out.weights + ray * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) weights[i] = transmittance(before[i]) * opacity(depth[i]);
    double sums[5] = {};
    for (int64_t begin = 0; begin < n; begin += kSumBlock)
        add_weighted(weights, rgb, t, begin, std::min(begin + kSumBlock, n), sums);
    const T acc = static_cast<T>(sums[3]);
    const T left = in.options.background * (T(1) - acc);
    for (int k = 0; k < 3; ++k) out.rgb[3 * ray + k] = static_cast<T>(sums[k]) + left;
    out.acc[ray] = acc;
    out.distance[ray] = expected_distance(static_cast<T>(sums[4]), acc, t[0], t[n]).value;
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
        double sum_weights = 0, sum_middles = 0;
#pragma omp simd reduction(+ : sum_weights, sum_middles)
        for (int64_t i = 0; i < n; ++i) {
            sum_weights += weights[i];
            sum_middles += weights[i] * interval_middle(t[i], t[i + 1]);
        }
        const T acc = static_cast<T>(sum_weights);
        const Distance<T> distance = expected_distance(static_cast<T>(sum_middles), acc, t[0], t[n]);
        cotangent.distance = distance.value;
        if (distance.is_inside) cotangent.towards_distance = grad_distance[ray] / acc;
    }
    return cotangent;
}

template <typename T>
MIPNERF_INLINE void grad_rgb_row(const T* weights, const WeightCotangent<T>& cotangent, const T* slopes,
                                 const CompositeOptions<T>& options, int64_t n, T* grad) {
    const T red = cotangent.rgb[0], green = cotangent.rgb[1], blue = cotangent.rgb[2];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        grad[3 * i] = weights[i] * red;
        grad[3 * i + 1] = weights[i] * green;
        grad[3 * i + 2] = weights[i] * blue;
    }
    if (options.rgb_activation != RgbActivation::kNone) {
#pragma omp simd
        for (int64_t i = 0; i < 3 * n; ++i) grad[i] = grad[i] * slopes[i];
    }
}

template <typename T>
MIPNERF_INLINE void grad_density_row(const T* grad_depth, const T* density, const T* t, T norm,
                                     const T* slopes, const CompositeOptions<T>& options, int64_t n,
                                     T* grad) {
    if (options.density_activation != DensityActivation::kNone) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            grad[i] = grad_depth[i] *
                      optical_depth_by_density(density[i], interval_length(t[i], t[i + 1], norm)) * slopes[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
            grad[i] =
                grad_depth[i] * optical_depth_by_density(density[i], interval_length(t[i], t[i + 1], norm));
    }
}

// dL/dt of the fenceposts, and dL/d||d|| as the result: through the lengths, and through the middles that the
// distance averages.
template <typename T>
MIPNERF_INLINE T store_grad_t_vals(const T* grad_depth, const T* density, const T* weights, const T* t,
                                   T norm, T towards_distance, int64_t n, T* room, T* grad_t) {
    T* const grad_length = room;
    double grad_norm = 0;
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
    return static_cast<T>(grad_norm);
}

template <typename T>
MIPNERF_INLINE void composite_backward_ray(const CompositeInputs<T>& in, const CompositeGradients<T>& grads,
                                           const CompositeRoom<T>& room, int64_t ray) {
    const int64_t n = in.samples;
    const T* t = in.t_vals + ray * (n + 1);
    const T* direction = in.directions + 3 * ray;
    const T norm = direction_norm(direction);
    T* const depth = room.depth;
    T* const through = room.through;
    T* const weights = room.weights;
    T* const product = room.product;

    const T* density = density_row<true>(wide_row(in.density, in.storage, ray * n, n, room.density), n,
                                         in.options, room.density, room.density_slope);
    depth_row(density, t, n, norm, depth);
    sums_before(depth, n, through);
#pragma omp simd
    for (int64_t i = 0; i <= n; ++i) through[i] = transmittance(through[i]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) weights[i] = through[i] * opacity(depth[i]);

    const WeightCotangent<T> cotangent =
        weight_cotangent(grads.rgb, grads.distance, grads.acc, ray, in.options.background, weights, t, n);
    const T* rgb = rgb_row<true>(wide_row(in.rgb, in.storage, ray * 3 * n, 3 * n, room.rgb), n, in.options,
                                 room.rgb, room.rgb_slope);
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

    T* const grad_rgb = row_to_write(grads.grad_rgb, in.storage, ray * 3 * n, room.rgb);
    grad_rgb_row(weights, cotangent, room.rgb_slope, in.options, n, grad_rgb);
    store_row(grad_rgb, grads.grad_rgb, in.storage, ray * 3 * n, 3 * n);
    T* const grad_density = row_to_write(grads.grad_density, in.storage, ray * n, room.product);
    grad_density_row(grad_depth, density, t, norm, room.density_slope, in.options, n, grad_density);
    store_row(grad_density, grads.grad_density, in.storage, ray * n, n);
    if (grads.grad_t_vals != nullptr) {
        const T grad_norm =
            store_grad_t_vals(grad_depth, density, weights, t, norm, cotangent.towards_distance, n,
                              room.product, grads.grad_t_vals + ray * (n + 1));
        for (int k = 0; k < 3; ++k)
            grads.grad_directions[3 * ray + k] = norm > T(0) ? grad_norm * direction[k] / norm : T(0);
    }
}

}  // namespace mipnerf
