// Marching a cone through the occupancy grid: host and device. No torch, no CUDA header.
//
// The ray o + t d crosses the box [-h, h]^3 for t in [enter, exit], cut to [near, far]. Its intervals follow
// from the phase u in [0, 1) alone: t_0 = enter + u dt(enter), t_{k+1} = t_k + dt(t_k), where
// dt(t) = clamp(c t p, least, most) and p is the pixel's width at t = 1: steps grow with the cone. An
// interval is a sample where its middle lies in the box and in a set bit of the mask chosen by the cone's
// width.
#pragma once

#include <cstdint>

#include "../common/portable_math.h"
#include "../frustum_ipe/frustum_ipe_math.h"
#include "../occupancy/occupancy_math.h"

namespace mipnerf {

// Doubles, rounded to T where they are used: a float64 march steps by 0.01, not by the float nearest to it.
struct MarchOptions {
    double half;        // of the box's side, world units
    double step_scale;  // c
    double min_step, max_step;
    int32_t resolution;  // of the occupancy grid
};

template <typename T>
struct MarchRay {
    T origin[3], direction[3];  // in units of the box's side, the box being [0, 1]^3
    T step_per_t;               // c p
    T min_step, max_step;
    T t, end;
    T norm;    // ||d||, world units
    T radius;  // of the cone at t = 1, in units of the box's side
    int mask;
};

template <typename T>
MIPNERF_HOST_DEVICE T march_step(const MarchRay<T>& ray, T t) {
    T step = ray.step_per_t * t;
    step = step < ray.min_step ? ray.min_step : step;
    return step > ray.max_step ? ray.max_step : step;
}

template <typename T>
MIPNERF_HOST_DEVICE MarchRay<T> march_begin(const T* origin, const T* direction, T radius, T near, T far,
                                            T phase, const MarchOptions& options) {
    MarchRay<T> ray;
    const T half = static_cast<T>(options.half);
    const T inverse = T(1) / (T(2) * half);
    T enter = near, exit = far;
    for (int k = 0; k < 3; ++k) {
        ray.origin[k] = (origin[k] + half) * inverse;
        ray.direction[k] = direction[k] * inverse;
        if (ray.direction[k] == T(0)) {
            if (ray.origin[k] < T(0) || ray.origin[k] > T(1)) exit = enter;
            continue;
        }
        const T to_low = -ray.origin[k] / ray.direction[k];
        const T to_high = (T(1) - ray.origin[k]) / ray.direction[k];
        const T first = to_low < to_high ? to_low : to_high;
        const T last = to_low < to_high ? to_high : to_low;
        enter = first > enter ? first : enter;
        exit = last < exit ? last : exit;
    }
    // radius = pixel width / square_root(3): see cameras.py
    const T pixel = radius * T(1.7320508075688772);
    ray.step_per_t = static_cast<T>(options.step_scale) * pixel;
    ray.min_step = static_cast<T>(options.min_step);
    ray.max_step = static_cast<T>(options.max_step);
    ray.norm =
        square_root(direction[0] * direction[0] + direction[1] * direction[1] + direction[2] * direction[2]);
    ray.radius = radius * inverse;
    ray.t = enter + phase * march_step(ray, enter);
    ray.end = exit;
    ray.mask =
        mask_for_width(static_cast<float>(T(0.5) * (enter + exit) * pixel * inverse), options.resolution);
    return ray;
}

// What lies at the interval that begins at ray.t: a sample, nothing, or nothing up to the point where the ray
// leaves a cell of the coarser mask.
enum class MarchFound { kSample, kNothing, kNothingUntil };

// Looks at the interval [t0, t1] that begins at ray.t < ray.end, and steps over it. The whole cell of the
// coarser mask may be empty: then the middles of the samples stay before its far side until `leave` (by a
// margin, so that rounding cannot pass over a sample).
template <typename T>
MIPNERF_HOST_DEVICE MarchFound march_look(MarchRay<T>& ray, const OccupancyMask& mask, const uint32_t* words,
                                          T& t0, T& t1, T& leave) {
    t0 = ray.t;
    t1 = ray.t + march_step(ray, ray.t);
    const T middle = T(0.5) * (t0 + t1);
    T x[3];
    bool inside = true;
    for (int k = 0; k < 3; ++k) {
        x[k] = ray.origin[k] + middle * ray.direction[k];
        inside = inside && x[k] >= T(0) && x[k] < T(1);
    }
    ray.t = t1;
    if (!inside) return MarchFound::kNothing;
    const T skip = static_cast<T>(mask.skip_cells);
    const int32_t at[3] = {static_cast<int32_t>(x[0] * skip), static_cast<int32_t>(x[1] * skip),
                           static_cast<int32_t>(x[2] * skip)};
    if (!occupancy_bit(words + mask.skip_words,
                       (at[2] * mask.skip_cells + at[1]) * mask.skip_cells + at[0])) {
        leave = ray.end;
        for (int axis = 0; axis < 3; ++axis) {
            const T d = ray.direction[axis];
            if (d == T(0)) continue;
            const T side = static_cast<T>(at[axis] + (d > T(0) ? 1 : 0)) / skip;
            const T to_side = (side - ray.origin[axis]) / d;
            leave = to_side < leave ? to_side : leave;
        }
        leave -= ray.min_step * T(0.01);
        return MarchFound::kNothingUntil;
    }
    const T cells = static_cast<T>(mask.cells);
    const int32_t index =
        (static_cast<int32_t>(x[2] * cells) * mask.cells + static_cast<int32_t>(x[1] * cells)) * mask.cells +
        static_cast<int32_t>(x[0] * cells);
    return occupancy_bit(words + mask.words, index) ? MarchFound::kSample : MarchFound::kNothing;
}

// Whether the interval that begins at t lies before `leave`, which is never behind the ray's end.
template <typename T>
MIPNERF_HOST_DEVICE bool march_is_before(T t, T step, T leave) {
    return t + T(0.5) * step < leave;
}

// Advances to the next sample: false at the end of the ray.
template <typename T>
MIPNERF_HOST_DEVICE bool march_next(MarchRay<T>& ray, const OccupancyMask& mask, const uint32_t* words, T& t0,
                                    T& t1) {
    while (ray.t < ray.end) {
        T leave;
        const MarchFound found = march_look(ray, mask, words, t0, t1, leave);
        if (found == MarchFound::kSample) return true;
        if (found == MarchFound::kNothing) continue;
        for (T step = march_step(ray, ray.t); march_is_before(ray.t, step, leave);
             step = march_step(ray, ray.t))
            ray.t += step;
    }
    return false;
}

// The Gaussian of a sample, by the frustum's moments (mip-NeRF, equation 7): its mean in the unit box, and
// the standard deviation across the ray in units of the box's side.
template <typename T>
struct MarchSample {
    T mean[3];
    T scale;
};

template <typename T>
MIPNERF_HOST_DEVICE MarchSample<T> march_sample(const MarchRay<T>& ray, T t0, T t1) {
    const FrustumMoments<T> moments = cone_moments(t0, t1);
    MarchSample<T> sample;
    for (int k = 0; k < 3; ++k) {
        const T x = ray.origin[k] + moments.mean.hi * ray.direction[k];
        sample.mean[k] = x < T(0) ? T(0) : x > T(1) ? T(1) : x;
    }
    sample.scale = ray.radius * square_root(moments.across);
    return sample;
}

}  // namespace mipnerf
