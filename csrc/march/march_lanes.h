// Marching rays side by side on the CPU: what one ray waits for, divisions, bits of the masks and the
// step before, the others fill. The intervals are those of march_next, bit by bit. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/vector_tasks.h"
#include "march_math.h"

namespace mipnerf {

// Of a vector unit W floats wide; wider vectors than 8 would mostly wait for the slowest of their rays.
template <int W>
constexpr int kMarchLanes = W < 8 ? W : 8;
// Lanes are stepped on in two sets, each of which fills the other's waits.
constexpr int kMarchSets = 2;
template <int W>
constexpr int kMarchRays = kMarchSets * kMarchLanes<W>;

// The next intervals of one ray, at most kMost; fewer: the ray has ended.
template <int kMost>
struct MarchedIntervals {
    // One more than are kept: an interval is written before it is known to be a sample.
    float t0[kMost + 1], t1[kMost + 1];
    int count;
};

// Rays lane by lane, and what lies at the intervals they have come to.
template <int L>
struct MarchLanes {
    using Floats = Vector<L>;
    using Ints = IntVector<L>;

    Floats origin[3], direction[3], step_per_t, min_step, max_step, t, end;
    Ints cells, skip_cells, words, skip_words;
    Floats t0, t1, leave;
    Ints has_sample;  // all bits of a lane, or none
    Ints found = {};  // samples so far

    // A lane without a ray has ended.
    MIPNERF_INLINE void load(MarchRay<float>* const* rays, int count, const OccupancyLayout& layout) {
        for (int lane = 0; lane < L; ++lane) {
            const MarchRay<float>& ray = *rays[lane < count ? lane : 0];
            const OccupancyMask& mask = layout.mask[ray.mask];
            for (int k = 0; k < 3; ++k)
                origin[k][lane] = ray.origin[k], direction[k][lane] = ray.direction[k];
            step_per_t[lane] = ray.step_per_t;
            min_step[lane] = ray.min_step, max_step[lane] = ray.max_step;
            t[lane] = ray.t;
            end[lane] = lane < count ? ray.end : ray.t;
            cells[lane] = mask.cells, skip_cells[lane] = mask.skip_cells;
            words[lane] = mask.words, skip_words[lane] = mask.skip_words;
        }
    }

    MIPNERF_INLINE Ints going() const { return t < end; }

    // march_look of every lane that has not ended; where there is nothing to leave, `leave` is where the lane
    // is.
    MIPNERF_INLINE void look(const uint32_t* masks) {
        const Ints is_going = going();
        const Floats to = t + step(), middle = 0.5f * (t + to);
        Floats x[3];
        Ints inside = is_going;
        for (int k = 0; k < 3; ++k) {
            x[k] = origin[k] + middle * direction[k];
            inside &= (x[k] >= 0.0f) & (x[k] < 1.0f);
        }
        for (int k = 0; k < 3; ++k) x[k] = inside ? x[k] : Floats{};
        Ints at[3];
        const Ints may_be = bits(masks, skip_words, skip_cells, x, at);
        Floats until = end;
        const Floats skip = __builtin_convertvector(skip_cells, Floats);
        for (int k = 0; k < 3; ++k) {
            // A comparison is -1 where it holds: the cell's upper face for a ray that goes up.
            const Ints face = at[k] - (direction[k] > 0.0f);
            const Floats to_face = (__builtin_convertvector(face, Floats) / skip - origin[k]) / direction[k];
            until = (direction[k] != 0.0f) & (to_face < until) ? to_face : until;
        }
        has_sample = inside & may_be;
        if (any(has_sample)) has_sample &= bits(masks, words, cells, x, at);
        t0 = t;
        t1 = to;
        t = is_going ? to : t;
        leave = inside & ~may_be ? until - min_step * 0.01f : t;
    }

    // One step on where the interval lies before `leave`; whether any did.
    MIPNERF_INLINE Ints step_on() {
        const Floats by = step();
        const Ints before = t + 0.5f * by < leave;  // march_is_before
        t = before ? t + by : t;
        return before;
    }

    MIPNERF_INLINE static bool any(Ints lanes) {
        int64_t words[L / 2];
        std::memcpy(words, &lanes, sizeof(lanes));
        int64_t all = 0;
        MIPNERF_UNROLL for (const int64_t word : words) all |= word;
        return all != 0;
    }

  private:
    // march_step
    MIPNERF_INLINE Floats step() const {
        Floats by = step_per_t * t;
        by = by < min_step ? min_step : by;
        return by > max_step ? max_step : by;
    }

    // The bits of the masks that begin at these words, of so many cells a side, at x; `at`: the cells.
    MIPNERF_INLINE static Ints bits(const uint32_t* masks, Ints words, Ints cells, const Floats* x,
                                    Ints* at) {
        const Floats scale = __builtin_convertvector(cells, Floats);
        for (int k = 0; k < 3; ++k) at[k] = __builtin_convertvector(x[k] * scale, Ints);
        const Ints index = (at[2] * cells + at[1]) * cells + at[0], word = words + (index >> 5);
        Ints found;
        MIPNERF_UNROLL for (int lane = 0; lane < L; ++lane) found[lane] =
            static_cast<int32_t>(masks[word[lane]]);
        return (found & (1 << (index & 31))) != 0;
    }
};

// The next intervals of up to kMarchSets * L rays, which are left behind them.
template <int L, int kMost>
MIPNERF_INLINE void march_lanes(MarchRay<float>* const* rays, int count, const OccupancyLayout& layout,
                                const uint32_t* masks, MarchedIntervals<kMost>* out) {
    MarchLanes<L> sets[kMarchSets];
    for (int s = 0; s < kMarchSets; ++s)
        sets[s].load(rays + std::min(count - 1, s * L), std::max(0, count - s * L), layout);
    while (MarchLanes<L>::any(sets[0].going() | sets[1].going())) {
        for (int s = 0; s < kMarchSets; ++s) {
            MarchLanes<L>& lanes = sets[s];
            lanes.look(masks);
            // Without a branch: whether a lane has a sample cannot be predicted.
            for (int lane = 0; lane < L; ++lane) {
                MarchedIntervals<kMost>& to = out[s * L + lane];
                to.t0[lanes.found[lane]] = lanes.t0[lane];
                to.t1[lanes.found[lane]] = lanes.t1[lane];
            }
            lanes.found -= lanes.has_sample;
            lanes.end = lanes.found == kMost ? lanes.t : lanes.end;  // it waits
        }
        while (MarchLanes<L>::any(sets[0].step_on() | sets[1].step_on())) {
        }
    }
    for (int ray = 0; ray < count; ++ray) {
        const MarchLanes<L>& lanes = sets[ray / L];
        rays[ray]->t = lanes.t[ray % L];
        out[ray].count = lanes.found[ray % L];
    }
}

}  // namespace mipnerf
