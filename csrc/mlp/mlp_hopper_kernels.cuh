// The fused network on compute capability 9.0a: packing, and the forward for inference and for training.
// mlp_hopper_chain.cuh says how.
#pragma once

#include "../frustum_ipe/frustum_ipe_math.h"
#include "mlp_composite.cuh"
#include "mlp_hopper_chain.cuh"
#include "mlp_launch.h"

namespace mipnerf {
namespace mlp_hopper {

// ---- packing ------------------------------------------------------------------------------------

struct PackParameters {
    MlpPackArguments in;
    Passes passes;
};

template <int Most>
MIPNERF_DEVICE const Pass* pass_at(const PassList<Most>& list, int element) {
    for (int i = 0; i < list.count; ++i)
        if (element >= list.pass[i].offset &&
            element < list.pass[i].offset + list.pass[i].k() * list.pass[i].columns)
            return &list.pass[i];
    return nullptr;
}

// A thread writes 8 elements of the packed weights, those of 8 k and one column; behind them one bias each.
template <typename T>
__global__ void __launch_bounds__(256) mlp_pack_kernel(const __grid_constant__ PackParameters p) {
    const int i = static_cast<int>(blockIdx.x) * 256 + thread_rank(), vectors = p.passes.elements / 8;
    const MlpPlan& plan = p.in.plan;
    if (i < vectors) {
        const Pass* pass = pass_at(p.passes.forward, 8 * i);
        if (pass == nullptr) pass = pass_at(p.passes.backward, 8 * i);
        Floats<8> values;
        int column, k;
        packed_at(*pass, 8 * i - pass->offset, column, k);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const WeightPlace place = weight_place(plan, *pass, column, k + j);
            values.value[j] = 0;
            if (place.layer >= 0) {
                const MlpLayer& layer = plan.layer[place.layer];
                values.value[j] =
                    load_pack<1>(p.in.weights[place.layer] +
                                 place.row * (layer.input_columns + layer.feature_columns) + place.column)
                        .value[0];
            }
        }
        store_pack(static_cast<T*>(p.in.packed) + 8 * i, pack_from_float<T>(values));
    } else if (i < vectors + p.passes.biases) {
        const int j = i - vectors;
        float* biases = reinterpret_cast<float*>(static_cast<T*>(p.in.packed) + p.passes.elements);
        for (int n = 0; n < p.passes.forward.count; ++n) {
            const Pass& pass = p.passes.forward.pass[n];
            const int column = j - pass.bias;
            if (column < 0 || column >= pass.columns) continue;
            // The row that the column's weights come from; the first k of every layer is a real one, but for
            // the first layer, whose first k are features.
            const WeightPlace place = weight_place(plan, pass, column, 0);
            const bool has_bias = place.layer >= 0 && p.in.biases[place.layer] != nullptr;
            biases[j] = has_bias ? p.in.biases[place.layer][place.row] : 0.0f;
        }
    }
}

// ---- forward ------------------------------------------------------------------------------------

template <typename T>
struct ForwardParameters {
    MlpForwardArguments<T> in;
    PassList<kMostForward> passes;
    MlpTiling tiling;
    int elements, biases;  // of the packed weights
    int stages;            // of the ring
    int rounds;            // tiles of each block
};

constexpr unsigned kColourBytes = 4 * sizeof(float);  // of a row, the last of the four unused

template <int W>
MIPNERF_HOST_DEVICE SharedLayout forward_layout(const MlpPlan& plan, int biases, int stages,
                                                bool composites) {
    return {static_cast<unsigned>(stash_features(plan)) * kBlockRows * 2, W * kChunkK * 2, stages,
            static_cast<unsigned>(biases) * 4, composites ? kTileRows * kColourBytes : 0};
}

// 64 rows of features into a tile, and into the stash where there is one: zeros beyond the last sample and
// the last feature. By `threads` threads, this one number `thread`.
template <typename T>
MIPNERF_DEVICE void load_features(const MlpForwardArguments<T>& in, std::int64_t first_sample, int feature_k,
                                  int thread, int threads, T* tile, T* stash) {
    const int features = in.plan.shape.features;
    const std::int64_t left = in.samples - first_sample;
    const int rows = left < kBlockRows ? static_cast<int>(left) : kBlockRows;
    const T* from = in.features + first_sample * features;
#pragma unroll 1
    for (int i = thread; i < kBlockRows * feature_k / 8; i += threads) {
        const int row = i % kBlockRows, column = i / kBlockRows * 8;
        Pack<T, 8> pack;
#pragma unroll
        for (int j = 0; j < 8; ++j) pack.value[j] = T{0};
        if (row < rows) {
            if (features % 8 == 0) {
                if (column < features) pack = load_pack<8>(from + row * features + column);
            } else {
#pragma unroll
                for (int j = 0; j < 8; j += 2)
                    if (column + j < features) {
                        const Pack<T, 2> pair = load_pack<2>(from + row * features + column + j);
                        pack.value[j] = pair.value[0];
                        pack.value[j + 1] = pair.value[1];
                    }
            }
        }
        const int place = stash_place(row, column);
        store_pack_shared(tile + place, pack);
        if (stash != nullptr) store_pack_streaming(stash + place, pack);
    }
}

template <bool kIntegrated, int kDegrees, typename T>
MIPNERF_DEVICE void encode_to_tile(T* tile, int row, const EncodedCoordinate<float>& coordinate, int k,
                                   int min_deg, int degree, int degrees) {
    SinCos<float> value[kDegrees];
    encode_degrees<kIntegrated, kDegrees>(
        coordinate, bits_float(static_cast<std::uint32_t>(127 + min_deg + degree) << 23), value);
#pragma unroll
    for (int i = 0; i < kDegrees; ++i) {
        tile[stash_place(row, 3 * (degree + i) + k)] = from_float<T>(value[i].sin);
        tile[stash_place(row, 3 * (degrees + degree + i) + k)] = from_float<T>(value[i].cos);
    }
}

// Where the tile of a round stands: row r is sample first + r, that of number (before + r) counted from the
// first of `ray`. Only `count` rows are samples, where it is positive; the others repeat the last, without
// any the first.
struct TileRows {
    std::int64_t first, ray;
    int before, count;

    // The number of a row's sample, counted from the first of `ray`.
    MIPNERF_DEVICE unsigned number(int row) const {
        const int last = count > 0 ? count - 1 : 0;
        return static_cast<unsigned>(before + (row < last ? row : last));
    }
};

template <bool kComposites, typename T>
MIPNERF_DEVICE TileRows rows_of_round(const ForwardParameters<T>& p, int round) {
    TileRows rows{};
    std::int64_t left;
    if constexpr (kComposites) {
        const MlpTiling& tiling = p.tiling;
        const int part = tiling.tiles == 1 ? 0 : round % tiling.tiles;
        const std::int64_t group =
            std::int64_t{tiling.tiles == 1 ? round : round / tiling.tiles} * gridDim.x + blockIdx.x;
        rows.before = part * kTileRows;
        rows.first = group * tiling.group_samples + rows.before;
        rows.ray = group * tiling.rays;
        left = tiling.samples - rows.first;
        const std::int64_t of_group = tiling.group_samples - rows.before;
        if (left > of_group) left = of_group;
    } else {
        rows.first = (std::int64_t{round} * gridDim.x + blockIdx.x) * kTileRows;
        rows.ray = rows.first / p.in.samples_per_ray;
        rows.before = static_cast<int>(rows.first - rows.ray * p.in.samples_per_ray);
        left = p.in.samples - rows.first;
    }
    rows.count = left < kTileRows ? static_cast<int>(left > 0 ? left : 0) : kTileRows;
    if (rows.count == 0) rows.ray = rows.before = 0;
    return rows;
}

// The same features computed from fenceposts and rays: a thread has one coordinate of a sample at a time, of
// the 64 rows from `first_row` of the tile on.
template <typename T>
MIPNERF_DEVICE void encode_features(const MlpForwardArguments<T>& in, const TileRows& rows, int first_row,
                                    int feature_k, int thread, int threads, T* tile) {
    const MlpEncoding& encoding = in.encoding;
    const int degrees = in.plan.shape.features / 6;
#pragma unroll 1
    for (int i = thread; i < 3 * kBlockRows; i += threads) {
        const int row = i % kBlockRows, k = i / kBlockRows;
        const unsigned number = rows.number(first_row + row),
                       of_ray = static_cast<unsigned>(in.samples_per_ray);
        const std::int64_t ray = rows.ray + number / of_ray;
        const float* t = encoding.t_vals + ray * (of_ray + 1) + number % of_ray;
        const float t0 = load_pack<1>(t).value[0], t1 = load_pack<1>(t + 1).value[0];
        float origin[3], direction[3];
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            origin[j] = load_pack<1>(encoding.origins + 3 * ray + j).value[0];
            direction[j] = load_pack<1>(encoding.directions + 3 * ray + j).value[0];
        }
        RayConstants<float> constants =
            ray_constants(origin, direction, load_pack<1>(encoding.radii + ray).value[0]);
        // Chosen, not indexed: registers have no index.
        const auto choose = [k](float (&of)[3]) { of[0] = k == 0 ? of[0] : (k == 1 ? of[1] : of[2]); };
        choose(constants.origin);
        choose(constants.direction);
        choose(constants.squared);
        choose(constants.transverse);
        const FrustumMoments<float> moments = encoding.cylinder
                                                  ? frustum_moments<FrustumShape::kCylinder>(t0, t1)
                                                  : frustum_moments<FrustumShape::kCone>(t0, t1);
        const EncodedCoordinate<float> coordinate = encoded_coordinate(constants, moments, 0);
        int degree = 0;
        // 16-bit features are rounded a thousand times more coarsely than doubling an angle is.
#pragma unroll 1
        for (; degree + 4 <= degrees; degree += 4) {
            if (encoding.integrated)
                encode_to_tile<true, 4>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
            else
                encode_to_tile<false, 4>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
        }
#pragma unroll 1
        for (; degree < degrees; ++degree) {
            if (encoding.integrated)
                encode_to_tile<true, 1>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
            else
                encode_to_tile<false, 1>(tile, row, coordinate, k, encoding.min_deg, degree, degrees);
        }
        for (int column = 6 * degrees + k; column < feature_k; column += 3)
            tile[stash_place(row, column)] = T{0};
    }
}

// Sums of `Octets` octets of columns from biases in shared memory, those of this thread's first column.
template <int Octets, int Sums>
MIPNERF_DEVICE void start_from(float (&d)[Sums], const float* bias) {
#pragma unroll
    for (int j = 0; j < Octets; ++j) {
        const Pack<float, 2> pair = load_pack_shared<2>(bias + 8 * j);
        d[4 * j] = d[4 * j + 2] = pair.value[0];
        d[4 * j + 1] = d[4 * j + 3] = pair.value[1];
    }
}

// The same from the biases of the rays of this thread's two rows.
template <int Octets, typename T, int Sums>
MIPNERF_DEVICE void start_from_rays(float (&d)[Sums], const MlpForwardArguments<T>& in, const TileRows& rows,
                                    int row, int column) {
    const int columns = in.plan.shape.view_width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const std::int64_t ray =
            rows.ray + rows.number(row + 8 * half) / static_cast<unsigned>(in.samples_per_ray);
        const float* bias = in.ray_bias + ray * columns + column;
#pragma unroll
        for (int j = 0; j < Octets; ++j) {
            Pack<float, 2> pair{{0, 0}};
            if (8 * j < columns) pair = load_pack<2>(bias + 8 * j);
            d[4 * j + 2 * half] = pair.value[0];
            d[4 * j + 2 * half + 1] = pair.value[1];
        }
    }
}

// Where the raw colour of a row goes: to memory, or with compositing to the tile's colours in shared memory,
// of which these start at the thread's own first row.
template <bool kComposites, typename T>
MIPNERF_DEVICE float* colour_place(const MlpForwardArguments<T>& in, std::int64_t sample, float* colours,
                                   int half) {
    return kComposites ? colours + 4 * 8 * half : in.rgb + 3 * sample;
}

// The octet of columns that starts with the density (and goes on with the colour where there is no view
// branch), of this thread's rows. With compositing the density goes where the weight will be.
template <bool kComposites, typename T>
MIPNERF_DEVICE void store_heads(const MlpForwardArguments<T>& in, const TileRows& rows, int row, int column,
                                const float (&d)[4], float* colours) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= rows.count) continue;
        const std::int64_t sample = rows.first + row + 8 * half;
        const float first = d[2 * half], second = d[2 * half + 1];
        if (column == 0) (kComposites ? in.compositing.results.weights : in.density)[sample] = first;
        if (in.plan.shape.has_view) continue;
        float* const colour = colour_place<kComposites>(in, sample, colours, half);
        if (column == 0) colour[0] = second;
        if (column == 2) colour[1] = first;
        if (column == 2) colour[2] = second;
    }
}

template <bool kComposites, typename T>
MIPNERF_DEVICE void store_colour(const MlpForwardArguments<T>& in, const TileRows& rows, int row, int column,
                                 const float (&d)[4], float* colours) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= rows.count) continue;
        float* const colour = colour_place<kComposites>(in, rows.first + row + 8 * half, colours, half);
        if (column == 0) colour[0] = d[2 * half];
        if (column == 0) colour[1] = d[2 * half + 1];
        if (column == 2) colour[2] = d[2 * half];
    }
}

// The rays of a round's tile to pixels, by one warp. What it knows of a ray longer than a tile waits in the
// unused fourth channel of the first rows.
template <typename T>
MIPNERF_DEVICE void composite_round(const ForwardParameters<T>& p, int round, float* colours) {
    const MlpForwardArguments<T>& in = p.in;
    const TileRows rows = rows_of_round<true>(p, round);
    const int of_ray = static_cast<int>(in.samples_per_ray);
    const int of_tile = p.tiling.tiles > 1 ? rows.count : of_ray;
    std::int64_t ray = rows.ray;
#pragma unroll 1
    for (int row = 0; row < rows.count; row += of_tile, ++ray) {
        RayProgress progress;
        if (rows.before > 0) progress = kept_progress(colours + 3, 4);
        composite_samples(progress, in.encoding, in.compositing, of_ray, ray, rows.before, of_tile,
                          [colours, row](int i) {
                              const float* const at = colours + 4 * (row + i);
                              return Colour{at[0], at[1], at[2]};
                          });
        if (rows.before + of_tile == of_ray)
            finish_ray(progress, in.encoding, in.compositing, of_ray, ray);
        else
            keep_progress(progress, colours + 3, 4);
    }
}

// What a hidden layer leaves for the backward: its mask and its activations.
template <int W, typename T, int Sums>
MIPNERF_DEVICE void keep_hidden(const MlpForwardArguments<T>& in, int hidden, std::int64_t blocks,
                                std::int64_t block, const float (&d)[Sums], const unsigned (&a)[W / 4]) {
    const MlpLayer& layer = in.plan.layer[in.plan.hidden_layer[hidden]];
    store_mask<W>(mask_place<W>(static_cast<unsigned*>(in.masks), in.plan, block, hidden), d);
    store_fragments(
        static_cast<T*>(in.activations) +
            stash_block(blocks, stash_features(in.plan) + layer.stash_column, layer.outputs, block),
        a, layer.outputs);
}

// Threads 256 .. 383: weights by thread 256, features by the warps from 9 on, which load or compute them;
// with compositing warp 11 turns the tile before into pixels instead. Threads 0 .. 255: the chain, warpgroup
// w on rows 64 w .. 64 w + 63 of the tile. A thread holds of two rows two columns of every eight, as sums d
// or as operand a. Written: rgb and density of rows below `samples`, or with compositing pixels and weights;
// for training, stash and masks of every block of 64 rows that has such a row, its other rows computed from
// zeros.
template <int W, typename T, bool kComposites>
__global__ void MIPNERF_CLUSTER(kCluster) __launch_bounds__(kThreads, 1)
    mlp_forward_kernel(const __grid_constant__ ForwardParameters<T> p) {
    const MlpPlan& plan = p.in.plan;
    const SharedLayout layout = forward_layout<W>(plan, p.biases, p.stages, kComposites);
    Barrier* tile_full = shared_memory<Barrier>() + 2 * kMostStages;  // of each multiplying warpgroup
    Barrier* tile_empty = tile_full + 2;
    Barrier* colour_full = tile_empty + 2;
    Barrier* colour_empty = colour_full + 1;
    WeightRing ring(shared_memory<Barrier>(), shared_memory<unsigned char>(layout.stage()),
                    layout.stage_bytes, p.stages);
    float* biases = shared_memory<float>(layout.bias());
    const std::int64_t blocks = stash_blocks(p.in.samples);
    constexpr int kLoaders = kWarpgroup - (kComposites ? 2 : 1) * kWarpSize;
    constexpr Registers kRegisters = W == 256 ? kForEncoding : kForNarrower;

    if (thread_rank() == 0) {
        ring.init();
        for (int w = 0; w < 2; ++w) {
            barrier_init(tile_full + w, kLoaders);
            barrier_init(tile_empty + w, 1);
        }
        if constexpr (kComposites) {
            barrier_init(colour_full, 2 * kWarpgroup);
            barrier_init(colour_empty, kWarpSize);
        }
        barrier_init_fence();
    }
    const float* packed_biases =
        reinterpret_cast<const float*>(static_cast<const T*>(p.in.packed) + p.elements);
    for (int i = thread_rank(); i < p.biases; i += kThreads)
        biases[i] = load_pack<1>(packed_biases + i).value[0];
    cluster_sync();

    const int warpgroup = thread_rank() / kWarpgroup, t = thread_rank() % kWarpgroup;
    if (warpgroup == 2) {
        lower_registers<kRegisters.fetching>();
        if (t == 0) {
            for (int round = 0; round < p.rounds; ++round)
                for (int i = 0; i < p.passes.count; ++i) fetch_pass(ring, p.passes.pass[i], p.in.packed);
        } else if (kComposites && t >= kWarpSize + kLoaders) {
#pragma unroll 1
            for (int round = 0; round < p.rounds; ++round) {
                barrier_wait(colour_full, static_cast<unsigned>(round) & 1u);
                composite_round(p, round, shared_memory<float>(layout.colour()));
                barrier_arrive(colour_empty);
            }
        } else if (t >= kWarpSize) {
            const int feature_k = stash_features(plan);
            for (int round = 0; round < p.rounds; ++round) {
                const TileRows rows = rows_of_round<kComposites>(p, round);
                for (int w = 0; w < 2; ++w) {
                    const std::int64_t block = rows.first / kBlockRows + w;
                    T* stash =
                        !kComposites && p.in.activations != nullptr && block < blocks
                            ? static_cast<T*>(p.in.activations) + stash_block(blocks, 0, feature_k, block)
                            : nullptr;
                    barrier_wait(tile_empty + w, (static_cast<unsigned>(round) & 1u) ^ 1u);
                    T* tile = shared_memory<T>(layout.tile(w));
                    if (kComposites || p.in.encoding.t_vals != nullptr)
                        encode_features(p.in, rows, w * kBlockRows, feature_k, t - kWarpSize, kLoaders, tile);
                    else
                        load_features(p.in, block * kBlockRows, feature_k, t - kWarpSize, kLoaders, tile,
                                      stash);
                    proxy_fence();
                    barrier_arrive(tile_full + w);
                }
            }
        }
    } else {
        raise_registers<kRegisters.multiplying>();
        const unsigned char* tile = shared_memory<unsigned char>(layout.tile(warpgroup));
        const Fragment mine;
        [[maybe_unused]] float* const colours =
            shared_memory<float>(layout.colour()) + 4 * (kBlockRows * warpgroup + mine.row);
        constexpr unsigned none[4] = {};
        unsigned a[W / 4];
#pragma unroll
        for (int i = 0; i < W / 4; ++i) a[i] = 0;
        for (int round = 0; round < p.rounds; ++round) {
            const TileRows rows = rows_of_round<kComposites>(p, round);
            const std::int64_t block = rows.first / kBlockRows + warpgroup;
            const int row = warpgroup * kBlockRows + mine.row;
            const bool keeps = !kComposites && p.in.activations != nullptr && block < blocks;
            barrier_wait(tile_full + warpgroup, static_cast<unsigned>(round) & 1u);
            // Each kind of pass stands by itself, and nothing is chosen within one: see multiply.
            const auto finish = [&](const Pass& pass, const auto& d) {
                activate<T>(d, a);
                if (keeps) keep_hidden<W>(p.in, pass.hidden, blocks, block, d, a);
            };
            const auto hidden = [&](const Pass& pass, auto fragments) {
                float d[W / 2];
                start_from<W / 8>(d, biases + pass.bias + mine.column);
                multiply<T, W, decltype(fragments)::value, false, true>(d, ring, none, a, tile,
                                                                        pass.feature_k, false);
                finish(pass, d);
            };
            const auto wait_for_colours = [&]() {
                if constexpr (kComposites)
                    barrier_wait(colour_empty, (static_cast<unsigned>(round) & 1u) ^ 1u);
            };
            using All = std::integral_constant<int, W / 64>;
            using Half = std::integral_constant<int, (W / 2 + 63) / 64>;
            hidden(p.passes.pass[0], std::integral_constant<int, 0>{});
            int i = 1;
            for (; i < plan.shape.depth; ++i) hidden(p.passes.pass[i], All{});
            {
                const Pass& pass = p.passes.pass[i++];
                constexpr int kHead = W / 4;  // sums before those of the heads
                float d[kHead + 4];
                start_from<W / 16 + 1>(d, biases + pass.bias + mine.column);
                if (pass.layer >= 0) start_from_rays<W / 16>(d, p.in, rows, row, mine.column);
                multiply<T, W / 2 + 8, All::value, false, true>(d, ring, none, a, tile, pass.feature_k,
                                                                false);
                if (!plan.shape.has_view) wait_for_colours();
                store_heads<kComposites>(p.in, rows, row, mine.column,
                                         {d[kHead], d[kHead + 1], d[kHead + 2], d[kHead + 3]}, colours);
                if (pass.layer >= 0) finish(pass, d);
            }
            if (plan.shape.has_view && !has_narrow_view(plan.shape)) {
                const Pass& pass = p.passes.pass[i++];
                float d[W / 2];
                start_from_rays<W / 8>(d, p.in, rows, row, mine.column);
                multiply<T, W, All::value, false, true>(d, ring, none, a, tile, pass.feature_k, false);
                finish(pass, d);
            }
            for (; i < p.passes.count && p.passes.pass[i].kind == PassKind::kForward; ++i)
                hidden(p.passes.pass[i], All{});
            if (t == 0) barrier_arrive(tile_empty + warpgroup);
            if (plan.shape.has_view) {
                const Pass& pass = p.passes.pass[i];
                float d[4];
                start_from<1>(d, biases + pass.bias + mine.column);
                if (pass.fragments < All::value)
                    multiply<T, 8, Half::value, false, false>(d, ring, none, a, nullptr, 0, false);
                else
                    multiply<T, 8, All::value, false, false>(d, ring, none, a, nullptr, 0, false);
                wait_for_colours();
                store_colour<kComposites>(p.in, rows, row, mine.column, d, colours);
            }
            if constexpr (kComposites) barrier_arrive(colour_full);
        }
    }
    cluster_sync();  // nobody leaves while its neighbour may still send to it
}

// ---- launches -----------------------------------------------------------------------------------

template <int W, typename T>
void launch_mlp_pack(const MlpPackArguments& arguments, Stream stream) {
    PackParameters parameters{arguments, make_passes(arguments.plan)};
    const std::int64_t threads = parameters.passes.elements / 8 + parameters.passes.biases;
    MIPNERF_LAUNCH((mlp_pack_kernel<T>), grid_size(ceil_div(threads, std::int64_t{256})), dim3(256), 0,
                   stream, parameters);
}

template <int W, typename T, bool kComposites>
void launch_forward(ForwardParameters<T>& parameters, int biases, Stream stream) {
    const MlpPlan& plan = parameters.in.plan;
    const auto bytes = [&] {
        return forward_layout<W>(plan, biases, parameters.stages, kComposites).bytes();
    };
    parameters.stages = kMostStages;
    while (bytes() > kMostSharedBytes) --parameters.stages;
    const PersistentGrid grid(parameters.tiling.groups);
    parameters.rounds = grid.rounds * parameters.tiling.tiles;
    MIPNERF_LAUNCH_CLUSTERS((mlp_forward_kernel<W, T, kComposites>), kCluster, grid_size(grid.blocks),
                            dim3(kThreads), bytes(), stream, parameters);
}

template <int W, typename T>
void launch_mlp_forward(const MlpForwardArguments<T>& arguments, Stream stream) {
    const Passes passes = make_passes(arguments.plan);
    const bool composites = arguments.compositing.results.rgb != nullptr;
    ForwardParameters<T> parameters{};
    parameters.in = arguments;
    parameters.passes = passes.forward;
    parameters.tiling = mlp_tiling(arguments.samples, arguments.samples_per_ray, composites);
    parameters.elements = passes.elements;
    parameters.biases = passes.biases;
    if (composites)
        launch_forward<W, T, true>(parameters, passes.biases, stream);
    else
        launch_forward<W, T, false>(parameters, passes.biases, stream);
}

}  // namespace mlp_hopper
}  // namespace mipnerf
