// The gradients of the fused network with mma.sync products: the chain of deltas from the heads down to the
// features (dgrad), and the gradients of weights and biases from deltas and activations (wgrad).
#pragma once

#include "mlp_launch.h"
#include "mlp_tile.cuh"

namespace mipnerf {
namespace mlp_mma {

// ---- dgrad

template <typename T>
struct DgradParameters {
    MlpPasses passes;
    std::int64_t samples;
    int feature_columns;
    int hidden;
    const float* grad_rgb;
    const float* grad_density;
    const unsigned char* packed;
    const unsigned* masks;
    T* deltas;
    T* head_deltas;
    float* grad_features;
};

// Channels 2q and 2q + 1 of the gradients of a sample; past the end, and beyond the fourth channel, zeros.
template <typename T>
MIPNERF_DEVICE Floats<2> head_delta(const DgradParameters<T>& in, const TileRows& rows, int row, int q) {
    Floats<2> two{};
    if (row < rows.count && q < 2) {
        const std::int64_t sample = rows.first + row;
        if (in.grad_rgb != nullptr) {
            two.value[0] = load_pack<1>(in.grad_rgb + 3 * sample + 2 * q).value[0];
            if (q == 0) two.value[1] = load_pack<1>(in.grad_rgb + 3 * sample + 1).value[0];
        }
        if (q == 1 && in.grad_density != nullptr)
            two.value[1] = load_pack<1>(in.grad_density + sample).value[0];
    }
    return two;
}

// The heads' deltas as wgrad reads them, [samples, 8].
template <typename T>
MIPNERF_DEVICE void store_head_deltas(const DgradParameters<T>& in, const TileRows& rows) {
    const int row = thread_rank();
    if (row >= rows.count) return;
    const Floats<2> low = head_delta(in, rows, row, 0), high = head_delta(in, rows, row, 1);
    const Floats<8> eight{{low.value[0], low.value[1], high.value[0], high.value[1]}};
    stg128(in.head_deltas + (rows.first + row) * kHeadDeltas, pack_from_float<T>(eight));
}

// The heads' deltas as the operand of one step: four columns, the rest zero.
template <int W, typename T>
MIPNERF_DEVICE void load_head_operand(Operand<W>& operand, const DgradParameters<T>& in,
                                      const WarpPart<W>& part, const TileRows& rows) {
    const Lane lane;
#pragma unroll
    for (int r = 0; r < Geometry<W>::kRowBlocks; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Floats<2> two = head_delta(in, rows, part.row + 16 * r + 8 * half + lane.g, lane.q);
            operand.value[r][half] = detail::bit_copy<unsigned>(pack_from_float<T>(two));
        }
        operand.value[r][2] = operand.value[r][3] = 0;
    }
}

// Who: as the forward. Written: the deltas of the heads and of every hidden layer, [samples, outputs] each;
// the gradients of the features where wanted, by the same thread in every pass that adds to them.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads, Geometry<W>::kBlocksTogether)
    mlp_dgrad_kernel(const __grid_constant__ DgradParameters<T> in) {
    T* tile = shared_memory<T>();
    const int tiles = tile_count(in.samples);
    const WarpPart<W> part;
    WeightStream<W> stream(in.passes, in.packed, tiles_of_block(tiles));
    for (int number = static_cast<int>(blockIdx.x); number < tiles; number += static_cast<int>(gridDim.x)) {
        const TileRows rows(number, in.samples);
        store_head_deltas(in, rows);
#pragma unroll 1
        for (int i = 0; i < in.passes.count; ++i) {
            const MlpPass& pass = in.passes.pass[i];
            Pack<unsigned, Geometry<W>::kRowBlocks> masks{};
            if (pass.hidden >= 0)
                masks = load_pack<Geometry<W>::kRowBlocks>(
                    in.masks + ((static_cast<std::int64_t>(number) * in.hidden + pass.hidden) * kThreads +
                                thread_rank()) *
                                   Geometry<W>::kRowBlocks);
            Result<W> result{};
            if (pass.steps[kFromHeads] > 0) {
                Operand<W> operand;
                load_head_operand(operand, in, part, rows);
                multiply<W, T>(result, operand, stream.next(), part, pass.columns);
            }
            multiply_tile(result, stream, tile, part, pass.steps[kFromTile], pass.columns);
            if (pass.hidden < 0) {
                for_each_part(result, part, pass.columns,
                              [&](int, int, int row, int column, float (&value)[4]) {
                                  column += pass.first_column;
                                  if (column >= in.feature_columns) return;
#pragma unroll
                                  for (int half = 0; half < 2; ++half) {
                                      if (row + 8 * half >= rows.count) continue;
                                      float* to = in.grad_features +
                                                  (rows.first + row + 8 * half) * in.feature_columns + column;
                                      Pack<float, 2> two{{value[2 * half], value[2 * half + 1]}};
                                      if (pass.accumulates) {
                                          two.value[0] += to[0];
                                          two.value[1] += to[1];
                                      }
                                      store_pack(to, two);
                                  }
                              });
                continue;
            }
            block_sync();  // every warp has read the tile
            for_each_part(result, part, pass.columns,
                          [&](int r, int product, int row, int column, float (&value)[4]) {
#pragma unroll
                              for (int k = 0; k < 4; ++k)
                                  if (!(masks.value[r] >> (4 * product + k) & 1)) value[k] = 0.0f;
                              store_to_tile<W>(tile, row, column, value[0], value[1]);
                              store_to_tile<W>(tile, row + 8, column, value[2], value[3]);
                          });
            block_sync();
            store_tile<W>(tile, in.deltas + pass.stash_column * in.samples + rows.first * pass.columns,
                          rows.count, pass.columns);
        }
    }
}

// ---- wgrad

constexpr int kWgradStages = 3;
constexpr int kWgradSamples = 32;  // of a stage

template <int W>
struct WgradGeometry {
    static constexpr int kTile = W == 64 ? 64 : 128;  // rows and columns of a block's tile of gradients
    static constexpr int kWarpsAcross = 4;
    static constexpr int kRowBlocks = kTile / 32;  // blocks of 16 rows of a warp
    static constexpr int kPairs = kTile / 64;      // blocks of 16 columns of a warp
    static constexpr int kHalfStage =
        kWgradSamples * kTile;  // numbers of the deltas or the inputs of a stage
    static constexpr std::size_t kSharedBytes = kWgradStages * 2 * kHalfStage * 2;
};

template <typename T>
struct WgradParameters {
    MlpGradientMatrices matrices;
    std::int64_t samples;
    int splits;
    bool atomic;
    const T* features;
    const T* activations;
    const T* deltas;
    float* gradients;         // of the first split
    std::int64_t split_size;  // floats from one split's gradients to the next
};

// Rows of a stage hold kTile numbers, their 16-byte pieces at their place xor row % 8.
template <int W, typename T>
MIPNERF_DEVICE T* stage_at(T* half, int row, int column) {
    return half + row * WgradGeometry<W>::kTile + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

// Columns first .. first + kTile of the 32 rows from `sample` on of a matrix, zeros where it ends.
template <int W, typename T>
MIPNERF_DEVICE void load_half_stage(T* half, const T* matrix, std::int64_t sample, std::int64_t samples,
                                    int first, int columns) {
    constexpr int kTile = WgradGeometry<W>::kTile, kPieces = kTile / 8;
    const int rows = samples - sample < kWgradSamples ? static_cast<int>(samples - sample) : kWgradSamples;
    const T* from = matrix + sample * columns + first;
    if (columns % 8 == 0) {  // then every row starts at a multiple of 16 bytes
#pragma unroll
        for (int i = thread_rank(); i < kWgradSamples * kPieces; i += kThreads) {
            const int row = i / kPieces, column = i % kPieces * 8;
            const bool valid = row < rows && first + column < columns;
            async_copy16(stage_at<W>(half, row, column), valid ? from + row * columns + column : matrix,
                         valid);
        }
        return;
    }
#pragma unroll 1
    for (int i = thread_rank(); i < kWgradSamples * kTile; i += kThreads) {
        const int row = i / kTile, column = i % kTile;
        const bool valid = row < rows && first + column < columns;
        *stage_at<W>(half, row, column) =
            valid ? load_pack<1>(from + row * columns + column).value[0] : from_float<T>(0.0f);
    }
}

// Who: a block has a tile of one matrix of gradients and a range of the samples, 32 of which are in a stage;
// a warp has half the tile's rows and a quarter of its columns. Both operands are turned round on their way
// from shared memory, since samples are what is summed over. Written: the range's part of the tile, and of
// the biases where the tile is the matrix's first; or it is added to the gradients.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    mlp_wgrad_kernel(const __grid_constant__ WgradParameters<T> in) {
    using G = WgradGeometry<W>;
    const int split = static_cast<int>(blockIdx.x) / in.matrices.tiles;
    int tile = static_cast<int>(blockIdx.x) % in.matrices.tiles, number = 0;
    while (tile >= in.matrices.matrix[number].tiles) tile -= in.matrices.matrix[number++].tiles;
    const MlpGradientMatrix& matrix = in.matrices.matrix[number];
    const int first_row = tile % matrix.tiles_down * G::kTile,
              first_column = tile / matrix.tiles_down * G::kTile;
    const T* deltas = in.deltas + matrix.delta_column * in.samples;
    const T* inputs =
        matrix.input_column < 0 ? in.features : in.activations + matrix.input_column * in.samples;

    const std::int64_t all = ceil_div(in.samples, std::int64_t{kWgradSamples});
    const std::int64_t begin = all * split / in.splits;
    const int stages = static_cast<int>(all * (split + 1) / in.splits - begin);
    T* shared = shared_memory<T>();
    const auto issue = [&](int stage, int place) {
        if (stage < stages) {
            T* half = shared + place * 2 * G::kHalfStage;
            const std::int64_t sample = (begin + stage) * kWgradSamples;
            load_half_stage<W>(half, deltas, sample, in.samples, first_row, matrix.delta_pitch);
            load_half_stage<W>(half + G::kHalfStage, inputs, sample, in.samples, first_column,
                               matrix.columns);
        }
        async_commit();
    };

    const Lane lane;
    const int warp_row = warp_index() / G::kWarpsAcross * 16 * G::kRowBlocks;
    const int warp_column = warp_index() % G::kWarpsAcross * 16 * G::kPairs;
    // The biases of a block of rows are summed by one of the warps that have it.
    const int bias_block =
        matrix.bias >= 0 && first_column == 0 ? warp_index() % G::kWarpsAcross : G::kRowBlocks;
    const bool has_work = first_row + warp_row < matrix.delta_pitch &&
                          (first_column + warp_column < matrix.columns || bias_block < G::kRowBlocks);
    const unsigned ones = detail::bit_copy<unsigned>(pack_from_float<T>(Floats<2>{{1.0f, 1.0f}}));
    float result[G::kRowBlocks][2 * G::kPairs][4] = {}, bias[4] = {};

#pragma unroll
    for (int stage = 0; stage < kWgradStages - 1; ++stage) issue(stage, stage);
    int place = 0;  // of the stage in the ring
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
        async_wait<kWgradStages - 2>();
        block_sync();  // the stage is there for every warp, and the one used last is free
        issue(stage + kWgradStages - 1, place == 0 ? kWgradStages - 1 : place - 1);
        T* half = shared + place * 2 * G::kHalfStage;
        place = place + 1 == kWgradStages ? 0 : place + 1;
        if (!has_work) continue;
#pragma unroll
        for (int step = 0; step < kWgradSamples / 16; ++step) {
            unsigned a[G::kRowBlocks][4];
#pragma unroll
            for (int r = 0; r < G::kRowBlocks; ++r)
                ldmatrix_x4_transposed(a[r], stage_at<W>(half, 16 * step + lane.lane % 8 + lane.lane / 16 * 8,
                                                         warp_row + 16 * r + lane.lane / 8 % 2 * 8));
#pragma unroll
            for (int pair = 0; pair < G::kPairs; ++pair) {
                unsigned b[4];
                ldmatrix_x4_transposed(b, stage_at<W>(half + G::kHalfStage, 16 * step + lane.lane % 16,
                                                      warp_column + 16 * pair + lane.lane / 16 * 8));
#pragma unroll
                for (int r = 0; r < G::kRowBlocks; ++r) {
                    mma_m16n8k16<T>(result[r][2 * pair], a[r], b[0], b[1]);
                    mma_m16n8k16<T>(result[r][2 * pair + 1], a[r], b[2], b[3]);
                }
            }
#pragma unroll
            for (int r = 0; r < G::kRowBlocks; ++r)  // the columns of a product with ones are the sums
                if (r == bias_block) mma_m16n8k16<T>(bias, a[r], ones, ones);
        }
    }
    async_wait<0>();

    float* gradients = in.gradients + split * in.split_size;
#pragma unroll
    for (int r = 0; r < G::kRowBlocks; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + warp_row + 16 * r + 8 * half + lane.g - matrix.first_row;
            if (row < 0 || row >= matrix.rows) continue;
            float* to = gradients + matrix.gradient + static_cast<std::int64_t>(row) * matrix.gradient_pitch;
#pragma unroll
            for (int product = 0; product < 2 * G::kPairs; ++product) {
                const int column = first_column + warp_column + 8 * product + 2 * lane.q;
                if (column >= matrix.columns) continue;
                const Pack<float, 2> two{{result[r][product][2 * half], result[r][product][2 * half + 1]}};
                if (in.atomic) {
                    atomic_add(to + column, two.value[0]);
                    atomic_add(to + column + 1, two.value[1]);
                } else {
                    store_pack(to + column, two);
                }
            }
            if (r == bias_block && lane.q == 0) {
                if (in.atomic)
                    atomic_add(gradients + matrix.bias + row, bias[2 * half]);
                else
                    gradients[matrix.bias + row] = bias[2 * half];
            }
        }
}

// Who: a thread sums four floats over the splits, in their order; without splits it writes zeros.
__global__ void __launch_bounds__(kThreads)
    mlp_sum_splits_kernel(const float* workspace, int splits, float* gradients, int count) {
    const int i = 4 * (static_cast<int>(blockIdx.x) * kThreads + thread_rank());
    if (i >= count) return;
    Pack<float, 4> sum{};
    for (int split = 0; split < splits; ++split) {
        const auto part = ldg128(workspace + static_cast<std::int64_t>(split) * count + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.value[k] += part.value[k];
    }
    stg128(gradients + i, sum);
}

// Who: a thread sums eight columns of the deltas of one ray over its samples, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mlp_ray_sums_kernel(const T* deltas, std::int64_t rays, std::int64_t samples_per_ray, int columns,
                        float* sums) {
    const int pieces = columns / 8;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + thread_rank();
    const std::int64_t ray = at / pieces;
    if (ray >= rays) return;
    const int column = 8 * static_cast<int>(at % pieces);
    const T* from = deltas + ray * samples_per_ray * columns + column;
    Floats<8> sum{};
#pragma unroll 4
    for (std::int64_t sample = 0; sample < samples_per_ray; ++sample) {
        const Floats<8> eight = pack_to_float(ldg128(from + sample * columns));
#pragma unroll
        for (int k = 0; k < 8; ++k) sum.value[k] += eight.value[k];
    }
    float* to = sums + ray * columns + column;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
        Pack<float, 4> four;
#pragma unroll
        for (int k = 0; k < 4; ++k) four.value[k] = sum.value[4 * part + k];
        stg128(to + 4 * part, four);
    }
}

// ---- launches

template <int W, typename T>
void launch_mlp_dgrad(const MlpDgradArguments<T>& arguments, Stream stream) {
    const MlpSchedule schedule = make_mlp_schedule(arguments.plan);
    DgradParameters<T> in{};
    in.passes = arguments.grad_features != nullptr ? schedule.dgrad_features : schedule.dgrad;
    in.samples = arguments.samples;
    in.feature_columns = arguments.plan.shape.features;
    in.hidden = arguments.plan.hidden;
    in.grad_rgb = arguments.grad_rgb;
    in.grad_density = arguments.grad_density;
    in.packed = static_cast<const unsigned char*>(arguments.packed);
    in.masks = static_cast<const unsigned*>(arguments.masks);
    in.deltas = static_cast<T*>(arguments.deltas);
    in.head_deltas = in.deltas + in.samples * arguments.plan.stash_columns;
    in.grad_features = arguments.grad_features;
    constexpr std::size_t kBytes = Geometry<W>::kSharedBytes;
    const std::int64_t tiles = ceil_div(in.samples, std::int64_t{kTileRows});
    MIPNERF_LAUNCH((mlp_dgrad_kernel<W, T>), persistent_grid(mlp_dgrad_kernel<W, T>, tiles, kBytes),
                   dim3(kThreads), kBytes, stream, in);
}

// The samples split among `splits` blocks for each tile.
template <int W, typename T>
void launch_mlp_wgrad_split(const MlpWgradArguments<T>& arguments, int splits, Stream stream) {
    const MlpPlan& plan = arguments.plan;
    const bool atomic = arguments.workspace == nullptr && splits > 1;
    WgradParameters<T> in{};
    in.matrices = make_gradient_matrices(plan, WgradGeometry<W>::kTile);
    in.samples = arguments.samples;
    in.splits = splits;
    in.atomic = atomic;
    in.features = arguments.features;
    in.activations = static_cast<const T*>(arguments.activations);
    in.deltas = static_cast<const T*>(arguments.deltas);
    auto* workspace = static_cast<float*>(arguments.workspace);
    in.gradients = splits > 1 && !atomic ? workspace : arguments.gradients;
    in.split_size = atomic ? 0 : plan.gradients;
    const auto sum_splits = [&](int count) {
        MIPNERF_LAUNCH(mlp_sum_splits_kernel, grid_size(ceil_div(plan.gradients, 4 * kThreads)),
                       dim3(kThreads), 0, stream, workspace, count, arguments.gradients, plan.gradients);
    };
    if (atomic) sum_splits(0);
    MIPNERF_LAUNCH((mlp_wgrad_kernel<W, T>), grid_size(std::int64_t{in.matrices.tiles} * splits),
                   dim3(kThreads), WgradGeometry<W>::kSharedBytes, stream, in);
    if (splits > 1 && !atomic) sum_splits(splits);
    if (arguments.ray_sums == nullptr) return;
    const MlpLayer& view = plan.layer[plan.hidden_layer[plan.shape.depth]];
    const std::int64_t rays = arguments.samples / arguments.samples_per_ray;
    MIPNERF_LAUNCH(mlp_ray_sums_kernel<T>,
                   grid_size(ceil_div(rays * (view.outputs / 8), std::int64_t{kThreads})), dim3(kThreads), 0,
                   stream, in.deltas + view.stash_column * in.samples, rays, arguments.samples_per_ray,
                   view.outputs, arguments.ray_sums);
}

template <int W, typename T>
void launch_mlp_wgrad(const MlpWgradArguments<T>& arguments, Stream stream) {
    launch_mlp_wgrad_split<W, T>(arguments, wgrad_splits(arguments.samples), stream);
}

}  // namespace mlp_mma
}  // namespace mipnerf
