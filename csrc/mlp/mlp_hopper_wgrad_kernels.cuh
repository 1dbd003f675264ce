// The second half of the fused network's backward on compute capability 9.0a: the gradients of the weights as
// products over the samples, of what forward and dgrad left in the stash. What the emulation cannot show is
// said in mlp_hopper_chain.cuh.
#pragma once

#include "mlp_hopper_chain.cuh"
#include "mlp_launch.h"

namespace mipnerf {
namespace mlp_hopper {

// Every gradient is a sum over the samples of products of two matrices of the stash, rows of the one times
// columns of the other. A group is such a product, its result cut into one or two tiles of rows.
//     main    rows: a layer's outputs (its deltas); columns: W of what it reads. Biases: products with ones
//     heads   rows: what a head reads; columns: the channels (their deltas). Biases: the channels' sums
struct WgradGroup {
    bool is_main;
    bool rows_from_deltas, columns_from_deltas;
    std::int16_t rows_before, rows;  // columns of the stash before the matrix, and its own: the result's rows
    std::int16_t columns_before, columns;  // the same of the other one
    std::int16_t first_column;             // of that one's: the result's columns
    std::int16_t tiles;                    // of rows
    std::int16_t layer;
    // Column of the layer's weight that the result's first row (heads) or column (main) is, and how many it
    // has.
    std::int16_t weight_column, valid;
    bool has_bias;
    std::int32_t cost;  // of a block of samples
    std::int64_t first_unit;
};

constexpr int kMostGroups = 3 * kMlpMaxLayers + 8;
constexpr int kMostPairs = 72;  // of blocks

struct WgradGroups {
    int count;
    std::int64_t units;  // of all groups: cost times blocks of samples
    WgradGroup group[kMostGroups];
};

template <int W>
struct WgradTile {
    static constexpr bool kSplitsColumns = W == 64;  // between the warpgroups; otherwise they split the rows
    static constexpr int kRows = kSplitsColumns ? 64 : 128;
    static constexpr int kColumns = kSplitsColumns ? W / 2 : W;  // of a warpgroup
    static constexpr int kSums = kColumns / 2;                   // of a thread
    // Partial sums: pairs of a thread's, 256 threads beside each other; then one number for each row, or
    // channel.
    static constexpr int kFloats = kSums * 256 + 128;
    static constexpr unsigned kRowBytes = kRows * kBlockRows * 2, kColumnBytes = W * kBlockRows * 2;
    static constexpr unsigned kStageBytes = kRowBytes + kColumnBytes;
    static constexpr int kStages = 4;
    static constexpr unsigned kOnes = 256, kOnesBytes = 64 * 16 * 2;
    static constexpr std::size_t kSharedBytes = kOnes + kOnesBytes + kStages * kStageBytes;
};

template <int W>
WgradGroups make_groups(const MlpPlan& plan, std::int64_t samples) {
    using Tile = WgradTile<W>;
    WgradGroups groups{};
    const std::int64_t blocks = stash_blocks(samples);
    const int feature_k = stash_features(plan);
    const auto add = [&](int l, int input, bool of_features, int first, bool has_bias) {
        const MlpLayer& layer = plan.layer[l];
        WgradGroup group{};
        group.is_main = layer.channel < 0;
        group.layer = static_cast<std::int16_t>(l);
        group.has_bias = has_bias;
        const int read_before =
            of_features ? 0 : feature_k + plan.layer[plan.hidden_layer[input]].stash_column;
        const int read = of_features ? feature_k : plan.layer[plan.hidden_layer[input]].outputs;
        const int valid = of_features ? layer.feature_columns : layer.input_columns;
        group.weight_column = static_cast<std::int16_t>(of_features ? layer.input_columns : 0);
        if (group.is_main) {
            group.rows_from_deltas = true;
            group.rows_before = static_cast<std::int16_t>(kChannelColumns + layer.stash_column);
            group.rows = static_cast<std::int16_t>(layer.outputs);
            group.columns_before = static_cast<std::int16_t>(read_before);
            group.columns = static_cast<std::int16_t>(read);
            group.first_column = static_cast<std::int16_t>(first);
            group.weight_column = static_cast<std::int16_t>(group.weight_column + first);
            group.valid = static_cast<std::int16_t>(valid - first < W ? valid - first : W);
        } else {
            group.columns_from_deltas = true;
            group.rows_before = static_cast<std::int16_t>(read_before);
            group.rows = static_cast<std::int16_t>(read);
            group.columns = kChannelColumns;
            group.valid = static_cast<std::int16_t>(valid);
        }
        group.tiles = static_cast<std::int16_t>((group.rows + Tile::kRows - 1) / Tile::kRows);
        const int columns = group.is_main ? group.valid : kChannelColumns;
        group.cost = (Tile::kRows + columns + 63) / 64;  // bytes to fetch
        group.first_unit = groups.units;
        groups.units += group.cost * blocks;
        groups.group[groups.count++] = group;
    };
    for (int l = 0; l < plan.layers; ++l) {
        const MlpLayer& layer = plan.layer[l];
        const bool has_input = layer.input_columns > 0;
        if (has_input) add(l, layer.input, false, 0, true);
        const int step = layer.channel < 0 ? W : layer.feature_columns;
        for (int first = 0; first < layer.feature_columns; first += step)
            add(l, layer.input, true, first, !has_input && first == 0);
    }
    return groups;
}

// Which blocks of samples of a group's tile the block of threads with this rank in its pair takes: [first,
// last). Pairs share all units evenly, in order. Where a group has two tiles each block has its own; where it
// has one, they halve the samples.
struct WgradRange {
    std::int64_t first, last;
};

MIPNERF_HOST_DEVICE WgradRange wgrad_range(const WgradGroups& groups, int group, int pair, int pairs,
                                           int rank, std::int64_t blocks) {
    const WgradGroup& g = groups.group[group];
    const auto bound = [&](std::int64_t unit) {
        const std::int64_t block = (unit - g.first_unit + g.cost - 1) / g.cost;
        return unit <= g.first_unit ? 0 : (block < blocks ? block : blocks);
    };
    WgradRange range{bound(groups.units * pair / pairs), bound(groups.units * (pair + 1) / pairs)};
    if (g.tiles == 1) {
        const std::int64_t middle = (range.first + range.last + 1) / 2;
        (rank == 0 ? range.last : range.first) = middle;
    }
    return range;
}

template <typename T>
struct WgradParameters {
    MlpWgradArguments<T> in;
    WgradGroups groups;
    int pairs;
};

// Where in the workspace a block's partial sums of a group are: along its groups and from pair to pair the
// sum grows.
template <int W>
MIPNERF_HOST_DEVICE std::int64_t partial_place(int group, int pair, int rank) {
    return (std::int64_t{2} * (group + pair) + rank) * WgradTile<W>::kFloats;
}

// Hands `store(offset into the gradients, value)` a pair of sums: number 2 i and the next of thread t (0 ..
// 255).
template <int W, typename Store>
MIPNERF_DEVICE void give_sums(const MlpPlan& plan, const WgradGroup& group, int tile, int t, int i,
                              float first, float second, const Store& store) {
    using Tile = WgradTile<W>;
    const MlpLayer& layer = plan.layer[group.layer];
    const int warpgroup = t / kWarpgroup, lane = t % kWarpSize,
              columns = layer.input_columns + layer.feature_columns;
    const int row = tile * Tile::kRows + (Tile::kSplitsColumns ? 0 : 64 * warpgroup) +
                    t % kWarpgroup / kWarpSize * 16 + lane / 4 + 8 * (i % 2);
    const int column = (Tile::kSplitsColumns && group.is_main ? Tile::kColumns * warpgroup : 0) +
                       8 * (i / 2) + 2 * (lane % 4);
    if (group.is_main) {
        if (row >= layer.outputs) return;
        const int at = layer.weight_offset + row * columns + group.weight_column + column;
        if (column < group.valid) store(at, first);
        if (column + 1 < group.valid) store(at + 1, second);
    } else if (row < group.valid && !(Tile::kSplitsColumns && warpgroup == 1)) {
        const int at = layer.weight_offset + group.weight_column + row;
        const int channel = column - layer.channel;
        if (channel >= 0 && channel < layer.outputs) store(at + channel * columns, first);
        if (channel + 1 >= 0 && channel + 1 < layer.outputs) store(at + (channel + 1) * columns, second);
    }
}

// The same of number i of the 128 that stand for biases: a row of the tile, or a channel.
template <typename Store>
MIPNERF_DEVICE void give_bias(const MlpPlan& plan, const WgradGroup& group, int first_row, int i, float value,
                              const Store& store) {
    const MlpLayer& layer = plan.layer[group.layer];
    const int row = group.is_main ? first_row + i : i - layer.channel;
    if (group.has_bias && row >= 0 && row < layer.outputs) store(layer.bias_offset + row, value);
}

// Two warpgroups multiply and thread 256 fetches: for each group of which this block has a part, 64 samples
// at a time, the rows' and the columns' part of a block of the stash, which are operands as they lie there.
// The sums stay in registers; at the end of a part they go to the workspace, or are added to the gradients.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    mlp_wgrad_kernel(const __grid_constant__ WgradParameters<T> p) {
    using Tile = WgradTile<W>;
    const std::int64_t blocks = stash_blocks(p.in.samples);
    Ring<1> ring(shared_memory<Barrier>(), shared_memory<unsigned char>(Tile::kOnes + Tile::kOnesBytes),
                 Tile::kStageBytes, Tile::kStages);
    T* ones = shared_memory<T>(Tile::kOnes);
    for (int i = thread_rank(); i < static_cast<int>(Tile::kOnesBytes / 2); i += kThreads)
        ones[i] = from_float<T>(1.0f);
    proxy_fence();
    if (thread_rank() == 0) {
        ring.init();
        barrier_init_fence();
    }
    block_sync();

    constexpr Registers kRegisters = W == 256 ? kForWidest : kForNarrower;
    const int warpgroup = thread_rank() / kWarpgroup, pair = static_cast<int>(blockIdx.x) / 2,
              rank = static_cast<int>(blockIdx.x) % 2;
    if (warpgroup == 2) {
        lower_registers<kRegisters.fetching>();
        if (thread_rank() != 2 * kWarpgroup) return;
        for (int g = 0; g < p.groups.count; ++g) {
            const WgradGroup& group = p.groups.group[g];
            const WgradRange range = wgrad_range(p.groups, g, pair, p.pairs, rank, blocks);
            const int first_row = group.tiles > 1 ? rank * Tile::kRows : 0;
            const int rows = group.rows - first_row < Tile::kRows ? group.rows - first_row : Tile::kRows;
            const int left = group.columns - group.first_column, columns = left < W ? left : W;
            const auto from = [&](bool of_deltas, int before, int of_columns, std::int64_t block,
                                  int column) {
                return reinterpret_cast<const unsigned char*>(
                    static_cast<const T*>(of_deltas ? p.in.deltas : p.in.activations) +
                    stash_block(blocks, before, of_columns, block) + column * kBlockRows);
            };
            for (std::int64_t block = range.first; block < range.last; ++block) {
                const unsigned row_bytes = static_cast<unsigned>(rows) * kBlockRows * 2;
                const unsigned column_bytes = static_cast<unsigned>(columns) * kBlockRows * 2;
                ring.begin(row_bytes + column_bytes);
                copy_bulk(ring.here(),
                          from(group.rows_from_deltas, group.rows_before, group.rows, block, first_row),
                          row_bytes, ring.full + ring.stage);
                copy_bulk(ring.here() + Tile::kRowBytes,
                          from(group.columns_from_deltas, group.columns_before, group.columns, block,
                               group.first_column),
                          column_bytes, ring.full + ring.stage);
                ring.next();
            }
        }
        return;
    }
    raise_registers<kRegisters.multiplying>();
    const int t = thread_rank(), of_group = t % kWarpgroup;
    constexpr unsigned kOctet = kBlockRows * 16;  // bytes of 8 columns of the stash
    const unsigned my_rows = Tile::kSplitsColumns ? 0u : static_cast<unsigned>(warpgroup) * 8 * kOctet;
    const unsigned my_columns =
        Tile::kRowBytes +
        (Tile::kSplitsColumns ? static_cast<unsigned>(warpgroup) * (Tile::kColumns / 8) * kOctet : 0u);
    for (int g = 0; g < p.groups.count; ++g) {
        const WgradGroup& group = p.groups.group[g];
        const WgradRange range = wgrad_range(p.groups, g, pair, p.pairs, rank, blocks);
        if (range.first >= range.last) continue;
        const int tile = group.tiles > 1 ? rank : 0;
        const auto add = [&](int at, float value) { atomic_add(p.in.gradients + at, value); };
        float* partial = static_cast<float*>(p.in.workspace);
        if (partial != nullptr) partial += partial_place<W>(g, pair, rank);
        // The sums of a part, and beside them those of products with ones.
        const auto sum_up = [&](auto& d, float (&beside)[4], const auto& product) {
            int held = -1;
            for (std::int64_t block = range.first; block < range.last; ++block) {
                ring.wait();
                wgmma_hold(d);
                wgmma_hold(beside);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < kBlockRows / 16; ++step)
                    product(d, beside, ring.here() + 256 * step, block > range.first || step > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (held >= 0) ring.release(held);
                held = ring.stage;
                ring.next();
            }
            wgmma_wait<0>();
            wgmma_hold(d);
            wgmma_hold(beside);
            ring.release(held);
        };
        const auto finish = [&](const auto& d) {
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(d) / 8); ++i) {
                if (partial != nullptr)
                    store_pack(partial + (i * 256 + t) * 2, Pack<float, 2>{{d[2 * i], d[2 * i + 1]}});
                else
                    give_sums<W>(p.in.plan, group, tile, t, i, d[2 * i], d[2 * i + 1], add);
            }
        };
        const auto finish_bias = [&](int i, float value) {
            if (partial != nullptr)
                partial[Tile::kSums * 256 + i] = value;
            else
                give_bias(p.in.plan, group, tile * Tile::kRows, i, value, add);
        };
        float beside[4] = {};
        const int row = of_group / kWarpSize * 16 + of_group % kWarpSize / 4;
        if (group.is_main) {
            float d[Tile::kSums] = {};
            sum_up(d, beside,
                   [&](auto& sums, float (&of_ones)[4], const unsigned char* stage, bool accumulate) {
                       const std::uint64_t a = operand_descriptor(stage + my_rows, 128, kOctet);
                       const std::uint64_t b = operand_descriptor(stage + my_columns, 128, kOctet);
                       wgmma_shared<T, Tile::kColumns, Major::mn, Major::mn>(sums, a, b, accumulate);
                       wgmma_shared<T, 8, Major::mn, Major::mn>(
                           of_ones, a, operand_descriptor(ones, 128, 256), accumulate);
                   });
            finish(d);
            if (of_group % 4 == 0 && !(Tile::kSplitsColumns && warpgroup == 1))
                for (int half = 0; half < 2; ++half)
                    finish_bias((Tile::kSplitsColumns ? 0 : 64 * warpgroup) + row + 8 * half,
                                beside[2 * half]);
        } else {
            float d[4] = {};
            sum_up(d, beside,
                   [&](auto& sums, float (&of_ones)[4], const unsigned char* stage, bool accumulate) {
                       const std::uint64_t a = operand_descriptor(stage + my_rows, 128, kOctet);
                       const std::uint64_t b = operand_descriptor(stage + Tile::kRowBytes, 128, kOctet);
                       wgmma_shared<T, 8, Major::mn, Major::mn>(sums, a, b, accumulate);
                       wgmma_shared<T, 8, Major::mn, Major::mn>(of_ones, operand_descriptor(ones, 128, 256),
                                                                b, accumulate);
                   });
            finish(d);
            if (t < 4 && tile == 0)
                for (int i = 0; i < 2; ++i) finish_bias(2 * t + i, beside[i]);
        }
    }
}

// The sum of the parts of each gradient, in their order: thread i of a tile's, two sums or (behind them) one
// bias.
template <int W, typename T>
__global__ void __launch_bounds__(256) mlp_reduce_kernel(const __grid_constant__ WgradParameters<T> p) {
    using Tile = WgradTile<W>;
    constexpr int kPairs = Tile::kSums * 128;  // of sums
    const int g = static_cast<int>(blockIdx.y) / 2, tile = static_cast<int>(blockIdx.y) % 2;
    const WgradGroup& group = p.groups.group[g];
    const int i = static_cast<int>(blockIdx.x) * 256 + thread_rank();
    // Of the heads a thread has but two pairs of sums.
    const bool has_sums = i < (group.is_main ? kPairs : 2 * 256), has_bias = i >= kPairs && i < kPairs + 128;
    if (tile >= group.tiles || !(has_sums || has_bias)) return;
    if (has_bias && !group.is_main && (tile > 0 || i - kPairs >= kChannelColumns)) return;
    const std::int64_t blocks = stash_blocks(p.in.samples);
    const float* workspace = static_cast<const float*>(p.in.workspace);
    float first = 0, second = 0;
    const int from = static_cast<int>(p.pairs * group.first_unit / (p.groups.units > 0 ? p.groups.units : 1));
    for (int pair = from > 0 ? from - 1 : 0; pair < p.pairs; ++pair) {
        if (p.groups.units * pair / p.pairs >= group.first_unit + group.cost * blocks) break;
        for (int rank = group.tiles > 1 ? tile : 0; rank < (group.tiles > 1 ? tile + 1 : 2); ++rank) {
            const WgradRange range = wgrad_range(p.groups, g, pair, p.pairs, rank, blocks);
            if (range.first >= range.last) continue;
            const float* partial = workspace + partial_place<W>(g, pair, rank);
            if (has_sums) {
                const Pack<float, 2> sums = load_pack<2>(partial + 2 * i);
                first += sums.value[0];
                second += sums.value[1];
            } else {
                first += load_pack<1>(partial + 2 * kPairs + (i - kPairs)).value[0];
            }
        }
    }
    const auto store = [&](int at, float value) { p.in.gradients[at] = value; };
    if (has_sums)
        give_sums<W>(p.in.plan, group, tile, i % 256, i / 256, first, second, store);
    else
        give_bias(p.in.plan, group, tile * Tile::kRows, i - kPairs, first, store);
}

// A warp sums the deltas of view 0 over the samples of one ray, 8 columns at a time.
template <typename T>
__global__ void __launch_bounds__(128)
    mlp_ray_sum_kernel(const T* deltas, std::int64_t samples, std::int64_t samples_per_ray, int before,
                       int columns, float* sums) {
    const std::int64_t blocks = stash_blocks(samples), octets = columns / 8;
    const std::int64_t mine = std::int64_t{blockIdx.x} * 4 + warp_index();
    const std::int64_t ray = mine / octets;
    const int octet = static_cast<int>(mine % octets);
    if (ray >= samples / samples_per_ray) return;
    float sum[8] = {};
    for (std::int64_t s = ray * samples_per_ray + lane_index(); s < (ray + 1) * samples_per_ray;
         s += kWarpSize) {
        const T* from = deltas + stash_block(blocks, before, columns, s / kBlockRows) +
                        stash_place(static_cast<int>(s % kBlockRows), 8 * octet);
        const Floats<8> values = pack_to_float(load_pack<8>(from));
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += values.value[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = warp_sum(sum[j]);
    if (lane_index() < 8) {
        float value = sum[0];
#pragma unroll
        for (int j = 1; j < 8; ++j)
            if (lane_index() == j) value = sum[j];
        sums[ray * columns + 8 * octet + lane_index()] = value;
    }
}

// ---- launches -----------------------------------------------------------------------------------

inline std::int64_t wgrad_workspace(const MlpPlan& plan, std::int64_t samples) {
    const auto of = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        return 4 * partial_place<kWidth>(make_groups<kWidth>(plan, samples).count, kMostPairs, 0);
    };
    if (plan.shape.width == 64) return of(std::integral_constant<int, 64>{});
    if (plan.shape.width == 128) return of(std::integral_constant<int, 128>{});
    return of(std::integral_constant<int, 256>{});
}

inline MlpSizes sizes_with_workspace(const MlpPlan& plan, std::int64_t samples) {
    MlpSizes sizes = sizes_of(plan, samples);
    sizes.workspace = wgrad_workspace(plan, samples);
    return sizes;
}

template <int W, typename T>
void launch_mlp_wgrad(const MlpWgradArguments<T>& arguments, Stream stream) {
    using Tile = WgradTile<W>;
    const MlpPlan& plan = arguments.plan;
    WgradParameters<T> parameters{arguments, make_groups<W>(plan, arguments.samples), 0};
    const WgradGroups& groups = parameters.groups;
    // A part of less than some 16 blocks of samples costs more than it saves.
    const std::int64_t useful = ceil_div(groups.units, std::int64_t{64}), most = multiprocessors() / 2;
    parameters.pairs = static_cast<int>(useful < most ? useful : most);
    if (parameters.pairs > kMostPairs) parameters.pairs = kMostPairs;
    if (parameters.pairs < 1) parameters.pairs = 1;
    if (arguments.workspace == nullptr)
        MIPNERF_LAUNCH((mlp_clear_kernel<float>),
                       grid_size(ceil_div(std::int64_t{plan.gradients}, std::int64_t{256})), dim3(256), 0,
                       stream, arguments.gradients, plan.gradients);
    MIPNERF_LAUNCH_CLUSTERS((mlp_wgrad_kernel<W, T>), 1, dim3(static_cast<unsigned>(2 * parameters.pairs)),
                            dim3(kThreads), Tile::kSharedBytes, stream, parameters);
    if (arguments.workspace != nullptr)
        MIPNERF_LAUNCH((mlp_reduce_kernel<W, T>),
                       dim3((Tile::kSums * 128 + 128 + 255) / 256, static_cast<unsigned>(2 * groups.count)),
                       dim3(256), 0, stream, parameters);
    if (arguments.ray_sums != nullptr) {
        const MlpLayer& view = plan.layer[density_layer(plan.shape) + 1];
        const std::int64_t warps = arguments.samples / arguments.samples_per_ray * (view.outputs / 8);
        MIPNERF_LAUNCH((mlp_ray_sum_kernel<T>), grid_size(ceil_div(warps, std::int64_t{4})), dim3(128), 0,
                       stream, static_cast<const T*>(arguments.deltas), arguments.samples,
                       arguments.samples_per_ray, kChannelColumns + view.stash_column, view.outputs,
                       arguments.ray_sums);
    }
}

}  // namespace mlp_hopper
}  // namespace mipnerf
