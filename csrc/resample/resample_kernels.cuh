// The CUDA kernel of resampling, and the device functions that it shares with the fused kernel of the coarse
// level. One warp per ray: four weights in a row per lane and tile, blurred with the neighbours' by shuffles;
// the CDF by a scan of the warp into shared memory; then a lane searches for every 32nd new fencepost.
#pragma once

#include "../common/device.cuh"
#include "resample_launch.h"
#include "resample_math.h"

namespace mipnerf {

constexpr int kPerLane = 4;
constexpr int kTile = kPerLane * kWarpSize;

// ---- runs: numbers in a row of one lane ---------------------------------------------------------

// row[first .. first + kCount - 1], zero from `end` on. Aligned: `end` and `first` are multiples of four, and
// so is the row's address, in numbers.
template <bool kAligned, int kCount, typename T>
MIPNERF_DEVICE Floats<kCount> load_run(const T* row, int first, int end) {
    Floats<kCount> run;
    if constexpr (kAligned) {
#pragma unroll
        for (int i = 0; i < kCount; i += kPerLane) {
            Floats<kPerLane> part = {};
            if (first < end) part = pack_to_float(load_pack<kPerLane>(row + first + i));
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) run.value[i + j] = part.value[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            run.value[i] = first + i < end ? to_float(load_pack<1>(row + first + i).value[0]) : 0.0f;
    }
    return run;
}

template <bool kAligned, typename T, int kCount>
MIPNERF_DEVICE void store_run(T* row, int first, int end, const Floats<kCount>& run) {
    if constexpr (kAligned) {
        if (first >= end) return;
#pragma unroll
        for (int i = 0; i < kCount; i += kPerLane) {
            Floats<kPerLane> part;
#pragma unroll
            for (int j = 0; j < kPerLane; ++j) part.value[j] = run.value[i + j];
            store_pack(row + first + i, pack_from_float<T>(part));
        }
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (first + i < end) row[first + i] = from_float<T>(run.value[i]);
    }
}

// ---- what a warp keeps in shared memory ---------------------------------------------------------

struct ResampleShared {
    float* cdf;         // [N] rounded up to four: weights, then blurred weights, then cdf_1 .. cdf_N
    float* fenceposts;  // [N+1]

    MIPNERF_HOST_DEVICE static int pitch(int samples) { return (samples + kPerLane) / kPerLane * kPerLane; }
    static std::size_t bytes(int samples) {
        return 2 * sizeof(float) * static_cast<std::size_t>(pitch(samples));
    }

    MIPNERF_DEVICE explicit ResampleShared(int samples)
        : cdf(shared_memory<float>() + 2 * pitch(samples) * warp_index()), fenceposts(cdf + pitch(samples)) {}

    MIPNERF_DEVICE void load_fenceposts(const float* t_row, int samples) const {
        for (int i = lane_index(); i <= samples; i += kWarpSize)
            fenceposts[i] = load_pack<1>(t_row + i).value[0];
    }
};

struct ResampleSettings {
    int samples;
    int num_fenceposts;
    int search_step;  // the largest power of two not above N - 1, or 0
    float padding;
    Positions<float> positions;

    ResampleSettings(int samples_, int num_fenceposts_, float padding_)
        : samples(samples_),
          num_fenceposts(num_fenceposts_),
          search_step(samples_ > 1 ? 1 : 0),
          padding(padding_),
          positions(num_fenceposts_) {
        while (search_step > 0 && 2 * search_step <= samples_ - 1) search_step *= 2;
    }
};

// ---- one ray ------------------------------------------------------------------------------------

// Blurred and padded weights into shared.cdf; returns their sum. The source may be shared.cdf itself: a lane
// reads its own slots and the one after them, whose owner writes it a tile later.
template <bool kAligned, bool kFromShared>
MIPNERF_DEVICE float blur_weights_of_warp(const ResampleSettings& settings, const ResampleShared& shared,
                                          const float* weights) {
    const int lane = lane_index();
    const int n = settings.samples;
    float sum = 0, last_of_tile = 0;
    for (int tile = 0; tile < n; tile += kTile) {
        const int first = tile + kPerLane * lane;
        Floats<kPerLane> w = {};
        float beyond = 0;
        if constexpr (kFromShared) {
            if (first < n) w = pack_to_float(load_pack_shared<kPerLane>(weights + first));
            if (lane == kWarpSize - 1 && first + kPerLane < n) beyond = weights[first + kPerLane];
            warp_sync();
        } else {
            w = load_run<kAligned, kPerLane>(weights, first, n);
            if (lane == kWarpSize - 1 && first + kPerLane < n)
                beyond = load_pack<1>(weights + first + kPerLane).value[0];
        }
        const float from_left = warp_shuffle_up(w.value[kPerLane - 1], 1);
        const float from_right = warp_shuffle_down(w.value[0], 1);
        const float left = lane == 0 ? last_of_tile : from_left;
        const float right = lane == kWarpSize - 1 ? beyond : from_right;
        last_of_tile = warp_shuffle(w.value[kPerLane - 1], kWarpSize - 1);
        Floats<kPerLane> blurred;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const int sample = first + i;
            const float here = w.value[i];
            const float previous = sample == 0 ? here : (i == 0 ? left : w.value[i > 0 ? i - 1 : 0]);
            const float next =
                sample == n - 1 ? here : (i == kPerLane - 1 ? right : w.value[i < kPerLane - 1 ? i + 1 : i]);
            blurred.value[i] = sample < n ? blurred_weight(previous, here, next, settings.padding) : 0.0f;
            sum += blurred.value[i];
        }
        if (first < n) store_pack_shared(shared.cdf + first, pack_from_float<float>(blurred));
    }
    return warp_sum(sum);
}

// shared.cdf[i] becomes cdf_{i+1}: cdf_0 = 0 is not stored, cdf_N = 1.
MIPNERF_DEVICE void accumulate_cdf_of_warp(const ResampleSettings& settings, const ResampleShared& shared,
                                           float sum) {
    const int n = settings.samples;
    const float missing = missing_weight(sum, n);
    const float scale = 1.0f / (sum + missing * static_cast<float>(n));
    float before_tile = 0;
    for (int tile = 0; tile < n; tile += kTile) {
        const int first = tile + kPerLane * lane_index();
        Floats<kPerLane> w = {};
        if (first < n) w = pack_to_float(load_pack_shared<kPerLane>(shared.cdf + first));
        float lane_sum = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            lane_sum += w.value[i] + missing;
            w.value[i] = lane_sum;
        }
        const float inclusive = warp_inclusive_sum(lane_sum);
        const float shifted = warp_shuffle_up(inclusive, 1);
        const float before_lane = before_tile + (lane_index() == 0 ? 0.0f : shifted);
        before_tile += warp_shuffle(inclusive, kWarpSize - 1);
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            const float value = (before_lane + w.value[i]) * scale;
            w.value[i] = first + i >= n - 1 || value > 1.0f ? 1.0f : value;
        }
        if (first < n) store_pack_shared(shared.cdf + first, pack_from_float<float>(w));
    }
}

// Expects the fenceposts in shared memory; the warp must have met since they (and shared weights) were
// written.
template <bool kAligned, bool kFromShared>
MIPNERF_DEVICE void resample_ray_of_warp(const ResampleSettings& settings, const ResampleShared& shared,
                                         const float* weights, const float* u, float* new_t_vals,
                                         std::int64_t ray) {
    const float sum = blur_weights_of_warp<kAligned, kFromShared>(settings, shared, weights);
    accumulate_cdf_of_warp(settings, shared, sum);
    warp_sync();
    const int m = settings.num_fenceposts;
    constexpr int kAtOnce =
        4;  // searches of a lane that run side by side, to hide the latency of each other's loads
    for (int start = lane_index(); start < m; start += kAtOnce * kWarpSize) {
        float p[kAtOnce];
        int interval[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int k = start + j * kWarpSize;
            interval[j] = 0;
            p[j] = 0;
            if (k < m)
                p[j] = u == nullptr
                           ? settings.positions.even(k)
                           : settings.positions.stratified(k, load_pack<1>(u + ray * m + k).value[0]);
        }
        // How many of cdf_1 .. cdf_{N-1} are at most p: the interval, cdf_i <= p < cdf_{i+1}.
        for (int step = settings.search_step; step > 0; step /= 2) {
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int probe = interval[j] + step;
                if (probe < settings.samples && shared.cdf[probe - 1] <= p[j]) interval[j] = probe;
            }
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int k = start + j * kWarpSize;
            const int i = interval[j];
            const float cdf0 = i > 0 ? shared.cdf[i - 1] : 0.0f;
            if (k < m)
                new_t_vals[ray * m + k] = invert_interval(p[j], cdf0, shared.cdf[i], shared.fenceposts[i],
                                                          shared.fenceposts[i + 1]);
        }
    }
}

// Warp w of block b writes ray b * warps + w; a warp's shared memory is its own.
template <bool kAligned>
__global__ void resample_kernel(std::int64_t rays, ResampleSettings settings, const float* t_vals,
                                const float* weights, const float* u, float* new_t_vals) {
    const std::int64_t ray = static_cast<std::int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp_index();
    if (ray >= rays) return;
    const ResampleShared shared(settings.samples);
    shared.load_fenceposts(t_vals + ray * (settings.samples + 1), settings.samples);
    resample_ray_of_warp<kAligned, false>(settings, shared, weights + ray * settings.samples, u, new_t_vals,
                                          ray);
}

// ---- launch -------------------------------------------------------------------------------------

// Rays of a block: four, fewer where their shared memory would pass what a block gets without asking.
inline int resample_warps(int samples) {
    const std::size_t fit = 48 * 1024 / ResampleShared::bytes(samples);
    return fit >= 4 ? 4 : static_cast<int>(fit);
}

template <typename T>
void launch_resample(std::int64_t rays, int samples, int num_fenceposts, T padding, const T* t_vals,
                     const T* weights, const T* u, T* new_t_vals, Stream stream) {
    const ResampleSettings settings(samples, num_fenceposts, padding);
    const int warps = resample_warps(samples);
    const dim3 grid = grid_size(ceil_div(rays, static_cast<std::int64_t>(warps)));
    const dim3 block(static_cast<unsigned>(warps * kWarpSize));
    const std::size_t bytes = static_cast<std::size_t>(warps) * ResampleShared::bytes(samples);
    if (samples % kPerLane == 0 && is_aligned(weights, 16))
        MIPNERF_LAUNCH(resample_kernel<true>, grid, block, bytes, stream, rays, settings, t_vals, weights, u,
                       new_t_vals);
    else
        MIPNERF_LAUNCH(resample_kernel<false>, grid, block, bytes, stream, rays, settings, t_vals, weights, u,
                       new_t_vals);
}

}  // namespace mipnerf
