// The fused loops of the fast model on the CPU: one group of rays from marching to gradients. No torch.
//
//   rounds   march the next 8 samples of every living ray into tiles; encode; density network; transmittance;
//            rays whose transmittance fell below kMinTransmittance die
//   colour   the samples that count, compacted into tiles: colour network, compositing
//   backward loss, compositing's closed form, colour network, density network; gradients of the encoding stay
//   in
//            the group's tiles for the scatter, which is ordered by level (fast_step_cpu.cpp)
//
// A group depends on nothing but its rays, and everything summed over groups is summed in their order:
// results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../hash_encode/hash_encode_tiles.h"
#include "../march/march_math.h"
#include "../packed_composite/packed_composite_math.h"
#include "../tiny_mlp/tiny_mlp_math.h"
#include "fast_step_rooms.h"

namespace mipnerf {

constexpr int kGroupRays = 64;
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
    float harmonics[kHarmonics];
    float grad_rgb[3], so_far[3];
    bool is_alive;
};

template <int W>
MIPNERF_INLINE void clear_rows(float* row, int rows, int columns) {
    for (int r = 0; r < rows; ++r)
        for (int n = 0; n < columns; n += W) store_vector<W>(row + r * kTile + n, splat<W>(0.0f));
}

MIPNERF_INLINE int32_t as_int(float bits) {
    return static_cast<int32_t>(float_bits(bits));
}
MIPNERF_INLINE float from_int(int32_t value) {
    return bits_float(static_cast<uint32_t>(value));
}

// Encoding and density network of one tile with `count` samples; the padding is made harmless first.
template <int W, int F>
MIPNERF_INLINE void density_tile(const FastModel& model, const TileRows& rows, const RowBuffer& tile,
                                 int count) {
    const FastSizes& sizes = model.sizes;
    const int columns = padded_columns<W>(count);
    for (int n = count; n < columns; ++n) {
        for (int k = 0; k < 3; ++k) tile.row(rows.position + k)[n] = 0.5f;
        tile.row(rows.scale)[n] = 1.0f;
        tile.row(rows.length)[n] = 0.0f;
    }
    encode_tile<F>(model.grid, model.encode, model.table, tile.row(rows.position), tile.row(rows.scale),
                   columns, sizes.inputs, tile.row(rows.features));
    dense_tile<W, Epilogue::kRelu>(model.networks->density_in(), sizes.hidden, sizes.inputs,
                                   tile.row(rows.features), tile.row(rows.hidden), columns);
    dense_tile<W, Epilogue::kNone>(model.networks->density_out(), kGeometryFeatures, sizes.hidden,
                                   tile.row(rows.hidden), tile.row(rows.geometry), columns);
}

// Colour network of one colour tile, its inputs in place.
template <int W>
MIPNERF_INLINE void colour_tile(const FastModel& model, const TileRows& rows, const RowBuffer& tile,
                                int columns) {
    const FastSizes& sizes = model.sizes;
    dense_tile<W, Epilogue::kRelu>(model.networks->colour_in(), sizes.hidden, sizes.colour_inputs(),
                                   tile.row(rows.colour_inputs), tile.row(rows.colour_hidden[0]), columns);
    if (sizes.colour_layers == 2)
        dense_tile<W, Epilogue::kRelu>(model.networks->colour_hidden(), sizes.hidden, sizes.hidden,
                                       tile.row(rows.colour_hidden[0]), tile.row(rows.colour_hidden[1]),
                                       columns);
    dense_tile<W, Epilogue::kNone>(model.networks->colour_out(), 3, sizes.hidden,
                                   tile.row(rows.colour_hidden[sizes.colour_layers - 1]), tile.row(rows.raw),
                                   columns);
    for (int k = 0; k < 3; ++k) {
        const float* raw = tile.row(rows.raw + k);
        float* rgb = tile.row(rows.rgb + k);
#pragma omp simd
        for (int n = 0; n < columns; ++n) rgb[n] = fast_colour(raw[n]);
    }
}

MIPNERF_INLINE void begin_ray(const FastModel& model, const FastRays& rays, int64_t index, GroupRay& ray) {
    const float* direction = rays.directions + 3 * index;
    ray.march = march_begin(rays.origins + 3 * index, direction, rays.radii[index], rays.near[index],
                            rays.far[index], rays.phase == nullptr ? 0.5f : rays.phase[index], model.march);
    ray.state = {1.0f, {0.0f, 0.0f, 0.0f}, 0.0f};
    const float inverse = 1.0f / ray.march.norm;
    spherical_harmonics(direction[0] * inverse, direction[1] * inverse, direction[2] * inverse,
                        ray.harmonics);
    ray.is_alive = ray.march.t < ray.march.end;
}

// Marches and evaluates the density until every ray has died or left the box; fills room.columns and
// room.counted.
template <int W, int F>
MIPNERF_INLINE void march_and_density(const FastModel& model, const TileRows& rows, GroupRay* group,
                                      int count, FastRoom& room) {
    room.columns.clear();
    room.counted.clear();
    bool any = true;
    while (any) {
        const int64_t begin = static_cast<int64_t>(room.columns.size());
        int64_t tile_index = begin - 1;
        const RowBuffer* tile = nullptr;
        int fill = kTile;
        for (int r = 0; r < count; ++r) {
            GroupRay& ray = group[r];
            if (!ray.is_alive) continue;
            const OccupancyMask& mask = model.occupancy.mask[ray.march.mask];
            for (int k = 0; k < kSamplesPerRound; ++k) {
                float t0, t1;
                if (!march_next(ray.march, mask, model.masks, t0, t1)) {
                    ray.is_alive = false;
                    break;
                }
                if (fill == kTile) {
                    tile = &room.tiles.at(++tile_index, rows.total);
                    room.columns.push_back(0);
                    fill = 0;
                }
                const MarchSample<float> sample = march_sample(ray.march, t0, t1);
                for (int axis = 0; axis < 3; ++axis)
                    tile->row(rows.position + axis)[fill] = sample.mean[axis];
                tile->row(rows.scale)[fill] = sample.scale;
                tile->row(rows.length)[fill] = (t1 - t0) * ray.march.norm;
                tile->row(rows.middle)[fill] = 0.5f * (t0 + t1);
                tile->row(rows.ray)[fill] = from_int(r);
                room.columns[tile_index] = ++fill;
            }
        }
        for (int64_t t = begin; t <= tile_index; ++t) {
            const RowBuffer& current = room.tiles.at(t, rows.total);
            const int samples = room.columns[t];
            density_tile<W, F>(model, rows, current, samples);
            const float* raw = current.row(rows.geometry);
            const float* length = current.row(rows.length);
            float* tau = current.row(rows.tau);
            float* keep = current.row(rows.keep);
#pragma omp simd
            for (int n = 0; n < kTile; ++n) {
                const float depth = fast_density(raw[n]) * length[n];
                tau[n] = depth;
                keep[n] = exp_nonpositive(-depth);
            }
            const float* ray_of = current.row(rows.ray);
            float* before = current.row(rows.before);
            for (int n = 0; n < samples; ++n) {
                RayState<float>& state = group[as_int(ray_of[n])].state;
                before[n] = state.transmittance;
                if (!counts(state.transmittance)) continue;
                state.transmittance *= keep[n];
                room.counted.push_back(static_cast<int32_t>(t * kTile + n));
            }
        }
        any = false;
        for (int r = 0; r < count; ++r) {
            group[r].is_alive = group[r].is_alive && counts(group[r].state.transmittance);
            any = any || group[r].is_alive;
        }
    }
}

// The samples that count, compacted into colour tiles, through the colour network and into their rays.
template <int W>
MIPNERF_INLINE void colour_and_composite(const FastModel& model, const TileRows& rows, GroupRay* group,
                                         FastRoom& room) {
    const int64_t total = static_cast<int64_t>(room.counted.size());
    for (int64_t first = 0; first < total; first += kTile) {
        const RowBuffer& tile = room.tiles.at(first / kTile, rows.total);
        const int samples = static_cast<int>(std::min<int64_t>(kTile, total - first));
        const int columns = padded_columns<W>(samples);
        clear_rows<W>(tile.row(rows.colour_inputs), model.sizes.colour_inputs(), columns);
        for (int n = 0; n < samples; ++n) {
            const int32_t source = room.counted[first + n];
            const RowBuffer& from = room.tiles.at(source / kTile, rows.total);
            const int column = source % kTile;
            const float* geometry = from.row(rows.geometry) + column;
            float* inputs = tile.row(rows.colour_inputs) + n;
            for (int g = 0; g < kGeometryFeatures; ++g) inputs[g * kTile] = geometry[g * kTile];
            const GroupRay& ray = group[as_int(from.row(rows.ray)[column])];
            for (int g = 0; g < kHarmonics; ++g) inputs[(kGeometryFeatures + g) * kTile] = ray.harmonics[g];
        }
        colour_tile<W>(model, rows, tile, columns);
        for (int n = 0; n < samples; ++n) {
            const int32_t source = room.counted[first + n];
            const RowBuffer& from = room.tiles.at(source / kTile, rows.total);
            const int column = source % kTile;
            RayState<float>& state = group[as_int(from.row(rows.ray)[column])].state;
            const float weight = from.row(rows.before)[column] * (1.0f - from.row(rows.keep)[column]);
            for (int k = 0; k < 3; ++k) state.rgb[k] += weight * tile.row(rows.rgb + k)[n];
            state.weighted_middle += weight * from.row(rows.middle)[column];
        }
    }
}

// The rows `dy` and `x` of the first `count` tiles, for weight_gradient.
template <int W>
MIPNERF_INLINE const TilePair* pair_rows(const TileRows& rows, FastRoom& room, int64_t count, bool is_colour,
                                         int dy, int x) {
    room.pairs.clear();
    const int64_t total = static_cast<int64_t>(room.counted.size());
    for (int64_t t = 0; t < count; ++t) {
        const RowBuffer& tile = room.tiles.at(t, rows.total);
        const int samples =
            is_colour ? static_cast<int>(std::min<int64_t>(kTile, total - t * kTile)) : room.columns[t];
        room.pairs.push_back({tile.row(dy), tile.row(x), padded_columns<W>(samples)});
    }
    return room.pairs.data();
}

// Gradients of one group: of the weights (added to result.weight_gradient, which starts at zero) and of the
// encoding (left in result.tiles). `grad_rgb` of every ray is set.
template <int W>
MIPNERF_INLINE void backward_group(const FastModel& model, const TileRows& rows, GroupRay* group,
                                   FastRoom& room, GroupResult& result) {
    const FastSizes& sizes = model.sizes;
    const PackedNetworks& networks = *model.networks;
    const int H = sizes.hidden, last = sizes.colour_layers - 1;
    const int64_t total = static_cast<int64_t>(room.counted.size());
    const int64_t tiles = static_cast<int64_t>(room.columns.size()),
                  colour_tiles = (total + kTile - 1) / kTile;
    float* gradient = result.weight_gradient.data();
    for (int64_t t = 0; t < tiles; ++t)
        clear_rows<W>(room.tiles.at(t, rows.total).row(rows.grad_geometry), kGeometryFeatures, kTile);
    for (int64_t c = 0; c < colour_tiles; ++c) {
        const RowBuffer& tile = room.tiles.at(c, rows.total);
        const int samples = static_cast<int>(std::min<int64_t>(kTile, total - c * kTile));
        const int columns = padded_columns<W>(samples);
        clear_rows<W>(tile.row(rows.grad_raw), 4, columns);
        for (int n = 0; n < samples; ++n) {
            const int32_t source = room.counted[c * kTile + n];
            const RowBuffer& from = room.tiles.at(source / kTile, rows.total);
            const int column = source % kTile;
            GroupRay& ray = group[as_int(from.row(rows.ray)[column])];
            const float before = from.row(rows.before)[column], keep = from.row(rows.keep)[column];
            const float weight = before * (1.0f - keep);
            float colour[3];
            for (int k = 0; k < 3; ++k) {
                colour[k] = tile.row(rows.rgb + k)[n];
                ray.so_far[k] += weight * colour[k];
                tile.row(rows.grad_raw + k)[n] =
                    ray.grad_rgb[k] * weight * fast_colour_derivative(tile.row(rows.raw + k)[n]);
            }
            const float by_depth =
                depth_gradient(ray.grad_rgb, colour, ray.state.rgb, ray.so_far, before * keep);
            const bool is_free = fast_density_is_free(from.row(rows.geometry)[column]);
            // d depth / d raw = depth: the activation is an exponential
            from.row(rows.grad_geometry)[column] = is_free ? by_depth * from.row(rows.tau)[column] : 0.0f;
        }
        dense_tile<W, Epilogue::kReluGradient>(networks.colour_out_t(), H, 3, tile.row(rows.grad_raw),
                                               tile.row(rows.grad_colour_hidden[last]), columns,
                                               tile.row(rows.colour_hidden[last]));
        if (sizes.colour_layers == 2)
            dense_tile<W, Epilogue::kReluGradient>(
                networks.colour_hidden_t(), H, H, tile.row(rows.grad_colour_hidden[1]),
                tile.row(rows.grad_colour_hidden[0]), columns, tile.row(rows.colour_hidden[0]));
        alignas(64) float grad_inputs[kGeometryFeatures * kTile];
        dense_tile<W, Epilogue::kNone>(networks.colour_in_t(), kGeometryFeatures, H,
                                       tile.row(rows.grad_colour_hidden[0]), grad_inputs, columns);
        for (int n = 0; n < samples; ++n) {
            const int32_t source = room.counted[c * kTile + n];
            float* to = room.tiles.at(source / kTile, rows.total).row(rows.grad_geometry) + source % kTile;
            for (int g = 0; g < kGeometryFeatures; ++g) to[g * kTile] += grad_inputs[g * kTile + n];
        }
    }
    weight_gradient<W>(pair_rows<W>(rows, room, colour_tiles, true, rows.grad_raw, rows.colour_hidden[last]),
                       colour_tiles, 4, 3, H, gradient + sizes.colour_out_at());
    if (sizes.colour_layers == 2) {
        weight_gradient<W>(
            pair_rows<W>(rows, room, colour_tiles, true, rows.grad_colour_hidden[1], rows.colour_hidden[0]),
            colour_tiles, H, H, H, gradient + sizes.colour_hidden_at());
    }
    weight_gradient<W>(
        pair_rows<W>(rows, room, colour_tiles, true, rows.grad_colour_hidden[0], rows.colour_inputs),
        colour_tiles, H, H, sizes.colour_inputs(), gradient + sizes.colour_in_at());
    result.columns = room.columns;
    for (int64_t t = 0; t < tiles; ++t) {
        const RowBuffer& tile = room.tiles.at(t, rows.total);
        const int columns = padded_columns<W>(room.columns[t]);
        dense_tile<W, Epilogue::kReluGradient>(networks.density_out_t(), H, kGeometryFeatures,
                                               tile.row(rows.grad_geometry), tile.row(rows.grad_hidden),
                                               columns, tile.row(rows.hidden));
        const RowBuffer& left = result.tiles.at(t, 4 + sizes.encoded);
        dense_tile<W, Epilogue::kNone>(networks.density_in_t(), sizes.encoded, H, tile.row(rows.grad_hidden),
                                       left.row(4), columns);
        std::memcpy(left.row(0), tile.row(rows.position), 3 * kTile * sizeof(float));
        std::memcpy(left.row(3), tile.row(rows.scale), kTile * sizeof(float));
    }
    weight_gradient<W>(pair_rows<W>(rows, room, tiles, false, rows.grad_geometry, rows.hidden), tiles,
                       kGeometryFeatures, kGeometryFeatures, H, gradient + sizes.density_out_at());
    weight_gradient<W>(pair_rows<W>(rows, room, tiles, false, rows.grad_hidden, rows.features), tiles, H, H,
                       sizes.inputs, gradient);
}

struct StepTarget {
    const float* rgb;  // [B, 3]
    float beta;        // of the smooth L1 loss
};

template <int W, int F>
MIPNERF_INLINE void train_group(const FastModel& model, const FastRays& rays, const StepTarget& target,
                                int64_t index, FastRoom& room, GroupResult& result) {
    const TileRows rows(model.sizes);
    GroupRay group[kGroupRays];
    const int64_t first = index * kGroupRays;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRays, rays.count - first));
    for (int r = 0; r < count; ++r) begin_ray(model, rays, first + r, group[r]);
    march_and_density<W, F>(model, rows, group, count, room);
    colour_and_composite<W>(model, rows, group, room);
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
    result.samples = 0;
    for (const int samples : room.columns) result.samples += samples;
    result.counted = static_cast<int64_t>(room.counted.size());
    result.weight_gradient.assign(model.sizes.weights(), 0.0f);
    backward_group<W>(model, rows, group, room, result);
}

struct RenderOutputs {
    float* rgb;       // [B, 3]
    float* distance;  // [B]
    float* acc;       // [B]
};

template <int W, int F>
MIPNERF_INLINE void render_group(const FastModel& model, const FastRays& rays, const RenderOutputs& out,
                                 int64_t index, FastRoom& room) {
    const TileRows rows(model.sizes);
    GroupRay group[kGroupRays];
    const int64_t first = index * kGroupRays;
    const int count = static_cast<int>(std::min<int64_t>(kGroupRays, rays.count - first));
    for (int r = 0; r < count; ++r) begin_ray(model, rays, first + r, group[r]);
    march_and_density<W, F>(model, rows, group, count, room);
    colour_and_composite<W>(model, rows, group, room);
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
