// The CPU loops of resampling: vectorised along a ray. No torch.
//
// The inversion searches nothing. Positions are all but evenly spaced, so the first position at or above a
// value of the CDF is next to its product with M; one pass over the edges notes where each interval begins
// among the positions, one pass over the positions carries that forward.
#pragma once

#include <cstdint>
#include <vector>

#include "resample_math.h"

#ifndef MIPNERF_INLINE
#define MIPNERF_INLINE inline __attribute__((always_inline))
#endif

namespace mipnerf {

template <typename T>
struct ResampleInputs {
    int64_t samples;         // N
    int64_t num_fenceposts;  // M
    const T* t_vals;         // [B, N+1]
    const T* u;              // [B, M], or null for even positions
    double padding;
};

// Room for one ray, kept from ray to ray.
template <typename T>
class ResampleRoom {
  public:
    ResampleRoom(const ResampleInputs<T>& in, const Positions<T>& positions)
        : numbers_(static_cast<size_t>(2 * in.samples + 1 + in.num_fenceposts + kGuard)),
          indices_(static_cast<size_t>(in.samples + 1 + in.num_fenceposts + kGuard)),
          weights(numbers_.data()),
          cdf(weights + in.samples),
          position(cdf + in.samples + 1),
          first(indices_.data()),
          interval(first + in.samples + 1) {
        const int64_t m = in.num_fenceposts;
        for (int k = 0; k < m; ++k) position[k] = positions.even(k);
        for (int64_t k = m; k < m + kGuard; ++k) position[k] = T(2);  // above every value of the CDF
    }

  private:
    static constexpr int64_t kGuard = 4;
    std::vector<T> numbers_;
    std::vector<int32_t> indices_;

  public:
    T* const weights;         // [N] blurred, padded
    T* const cdf;             // [N+1]
    T* const position;        // [M], then guards
    int32_t* const first;     // [N+1] the first position at or above an edge of the CDF
    int32_t* const interval;  // [M], one guard
};

template <typename T>
MIPNERF_INLINE void resample_ray(const ResampleInputs<T>& in, const Positions<T>& positions,
                                 const ResampleRoom<T>& room, int64_t ray, const T* weights, T* new_t) {
    const int n = static_cast<int>(in.samples), m = static_cast<int>(in.num_fenceposts);
    const T* t = in.t_vals + ray * (in.samples + 1);
    const T padding = static_cast<T>(in.padding);
    T* const blurred = room.weights;
    T* const cdf = room.cdf;
    T* const position = room.position;
    int32_t* const first = room.first;
    int32_t* const interval = room.interval;

    blurred[0] = blurred_weight(weights[0], weights[0], weights[n > 1 ? 1 : 0], padding);
#pragma omp simd
    for (int i = 1; i < n - 1; ++i)
        blurred[i] = blurred_weight(weights[i - 1], weights[i], weights[i + 1], padding);
    if (n > 1) blurred[n - 1] = blurred_weight(weights[n - 2], weights[n - 1], weights[n - 1], padding);

    double total = 0;  // in double, as torch.cumsum accumulates
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; ++i) total += blurred[i];
    const double missing = missing_weight(total, n);
    const double scale = 1 / (total + missing * static_cast<double>(n));
    double sum = 0;
#pragma omp simd reduction(inscan, + : sum)
    for (int i = 0; i < n; ++i) {
        const T value = static_cast<T>(sum * scale);
        cdf[i] = value > T(1) ? T(1) : value;
#pragma omp scan exclusive(sum)
        sum += blurred[i] + missing;
    }
    cdf[n] = 1;

    if (in.u != nullptr) {
        const T* u = in.u + ray * in.num_fenceposts;
#pragma omp simd
        for (int k = 0; k < m; ++k) position[k] = positions.stratified(k, u[k]);
    }
    // p_k lies between k/M and (k+1)/M (even positions: at k/(M-1)), so the wanted k is one of the two from
    // the guess on; the hundredth outweighs every rounding, at the price of one more step.
    const T guess_scale = in.u != nullptr ? positions.count : positions.count - T(1);
#pragma omp simd
    for (int i = 1; i < n; ++i) {
        T guess = cdf[i] * guess_scale - T(0.01);
        guess = guess > T(0) ? guess : T(0);  // and where it is NaN
        guess = guess < positions.count ? guess : positions.count;
        int32_t k = static_cast<int32_t>(guess);
        k += position[k] < cdf[i];
        k += position[k] < cdf[i];
        first[i] = k;
    }
    for (int k = 0; k <= m; ++k) interval[k] = 0;
    for (int i = 1; i < n; ++i) interval[first[i]] = i;
    int32_t current = 0;
    for (int k = 0; k < m; ++k) {
        current = interval[k] > current ? interval[k] : current;
        interval[k] = current;
    }
#pragma omp simd
    for (int k = 0; k < m; ++k) {
        const int32_t i = interval[k];
        new_t[k] = invert_interval(position[k], cdf[i], cdf[i + 1], t[i], t[i + 1]);
    }
}

}  // namespace mipnerf
