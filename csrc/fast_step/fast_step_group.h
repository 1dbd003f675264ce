// The fused loops of the fast model on the CPU: one group of rays from marching to gradients. No torch.
//
//   rounds   march the next 8 samples of every living ray; encode; density network; transmittance; rays whose
//            transmittance fell below kMinTransmittance die
//   colour   the samples that count: colour network, the view's part of its first layer one bias a ray,
//            compositing
//   backward loss, compositing's closed form, colour network, density network, of the samples that count;
//            gradients of the encoding stay in the group's result for the scatter, which is ordered by level
//            (fast_step_cpu.cpp)
//
// A group depends on nothing but its rays, and everything summed over groups is summed in their order:
// results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../hash_encode/hash_encode_tiles.h"
#include "../march/march_lanes.h"
#include "../packed_composite/packed_composite_math.h"
#include "../tiny_mlp/tiny_mlp_math.h"
#include "fast_step_rooms.h"

namespace mipnerf {

constexpr int kSamplesPerRound = 8;

struct FastModel {
    HashGrid grid;
    EncodeOptions encode;
    const float* table;
    MarchOptions march;
    OccupancyLayout occupancy;
    const uint32_t* masks;
    FastSizes sizes;
    const PackedNetworks* networks;
};

struct FastRays {
    int64_t count;
    const float* origins;     // [B, 3]
    const float* directions;  // [B, 3]
    const float* radii;       // [B]
    const float* near;        // [B]
    const float* far;         // [B]
    const float* phase;       // [B]; null: 1/2
    const float* background;  // [B, 3]
};

struct GroupRay {
    MarchRay<float> march;
    RayState<float> state;
    float grad_rgb[3], so_far[3];
    bool is_alive;
};

// Encoding and density network of `count` samples, at most kTile.
template <int W, int F>
MIPNERF_INLINE void density_tile(const FastModel& model, const TilePlaces& places, int count, Rows features,
                                 Rows hidden, Rows geometry) {
    encode_tile<F>(model.grid, model.encode, model.table, places, count, features);
    dense_rows<W, Epilogue::kRelu>(model.networks->density_in(), features, hidden, count);
    dense_rows<W, Epilogue::kNone>(model.networks->density_out(), hidden, geometry, count);
}

MIPNERF_INLINE void begin_ray(const FastModel& model, const FastRays& rays, int64_t index, GroupRay& ray,
                              float* harmonics) {
    const float* direction = rays.directions + 3 * index;
    ray.march = march_begin(rays.origins + 3 * index, direction, rays.radii[index], rays.near[index],
                            rays.far[index], rays.phase == nullptr ? 0.5f : rays.phase[index], model.march);
    ray.state = {1.0f, {0.0f, 0.0f, 0.0f}, 0.0f};
    const float inverse = 1.0f / ray.march.norm;
    spherical_harmonics(direction[0] * inverse, direction[1] * inverse, direction[2] * inverse, harmonics);
    ray.is_alive = ray.march.t < ray.march.end;
}

// The Gaussians of one ray's intervals, as the samples from `first` on.
MIPNERF_INLINE void add_samples(const MarchRay<float>& ray, const MarchedIntervals<kSamplesPerRound>& found,
                                int32_t index, int64_t first, FastRoom& room) {
    float *const x = room.places.axis(0, first), *const y = room.places.axis(1, first),
                 *const z = room.places.axis(2, first), *const scale = room.places.axis(3, first),
                 *const length = room.length.at(first), *const middle = room.middle.at(first);
    int32_t* const owner = room.ray.data() + first;
#pragma omp simd
    for (int k = 0; k < found.count; ++k) {
        const float t0 = found.t0[k], t1 = found.t1[k];
        const MarchSample<float> sample = march_sample(ray, t0, t1);
        x[k] = sample.mean[0];
        y[k] = sample.mean[1];
        z[k] = sample.mean[2];
        scale[k] = sample.scale;
        length[k] = (t1 - t0) * ray.norm;
        middle[k] = 0.5f * (t0 + t1);
        owner[k] = index;
    }
}

// Marches and evaluates the density until every ray has died or left the box; fills room.counted and
// room.counted_ray, and returns the number of samples. Their activations are kept for a backward pass only.
template <int W, int F, bool kForBackward>
MIPNERF_INLINE int64_t march_and_density(const FastModel& model, GroupRay* group, int count, FastRoom& room) {
    room.counted.clear();
    room.counted_ray.clear();
    int64_t samples = 0;
    bool any = true;
    while (any) {
        const int64_t begin = samples;
        const int64_t most = begin + static_cast<int64_t>(kSamplesPerRound) * count;
        room.grow(most, kForBackward ? most : kTile);
        for (int next = 0; next < count;) {
            int lanes = 0, lane_ray[kMarchRays<W>];
            MarchRay<float>* marching[kMarchRays<W>];
            for (; next < count && lanes < kMarchRays<W>; ++next) {
                if (!group[next].is_alive) continue;
                marching[lanes] = &group[next].march;
                lane_ray[lanes++] = next;
            }
            MarchedIntervals<kSamplesPerRound> found[kMarchRays<W>];
            if (lanes == 0) break;
            march_lanes<kMarchLanes<W>>(marching, lanes, model.occupancy, model.masks, found);
            for (int lane = 0; lane < lanes; ++lane) {
                const int r = lane_ray[lane];
                add_samples(group[r].march, found[lane], r, samples, room);
                samples += found[lane].count;
                group[r].is_alive = found[lane].count == kSamplesPerRound;
            }
        }
        for (int64_t first = begin; first < samples; first += kTile) {
            const int columns = static_cast<int>(std::min<int64_t>(kTile, samples - first));
            const int64_t kept = kForBackward ? first : 0;
            density_tile<W, F>(model, room.places.from(first), columns, room.features.from(kept),
                               room.hidden.from(kept), room.geometry.from(first));
            const float *geometry = room.geometry.at(first), *length = room.length.at(first);
            float *tau = room.tau.at(first), *keep = room.keep.at(first);
#pragma omp simd
            for (int n = 0; n < columns; ++n) {
                const float depth = fast_density(geometry[n * kGeometryFeatures]) * length[n];
                tau[n] = depth;
                keep[n] = exp_nonpositive(-depth);
            }
            float* const before = room.before.at(first);
            for (int n = 0; n < columns; ++n) {
                const int32_t r = room.ray[first + n];
                RayState<float>& state = group[r].state;
                before[n] = state.transmittance;
                if (!counts(state.transmittance)) continue;
                state.transmittance *= keep[n];
                room.counted.push_back(static_cast<int32_t>(first + n));
                room.counted_ray.push_back(r);
            }
        }
        any = false;
        for (int r = 0; r < count; ++r) {
            group[r].is_alive = group[r].is_alive && counts(group[r].state.transmittance);
            any = any || group[r].is_alive;
        }
    }
    return samples;
}

// The samples that count through the colour network and into their rays.
template <int W, bool kForBackward>
MIPNERF_INLINE void colour_and_composite(const FastModel& model, GroupRay* group, int rays, FastRoom& room) {
    const FastSizes& sizes = model.sizes;
    const PackedNetworks& networks = *model.networks;
    const int64_t total = static_cast<int64_t>(room.counted.size());
    const int last = sizes.colour_layers - 1;
    const int64_t kept = kForBackward ? total : std::min<int64_t>(total, kTile);
    for (int layer = 0; layer <= last; ++layer) room.colour_hidden[layer].grow(kept);
    for (RowBuffer* buffer : {&room.raw, &room.rgb}) buffer->grow(kept);
    dense_rows<W, Epilogue::kNone>(networks.colour_in().of_inputs(kGeometryFeatures, kHarmonics),
                                   room.harmonics.from(0), room.view.from(0), rays);
    for (int64_t first = 0; first < total; first += kTile) {
        const int columns = static_cast<int>(std::min<int64_t>(kTile, total - first));
        const int64_t at = kForBackward ? first : 0;
        const int32_t* const sample = room.counted.data() + first;
        const int32_t* const ray_of = room.counted_ray.data() + first;
        dense_rows<W, Epilogue::kRelu>(networks.colour_in().of_inputs(0, kGeometryFeatures),
                                       room.geometry.picked(sample), room.colour_hidden[0].from(at), columns,
                                       room.view.picked(ray_of));
        if (sizes.colour_layers == 2)
            dense_rows<W, Epilogue::kRelu>(networks.colour_hidden(), room.colour_hidden[0].from(at),
                                           room.colour_hidden[1].from(at), columns);
        three_outputs<W>(networks.colour_out(), room.colour_hidden[last].from(at), sizes.hidden,
                         room.raw.from(at), columns);
        const float* const raw = room.raw.at(at);
        float* const rgb = room.rgb.at(at);
#pragma omp simd
        for (int i = 0; i < 4 * columns; ++i) rgb[i] = fast_colour(raw[i]);
        for (int n = 0; n < columns; ++n) {
            RayState<float>& state = group[ray_of[n]].state;
            const float weight = *room.before.at(sample[n]) * (1.0f - *room.keep.at(sample[n]));
            for (int k = 0; k < 3; ++k) state.rgb[k] += weight * rgb[4 * n + k];
            state.weighted_middle += weight * *room.middle.at(sample[n]);
        }
    }
}

// The gradients that reach the networks from compositing: of the colours' logits, and of the raw density,
// which depends on the colours behind. `samples` of those that count, from the one numbered `first`.
MIPNERF_INLINE void composite_backward(GroupRay* group, FastRoom& room, int64_t first, int samples,
                                       float* by_density) {
    float* const slopes = room.grad_raw.at(0);
    const float* const logits = room.raw.at(first);
#pragma omp simd
    for (int i = 0; i < 4 * samples; ++i) slopes[i] = fast_colour_derivative(logits[i]);
    for (int n = 0; n < samples; ++n) {
        const int32_t sample = room.counted[first + n];
        GroupRay& ray = group[room.counted_ray[first + n]];
        const float before = *room.before.at(sample), keep = *room.keep.at(sample);
        const float weight = before * (1.0f - keep);
        const float* const colour = room.rgb.at(first + n);
        for (int k = 0; k < 3; ++k) {
            ray.so_far[k] += weight * colour[k];
            slopes[4 * n + k] *= ray.grad_rgb[k] * weight;
        }
        const float by_depth = depth_gradient(ray.grad_rgb, colour, ray.state.rgb, ray.so_far, before * keep);
        // d depth / d raw = depth: the activation is an exponential
        by_density[n] =
            fast_density_is_free(*room.geometry.at(sample)) ? by_depth * *room.tau.at(sample) : 0.0f;
    }
}

// Gradients of one group, of the samples that count: of the weights (added to result.weight_gradient) and of
// the encoding. `grad_rgb` of every ray is set.
template <int W>
MIPNERF_INLINE void backward_group(const FastModel& model, GroupRay* group, int rays, FastRoom& room,
                                   GroupResult& result) {
    const FastSizes& sizes = model.sizes;
    const PackedNetworks& networks = *model.networks;
    const GradientSums sums(sizes);
    const int H = sizes.hidden, padded = padded_outputs(H), last = sizes.colour_layers - 1;
    const int64_t total = static_cast<int64_t>(room.counted.size());
    float* const gradient = result.weight_gradient.at(0);
    std::memset(room.grad_view.at(0), 0, sizeof(float) * padded * rays);
    result.places.grow(total);
    result.grad_features.reshape(padded_outputs(sizes.encoded), total);
    for (int64_t first = 0; first < total; first += kBackwardSamples) {
        const int samples = static_cast<int>(std::min<int64_t>(kBackwardSamples, total - first));
        const int32_t* const sample = room.counted.data() + first;
        float by_density[kBackwardSamples];
        composite_backward(group, room, first, samples, by_density);
        three_outputs_backward<W>(networks.colour_out(), room.grad_raw.from(0),
                                  room.colour_hidden[last].from(first), H,
                                  room.grad_colour_hidden[last].from(0), samples, gradient + sums.colour_out);
        if (sizes.colour_layers == 2) {
            weight_gradient<W>(room.grad_colour_hidden[1].from(0), H, room.colour_hidden[0].from(first), H,
                               samples, gradient + sums.colour_hidden);
            dense_rows<W, Epilogue::kReluGradient>(
                networks.colour_hidden_t(), room.grad_colour_hidden[1].from(0),
                room.grad_colour_hidden[0].from(0), samples, kNoRows, room.colour_hidden[0].from(first));
        }
        const Rows grad_colour = room.grad_colour_hidden[0].from(0);
        add_rows<W>(grad_colour, room.grad_view.picked(room.counted_ray.data() + first), padded, samples);
        weight_gradient<W>(grad_colour, H, room.geometry.picked(sample), kGeometryFeatures, samples,
                           gradient + sums.colour_in);
        dense_rows<W, Epilogue::kNone>(networks.colour_in_t().of_first_outputs(kGeometryFeatures),
                                       grad_colour, room.grad_geometry.from(0), samples);
        for (int n = 0; n < samples; ++n) *room.grad_geometry.at(n) += by_density[n];

        const Rows grad_geometry = room.grad_geometry.from(0), grad_hidden = room.grad_hidden.from(0);
        weight_gradient<W>(grad_geometry, kGeometryFeatures, room.hidden.picked(sample), H, samples,
                           gradient + sums.density_out);
        dense_rows<W, Epilogue::kReluGradient>(networks.density_out_t(), grad_geometry, grad_hidden, samples,
                                               kNoRows, room.hidden.picked(sample));
        weight_gradient<W>(grad_hidden, H, room.features.picked(sample), sizes.inputs, samples,
                           gradient + sums.density_in);
        dense_rows<W, Epilogue::kNone>(networks.density_in_t(), grad_hidden, result.grad_features.from(first),
                                       samples);
        for (int n = 0; n < samples; ++n) {
            const TilePlaces place = room.places.from(sample[n]);
            const float mean[3] = {*place.x, *place.y, *place.z};
            result.places.set(first + n, mean, *place.scale);
        }
    }
    weight_gradient<W>(room.grad_view.from(0), H, room.harmonics.from(0), kHarmonics, rays,
                       gradient + sums.colour_in + static_cast<int64_t>(kGeometryFeatures) * padded);
}

struct StepTarget {
    const float* rgb;  // [B, 3]
    float beta;        // of the smooth L1 loss
};

template <int W, int F>
MIPNERF_INLINE void train_group(const FastModel& model, const FastRays& rays, const StepTarget& target,
                                int64_t index, FastRoom& room, GroupResult& result) {
    GroupRay group[kGroupRays];
    const int64_t first = index * kGroupRays;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRays, rays.count - first));
    room.shape(model.sizes);
    for (int r = 0; r < count; ++r) begin_ray(model, rays, first + r, group[r], room.harmonics.at(r));
    result.samples = march_and_density<W, F, true>(model, group, count, room);
    colour_and_composite<W, true>(model, group, count, room);
    result.counted = static_cast<int64_t>(room.counted.size());
    result.loss = result.squared_error = 0;
    const float share = 1.0f / (3.0f * static_cast<float>(rays.count));
    for (int r = 0; r < count; ++r) {
        GroupRay& ray = group[r];
        for (int k = 0; k < 3; ++k) {
            ray.so_far[k] = 0.0f;
            ray.state.rgb[k] += ray.state.transmittance * rays.background[3 * (first + r) + k];
            const float error = ray.state.rgb[k] - target.rgb[3 * (first + r) + k];
            result.loss += smooth_l1(error, target.beta);
            result.squared_error += error * error;
            ray.grad_rgb[k] = smooth_l1_derivative(error, target.beta) * share;
        }
    }
    const int64_t weights = GradientSums(model.sizes).total;
    result.weight_gradient.grow(weights);
    std::memset(result.weight_gradient.at(0), 0, sizeof(float) * weights);
    backward_group<W>(model, group, count, room, result);
}

struct RenderOutputs {
    float* rgb;       // [B, 3]
    float* distance;  // [B]
    float* acc;       // [B]
};

template <int W, int F>
MIPNERF_INLINE void render_group(const FastModel& model, const FastRays& rays, const RenderOutputs& out,
                                 int64_t index, FastRoom& room) {
    GroupRay group[kGroupRays];
    const int64_t first = index * kGroupRays;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRays, rays.count - first));
    room.shape(model.sizes);
    for (int r = 0; r < count; ++r) begin_ray(model, rays, first + r, group[r], room.harmonics.at(r));
    march_and_density<W, F, false>(model, group, count, room);
    colour_and_composite<W, false>(model, group, count, room);
    for (int r = 0; r < count; ++r) {
        const RayState<float>& state = group[r].state;
        const int64_t ray = first + r;
        for (int k = 0; k < 3; ++k)
            out.rgb[3 * ray + k] = state.rgb[k] + state.transmittance * rays.background[3 * ray + k];
        out.acc[ray] = 1.0f - state.transmittance;
        out.distance[ray] = out.acc[ray] > 0.0f ? state.weighted_middle / out.acc[ray] : rays.near[ray];
    }
}

}  // namespace mipnerf
