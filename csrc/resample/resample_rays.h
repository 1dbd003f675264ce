// The CPU loops of resampling. No torch.
//
// Four rays at a time, step by step: what one step writes in words another reads in vectors, and the
// processor would wait for it were the steps of one ray to follow each other. The inversion searches nothing.
// Positions are all but evenly spaced, so the first position at or above a value of the CDF is next to its
// product with M; one pass over the edges notes where each interval begins among the positions, one pass over
// the positions carries that forward.
#pragma once

#include <cstdint>
#include <vector>

#include "resample_math.h"

#ifndef MIPNERF_INLINE
#define MIPNERF_INLINE inline __attribute__((always_inline))
#endif

namespace mipnerf {

constexpr int kResampleRays = 4;

template <typename T>
struct ResampleInputs {
    int64_t samples;         // N
    int64_t num_fenceposts;  // M
    const T* t_vals;         // [B, N+1]
    const T* u;              // [B, M], or null for even positions
    double padding;
};

// Room for a few rays, kept from block to block.
template <typename T>
class ResampleRoom {
    static constexpr int kGuard = 4;

  public:
    struct Ray {
        T* padded;          // [N+2] the weights with their ends repeated
        T* blurred;         // [N]
        T* cdf;             // [N+1]
        T* position;        // [M], then guards above every value of the CDF
        int32_t* first;     // [N] the first position at or above an edge of the CDF
        int32_t* interval;  // [M+1] where an interval begins its number, elsewhere 0
    };

    ResampleRoom(const ResampleInputs<T>& in, const Positions<T>& positions) {
        const int64_t n = in.samples, m = in.num_fenceposts;
        const int64_t num_numbers = 3 * n + 3 + m + kGuard, num_indices = n + m + 1;
        numbers_.resize(static_cast<size_t>(kResampleRays * num_numbers));
        indices_.resize(static_cast<size_t>(kResampleRays * num_indices));
        for (int q = 0; q < kResampleRays; ++q) {
            Ray& ray = rays[q];
            ray.padded = numbers_.data() + q * num_numbers;
            ray.blurred = ray.padded + n + 2;
            ray.cdf = ray.blurred + n;
            ray.position = ray.cdf + n + 1;
            ray.first = indices_.data() + q * num_indices;
            ray.interval = ray.first + n;
            for (int32_t k = 0; k < m; ++k) ray.position[k] = positions.even(k);
            for (int64_t k = m; k < m + kGuard; ++k) ray.position[k] = T(2);
        }
    }

    Ray rays[kResampleRays];

  private:
    std::vector<T> numbers_;
    std::vector<int32_t> indices_;
};

// ---- steps of one ray ----------------------------------------------------------------------------

template <typename T>
MIPNERF_INLINE void pad_weights(const T* weights, int n, T* padded) {
    padded[0] = weights[0];
    for (int i = 0; i < n; ++i) padded[i + 1] = weights[i];
    padded[n + 1] = weights[n - 1];
}

template <typename T>
MIPNERF_INLINE void blur_weights(const T* padded, int n, T padding, T* blurred) {
#pragma omp simd
    for (int i = 0; i < n; ++i) blurred[i] = blurred_weight(padded[i], padded[i + 1], padded[i + 2], padding);
}

template <typename T>
MIPNERF_INLINE void accumulate_cdf(const T* blurred, int n, T* cdf) {
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
}

template <typename T>
MIPNERF_INLINE void place_positions(const Positions<T>& positions, const T* u, int m, T* position) {
#pragma omp simd
    for (int k = 0; k < m; ++k) position[k] = positions.stratified(k, u[k]);
}

// p_k lies between k/M and (k+1)/M (even positions: at k/(M-1)), so the wanted k is one of the two from the
// guess on; the hundredth outweighs every rounding, at the price of one more step.
template <typename T>
MIPNERF_INLINE void find_first_positions(const T* cdf, const T* position, int n, T guess_scale, T count,
                                         int32_t* first) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        T guess = cdf[i] * guess_scale - T(0.01);
        guess = guess > T(0) ? guess : T(0);  // and where it is NaN
        guess = guess < count ? guess : count;
        int32_t k = static_cast<int32_t>(guess);
        k += position[k] < cdf[i];
        k += position[k] < cdf[i];
        first[i] = k;
    }
}

MIPNERF_INLINE void mark_intervals(const int32_t* first, int n, int m, int32_t* interval) {
    for (int k = 0; k <= m; ++k) interval[k] = 0;
    for (int i = 1; i < n; ++i) interval[first[i]] = i;
}

template <typename T>
MIPNERF_INLINE void invert_cdf(const int32_t* interval, const T* position, const T* cdf, const T* t, int m,
                               T* new_t) {
    int32_t i = 0;
    for (int k = 0; k < m; ++k) {
        i = interval[k] > i ? interval[k] : i;
        new_t[k] = invert_interval(position[k], cdf[i], cdf[i + 1], t[i], t[i + 1]);
    }
}

// ---- a block of rays -----------------------------------------------------------------------------

// Rays begin <= ray < end, at most kResampleRays of them; weights [B, N], new_t_vals [B, M].
template <typename T>
MIPNERF_INLINE void resample_block(const ResampleInputs<T>& in, const Positions<T>& positions,
                                   const ResampleRoom<T>& room, int64_t begin, int64_t end, const T* weights,
                                   T* new_t_vals) {
    const int n = static_cast<int>(in.samples), m = static_cast<int>(in.num_fenceposts);
    const int count = static_cast<int>(end - begin);
    const auto& rays = room.rays;
    const T guess_scale = in.u != nullptr ? positions.count : positions.count - T(1);
    for (int q = 0; q < count; ++q) pad_weights(weights + (begin + q) * in.samples, n, rays[q].padded);
    for (int q = 0; q < count; ++q)
        blur_weights(rays[q].padded, n, static_cast<T>(in.padding), rays[q].blurred);
    for (int q = 0; q < count; ++q) accumulate_cdf(rays[q].blurred, n, rays[q].cdf);
    if (in.u != nullptr)
        for (int q = 0; q < count; ++q)
            place_positions(positions, in.u + (begin + q) * in.num_fenceposts, m, rays[q].position);
    for (int q = 0; q < count; ++q)
        find_first_positions(rays[q].cdf, rays[q].position, n, guess_scale, positions.count, rays[q].first);
    for (int q = 0; q < count; ++q) mark_intervals(rays[q].first, n, m, rays[q].interval);
    for (int q = 0; q < count; ++q)
        invert_cdf(rays[q].interval, rays[q].position, rays[q].cdf,
                   in.t_vals + (begin + q) * (in.samples + 1), m,
                   new_t_vals + (begin + q) * in.num_fenceposts);
}

}  // namespace mipnerf
