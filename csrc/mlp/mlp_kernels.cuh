// The fused network with mma.sync products: packing of the weights and the forward, for inference and for
// training. mlp_backward_kernels.cuh has the rest.
#pragma once

#include "../frustum_ipe/frustum_ipe_math.h"
#include "mlp_composite.cuh"
#include "mlp_launch.h"
#include "mlp_tile.cuh"

namespace mipnerf {
namespace mlp_mma {

// ---- packing

struct PackParameters {
    MlpPacking packing;
    MlpPlan plan;
    const float* weights[kMlpMaxLayers];
    const float* biases[kMlpMaxLayers];
    unsigned char* packed;
};

// Number (row of the contraction, column) of a piece.
MIPNERF_DEVICE float piece_value(const PackParameters& in, const MlpPiece& piece, int row, int column) {
    if (row >= piece.rows || column >= piece.columns) return 0.0f;
    int number = piece.layer;
    int output = piece.transposed ? row : column;
    const int input = piece.first + (piece.transposed ? column : row);
    if (number < 0) {  // a channel of the heads that read heads_of
        for (int l = 0; l < in.plan.layers; ++l) {
            const MlpLayer& layer = in.plan.layer[l];
            if (layer.channel >= 0 && layer.input == piece.heads_of && output >= layer.channel &&
                output < layer.channel + layer.outputs)
                number = l;
        }
        if (number < 0) return 0.0f;
        output -= in.plan.layer[number].channel;
    }
    const MlpLayer& layer = in.plan.layer[number];
    const int pitch = layer.input_columns + layer.feature_columns;
    return in.weights[number][static_cast<std::int64_t>(output) * pitch + input];
}

// The packed bias with this index: those of the hidden layers and heads in the order of the forward passes.
MIPNERF_DEVICE float bias_value(const PackParameters& in, int index) {
    for (int h = 0; h <= in.plan.hidden; ++h) {
        const MlpLayer* layer = h < in.plan.hidden ? &in.plan.layer[in.plan.hidden_layer[h]] : nullptr;
        if (layer && !layer->has_ray_bias) {
            if (index < layer->outputs) return in.biases[in.plan.hidden_layer[h]][index];
            index -= layer->outputs;
        }
        const int input = layer ? layer->input : in.plan.hidden - 1;
        bool has_heads = false;
        float value = 0.0f;
        for (int l = 0; l < in.plan.layers; ++l) {
            const MlpLayer& head = in.plan.layer[l];
            if (head.channel < 0 || input < 0 || head.input != input) continue;
            has_heads = true;
            if (index >= head.channel && index < head.channel + head.outputs)
                value = in.biases[l][index - head.channel];
        }
        if (has_heads) {
            if (index < kMlpChannels) return value;
            index -= kMlpChannels;
        }
    }
    return 0.0f;
}

// Who: a thread makes one unit of the weights, or four biases.
template <typename T>
__global__ void __launch_bounds__(kThreads) mlp_pack_kernel(const __grid_constant__ PackParameters in) {
    const int at = static_cast<int>(blockIdx.x) * kThreads + thread_rank();
    if (at >= in.packing.units) {
        const int first = 4 * (at - in.packing.units);
        if (first >= in.packing.biases) return;
        Pack<float, 4> four;
#pragma unroll
        for (int i = 0; i < 4; ++i) four.value[i] = bias_value(in, first + i);
        store_pack(reinterpret_cast<float*>(in.packed + 16ll * in.packing.units) + first, four);
        return;
    }
    int p = 0;
    while (at >= in.packing.piece[p].first_unit + in.packing.piece[p].units) ++p;
    const MlpPiece& piece = in.packing.piece[p];
    const int unit = at - piece.first_unit, lane = unit % kUnitsPerBlock, block = unit / kUnitsPerBlock;
    const int step = block / piece.blocks, column = 16 * (block % piece.blocks) + lane / 4;
    Floats<8> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i)  // b0 and b1 of 8 columns, b0 and b1 of the next 8
        eight.value[i] =
            piece_value(in, piece, 16 * step + 2 * (lane % 4) + i / 2 % 2 * 8 + i % 2, column + i / 4 * 8);
    stg128(reinterpret_cast<T*>(in.packed + 16ll * at), pack_from_float<T>(eight));
}

// ---- features

template <typename T>
struct ForwardParameters {
    MlpPasses passes;
    MlpTiling tiling;
    std::int64_t samples;
    unsigned samples_per_ray;
    int feature_columns;
    int view_width;
    int hidden;
    const T* features;
    MlpEncoding encoding;
    MlpCompositing compositing;
    const float* ray_bias;
    const unsigned char* packed;
    const float* biases;
    float* rgb;
    float* density;
    T* activations;
    unsigned* masks;
};

// The features of the tile's samples, zeros beside and below them. Complete for the thread itself; for the
// others after a barrier.
template <int W, typename T>
MIPNERF_DEVICE void load_features(T* tile, const T* features, int columns, const TileRows& rows) {
    const int padded = (columns + 15) / 16 * 16, pieces = padded / 8;
    const T* first = features + rows.first * columns;
    if (columns % 8 == 0) {  // then every row starts at a multiple of 16 bytes
        for (int i = thread_rank(); i < kTileRows * pieces; i += kThreads) {
            const int row = i / pieces, column = 8 * (i % pieces);
            const bool valid = row < rows.count && column < columns;
            async_copy16(tile_at<W>(tile, row, column), valid ? first + row * columns + column : features,
                         valid);
        }
    } else {
#pragma unroll 1
        for (int i = thread_rank(); i < kTileRows * padded; i += kThreads) {
            const int row = i / padded, column = i % padded;
            const bool valid = row < rows.count && column < columns;
            *tile_at<W>(tile, row, column) =
                valid ? load_pack<1>(first + row * columns + column).value[0] : from_float<T>(0.0f);
        }
    }
    async_commit();
    async_wait<0>();
}

template <bool kIntegrated, int kDegrees, int W, typename T>
MIPNERF_DEVICE void encode_to_tile(T* tile, int row, const EncodedCoordinate<float>& coordinate, int k,
                                   int min_deg, int degree, int degrees) {
    SinCos<float> value[kDegrees];
    encode_degrees<kIntegrated, kDegrees>(
        coordinate, bits_float(static_cast<std::uint32_t>(127 + min_deg + degree) << 23), value);
#pragma unroll
    for (int i = 0; i < kDegrees; ++i) {
        *tile_at<W>(tile, row, 3 * (degree + i) + k) = from_float<T>(value[i].sin);
        *tile_at<W>(tile, row, 3 * (degrees + degree + i) + k) = from_float<T>(value[i].cos);
    }
}

// The same computed from fenceposts and rays: a thread has half the degrees of one sample. Rows past the end
// repeat the last sample.
template <int W, typename T>
MIPNERF_DEVICE void encode_features(T* tile, const ForwardParameters<T>& in, const TileRows& rows) {
    const MlpEncoding& encoding = in.encoding;
    const int degrees = in.feature_columns / 6, row = thread_rank() / 2, half = thread_rank() % 2;
    const std::int64_t sample = rows.first + (row < rows.count ? row : rows.count - 1);
    const std::int64_t ray = sample / in.samples_per_ray;
    const float* t = encoding.t_vals + sample + ray;  // a ray has one fencepost more than samples
    const float t0 = load_pack<1>(t).value[0], t1 = load_pack<1>(t + 1).value[0];
    float origin[3], direction[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        origin[k] = load_pack<1>(encoding.origins + 3 * ray + k).value[0];
        direction[k] = load_pack<1>(encoding.directions + 3 * ray + k).value[0];
    }
    const RayConstants<float> constants =
        ray_constants(origin, direction, load_pack<1>(encoding.radii + ray).value[0]);
    const FrustumMoments<float> moments = encoding.cylinder ? frustum_moments<FrustumShape::kCylinder>(t0, t1)
                                                            : frustum_moments<FrustumShape::kCone>(t0, t1);
    const int first = half == 0 ? 0 : degrees / 2, end = half == 0 ? degrees / 2 : degrees;
    EncodedCoordinate<float> coordinates[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) coordinates[k] = encoded_coordinate(constants, moments, k);
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
        // Chosen, not indexed: registers have no index.
        const EncodedCoordinate<float> coordinate = k == 0   ? coordinates[0]
                                                    : k == 1 ? coordinates[1]
                                                             : coordinates[2];
        int degree = first;
        // 16-bit features are rounded a thousand times more coarsely than doubling an angle is.
#pragma unroll 1
        for (; degree + 4 <= end; degree += 4) {
            if (encoding.integrated)
                encode_to_tile<true, 4, W>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
            else
                encode_to_tile<false, 4, W>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
        }
#pragma unroll 1
        for (; degree < end; ++degree) {
            if (encoding.integrated)
                encode_to_tile<true, 1, W>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
            else
                encode_to_tile<false, 1, W>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
        }
    }
    if (half == 1)
        for (int column = in.feature_columns; column < (in.feature_columns + 15) / 16 * 16; ++column)
            *tile_at<W>(tile, row, column) = from_float<T>(0.0f);
}

// ---- forward

// The result's first value: the bias of its column, or of its ray and column.
template <int W, typename T>
MIPNERF_DEVICE void start_with_bias(Result<W>& result, const ForwardParameters<T>& in, const MlpPass& pass,
                                    const WarpPart<W>& part, const TileRows& rows) {
    if (pass.bias >= 0) {
        for_each_part(result, part, pass.columns, [&](int, int, int, int column, float (&value)[4]) {
            const auto bias = load_pack<2>(in.biases + pass.bias + column);
            value[0] = value[2] = bias.value[0];
            value[1] = value[3] = bias.value[1];
        });
        return;
    }
    const std::int64_t first_ray = rows.first / in.samples_per_ray;
    const auto before = static_cast<unsigned>(rows.first - first_ray * in.samples_per_ray);
    const float* bias_of_first = in.ray_bias + first_ray * in.view_width;
    int offset[Geometry<W>::kRowBlocks][2];
#pragma unroll
    for (int r = 0; r < Geometry<W>::kRowBlocks; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = part.row + 16 * r + 8 * half + lane_index() / 4;
            const auto sample = before + static_cast<unsigned>(row < rows.count ? row : rows.count - 1);
            offset[r][half] = static_cast<int>(sample / in.samples_per_ray) * in.view_width;
        }
    for_each_part(result, part, pass.columns, [&](int r, int, int, int column, float (&value)[4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const auto bias = load_pack<2>(bias_of_first + offset[r][half] + column);
            value[2 * half] = bias.value[0];
            value[2 * half + 1] = bias.value[1];
        }
    });
}

// max(result, 0) rounded to the tile; returns the masks of this thread, a bit for each number. A NaN stays
// one and has its bit: swallowed here, it would leave the loss finite.
template <int W, typename T>
MIPNERF_DEVICE Pack<unsigned, Geometry<W>::kRowBlocks> activate(T* tile, Result<W>& result,
                                                                const WarpPart<W>& part, int columns) {
    Pack<unsigned, Geometry<W>::kRowBlocks> masks{};
    for_each_part(result, part, columns, [&](int r, int product, int row, int column, float (&value)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) masks.value[r] |= passes_relu(value[i]) ? 1u << (4 * product + i) : 0u;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned pair = pair_relu<T>(value[2 * half], value[2 * half + 1]);
            store_pack_shared(tile_at<W>(tile, row + 8 * half, column), detail::bit_copy<Pack<T, 2>>(pair));
        }
    });
    return masks;
}

// The heads of 16 rows of each warp: their weights come straight from global memory, a few kilobytes that
// stay in the cache.
template <int W, typename T>
MIPNERF_DEVICE void multiply_heads(float (&channels)[4], T* tile, const unsigned char* weights, int steps) {
    for (int step = 0; step < steps; ++step) {
        unsigned a[4];
        load_fragment<W>(a, tile, 16 * warp_index(), step);
        const auto b = load_pack<4>(
            reinterpret_cast<const unsigned*>(weights + (step * kUnitsPerBlock + lane_index()) * 16));
        mma_m16n8k16<T>(channels, a, b.value[0], b.value[1]);
    }
}

// Where the raw colour of a row waits to be composited: in the row's own first 16 bytes, when no product
// needs them any more.
template <int W, typename T>
MIPNERF_DEVICE float* colour_at(T* tile, int row) {
    return reinterpret_cast<float*>(tile_at<W>(tile, row, 0));
}

// Calls f(where it belongs, value) for each of the given channels that this thread has. With compositing a
// colour belongs to its row, and the density where the weight will be.
template <int W, bool kComposites, typename T, typename F>
MIPNERF_DEVICE void for_each_channel(float (&channels)[4], T* tile, const ForwardParameters<T>& in, int given,
                                     const TileRows& rows, const F& f) {
    const Lane lane;
    if (lane.q > 1) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = 16 * warp_index() + lane.g + 8 * half;
        if (row >= rows.count) continue;
        const std::int64_t sample = rows.first + row;
        float* const colour = kComposites ? colour_at<W>(tile, row) : in.rgb + 3 * sample;
        if (given >> (2 * lane.q) & 1) f(colour + 2 * lane.q, channels[2 * half]);
        if (given >> (2 * lane.q + 1) & 1)
            f(lane.q == 0 ? colour + 1 : in.density + sample, channels[2 * half + 1]);
    }
}

// The part of the heads that reads the tile as it is: the first `steps` of their weights, on top of the
// biases, or the others, on top of what the first gave. (To wait in registers it would cost the product
// beside it too many.)
template <int W, bool kComposites, typename T>
MIPNERF_DEVICE void give_heads(T* tile, const ForwardParameters<T>& in, const MlpPass& pass,
                               const TileRows& rows, Source source) {
    const unsigned char* weights = in.packed + 16ll * pass.head_weights;
    float channels[4] = {};
    if (source == kFromTile) {
        const Lane lane;
        if (lane.q < 2) {
            const auto bias = load_pack<2>(in.biases + pass.head_bias + 2 * lane.q);
            channels[0] = channels[2] = bias.value[0];
            channels[1] = channels[3] = bias.value[1];
        }
    } else {
        weights += pass.steps[kFromTile] * kUnitsPerBlock * 16;
        for_each_channel<W, kComposites>(channels, tile, in, pass.head_channels, rows,
                                         [](const float* at, float& value) { value = *at; });
    }
    multiply_heads<W>(channels, tile, weights, pass.steps[source]);
    if constexpr (kComposites) warp_sync();  // the warp has read its rows, in which colours may now stand
    for_each_channel<W, kComposites>(channels, tile, in, pass.head_channels, rows,
                                     [](float* at, float value) { *at = value; });
}

// The rays of a tile to pixels, a warp for each; `part` numbers the tile within its group. What is known of a
// ray longer than a tile waits behind the stages.
template <int W, typename T>
MIPNERF_DEVICE void composite_tile(T* tile, const ForwardParameters<T>& in, const TileRows& rows, int group,
                                   int part) {
    const int of_ray = static_cast<int>(in.samples_per_ray), before = part * kTileRows;
    const int of_tile = in.tiling.tiles > 1 ? rows.count : of_ray;
    float* const kept = shared_memory<float>(Geometry<W>::kSharedBytes);
#pragma unroll 1
    for (int number = warp_index(), row = of_tile * number; row < rows.count;
         number += kWarps, row += of_tile * kWarps) {
        const std::int64_t ray = static_cast<std::int64_t>(group) * in.tiling.rays + number;
        RayProgress progress;
        if (before > 0) progress = kept_progress(kept, 1);
        composite_samples(progress, in.encoding, in.compositing, of_ray, ray, before, of_tile, [&](int i) {
            const Pack<float, 4> raw = load_pack_shared<4>(colour_at<W>(tile, row + i));
            return Colour{raw.value[0], raw.value[1], raw.value[2]};
        });
        if (before + of_tile == of_ray)
            finish_ray(progress, in.encoding, in.compositing, of_ray, ray);
        else
            keep_progress(progress, kept, 1);
    }
}

// Who: a block has a tile of samples, and the next one gridDim.x further; with compositing a group of tiles.
// Shared: mlp_tile.cuh. Written: colours and densities, or with compositing pixels and weights; for training
// the activations of every hidden layer, [samples, outputs] each, and the masks of every thread, [tile,
// hidden layer, thread].
template <int W, typename T, bool kComposites>
__global__ void __launch_bounds__(kThreads, Geometry<W>::kBlocksTogether)
    mlp_forward_kernel(const __grid_constant__ ForwardParameters<T> in) {
    T* tile = shared_memory<T>();
    const int groups = static_cast<int>(in.tiling.groups), parts = kComposites ? in.tiling.tiles : 1;
    const WarpPart<W> part;
    WeightStream<W> stream(in.passes, in.packed, parts * tiles_of_block(groups));
#pragma unroll 1
    for (int n = 0, number = static_cast<int>(blockIdx.x); number < groups;) {
        const TileRows rows =
            kComposites ? rows_of_group(in.tiling, number, n) : TileRows(number, in.samples);
#pragma unroll 1
        for (int i = 0; i < in.passes.count; ++i) {
            const MlpPass& pass = in.passes.pass[i];
            const bool has_heads = pass.head_weights >= 0;
            if (has_heads) give_heads<W, kComposites>(tile, in, pass, rows, kFromTile);
            Result<W> result;
            if (pass.columns > 0) {
                start_with_bias(result, in, pass, part, rows);
                multiply_tile(result, stream, tile, part, pass.steps[kFromTile], pass.columns);
            }
            if (pass.steps[kFromFeatures] > 0) {
                block_sync();  // every warp has read the tile
                if (kComposites || in.encoding.t_vals != nullptr)
                    encode_features<W>(tile, in, rows);
                else
                    load_features<W>(tile, in.features, in.feature_columns, rows);
                block_sync();
                if (pass.columns > 0)
                    multiply_tile(result, stream, tile, part, pass.steps[kFromFeatures], pass.columns);
                if (has_heads) give_heads<W, kComposites>(tile, in, pass, rows, kFromFeatures);
            }
            if (pass.columns == 0) continue;
            block_sync();  // every warp has read the tile
            const auto masks = activate(tile, result, part, pass.columns);
            block_sync();
            if (kComposites || in.activations == nullptr) continue;
            store_pack_streaming(
                in.masks + ((static_cast<std::int64_t>(number) * in.hidden + pass.hidden) * kThreads +
                            thread_rank()) *
                               Geometry<W>::kRowBlocks,
                masks);
            store_tile<W>(tile, in.activations + pass.stash_column * in.samples + rows.first * pass.columns,
                          rows.count, pass.columns);
        }
        if constexpr (kComposites) {
            block_sync();  // colours and densities of all rows are there
            composite_tile<W>(tile, in, rows, number, n);
        }
        if (++n == parts) {
            n = 0;
            number += static_cast<int>(gridDim.x);
        }
    }
}

// ---- launches

inline const float* packed_biases(const void* packed, const MlpSchedule& schedule) {
    return reinterpret_cast<const float*>(static_cast<const unsigned char*>(packed) +
                                          16ll * schedule.packing.units);
}

template <int W, typename T>
void launch_mlp_pack(const MlpPackArguments& arguments, Stream stream) {
    PackParameters in{};
    in.packing = make_mlp_schedule(arguments.plan).packing;
    in.plan = arguments.plan;
    for (int l = 0; l < arguments.plan.layers; ++l) {
        in.weights[l] = arguments.weights[l];
        in.biases[l] = arguments.biases[l];
    }
    in.packed = static_cast<unsigned char*>(arguments.packed);
    const int threads = in.packing.units + in.packing.biases / 4;
    MIPNERF_LAUNCH(mlp_pack_kernel<T>, grid_size(ceil_div(threads, kThreads)), dim3(kThreads), 0, stream, in);
}

template <int W, typename T>
void launch_mlp_forward(const MlpForwardArguments<T>& arguments, Stream stream) {
    const MlpSchedule schedule = make_mlp_schedule(arguments.plan);
    ForwardParameters<T> in{};
    in.passes = schedule.forward;
    const bool composites = arguments.compositing.results.rgb != nullptr;
    in.tiling = mlp_tiling(arguments.samples, arguments.samples_per_ray, composites);
    in.samples = arguments.samples;
    in.samples_per_ray = static_cast<unsigned>(arguments.samples_per_ray);
    in.feature_columns = arguments.plan.shape.features;
    in.view_width = arguments.plan.shape.view_width;
    in.hidden = arguments.plan.hidden;
    in.features = arguments.features;
    in.encoding = arguments.encoding;
    in.compositing = arguments.compositing;
    in.ray_bias = arguments.ray_bias;
    in.packed = static_cast<const unsigned char*>(arguments.packed);
    in.biases = packed_biases(arguments.packed, schedule);
    in.rgb = arguments.rgb;
    in.density = composites ? arguments.compositing.results.weights : arguments.density;
    in.activations = static_cast<T*>(arguments.activations);
    in.masks = static_cast<unsigned*>(arguments.masks);
    constexpr std::size_t kBytes = Geometry<W>::kSharedBytes;
    if (composites) {
        constexpr std::size_t kWithProgress = kBytes + kProgressBytes;
        MIPNERF_LAUNCH((mlp_forward_kernel<W, T, true>),
                       persistent_grid(mlp_forward_kernel<W, T, true>, in.tiling.groups, kWithProgress),
                       dim3(kThreads), kWithProgress, stream, in);
    } else {
        MIPNERF_LAUNCH((mlp_forward_kernel<W, T, false>),
                       persistent_grid(mlp_forward_kernel<W, T, false>, in.tiling.groups, kBytes),
                       dim3(kThreads), kBytes, stream, in);
    }
}

}  // namespace mlp_mma
}  // namespace mipnerf
