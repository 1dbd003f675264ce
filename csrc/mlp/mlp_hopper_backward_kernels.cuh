// The backward of the fused network on compute capability 9.0a: deltas by the same chain as the forward
// (mlp_hopper_kernels.cuh), then the gradients of the weights as products over the samples.
//
// What the emulation cannot show is said there.
#pragma once

#include "mlp_hopper_kernels.cuh"

namespace mipnerf {
namespace mlp_hopper {

// ---- deltas -------------------------------------------------------------------------------------

template <typename T>
struct DgradParameters {
    MlpDgradArguments<T> in;
    PassList<kMostBackward> passes;
    int stages;
    int rounds;  // tiles of each block
};

template <int W>
MIPNERF_HOST_DEVICE SharedLayout dgrad_layout(int stages) {
    return {0, W * kChunkK * 2, stages, 0};
}

// The gradients of the channels of this thread's two rows as operand A of 16 k: red, green, blue, density,
// zeros.
template <typename T>
MIPNERF_DEVICE void load_channels(const MlpDgradArguments<T>& in, std::int64_t sample, int column,
                                  unsigned (&lead)[4]) {
    lead[2] = lead[3] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const std::int64_t mine = sample + 8 * half;
        float first = 0, second = 0;
        if (mine < in.samples && column <= 2) {
            if (in.grad_rgb != nullptr) first = load_pack<1>(in.grad_rgb + 3 * mine + column).value[0];
            if (column == 0 && in.grad_rgb != nullptr)
                second = load_pack<1>(in.grad_rgb + 3 * mine + 1).value[0];
            if (column == 2 && in.grad_density != nullptr)
                second = load_pack<1>(in.grad_density + mine).value[0];
        }
        lead[half] = mipnerf::detail::pair_bits(first, second, T{});
    }
}

// Deltas of a hidden layer: the sums where its mask is set, packed into operand A of the next product.
template <typename T, int W>
MIPNERF_DEVICE void mask_deltas(const float (&d)[W / 2], const Pack<unsigned, W / 64>& mask,
                                unsigned (&a)[W / 4]) {
#pragma unroll
    for (int i = 0; i < W / 4; ++i) {
        const unsigned word = mask.value[i / 16] << (i % 8);
        const unsigned keep = i % 16 < 8 ? spread_signs<0>(word) : spread_signs<1>(word);
        a[i] = mipnerf::detail::pair_bits(d[2 * i], d[2 * i + 1], T{}) & keep;
    }
}

// Adds to the gradients of W features from `first` on, in this thread's two rows. Nobody else adds there, so
// the order of additions is the program's; they are atomic because loads would need registers that there are
// none of.
template <typename T, int W>
MIPNERF_DEVICE void add_feature_gradients(const MlpDgradArguments<T>& in, int first, std::int64_t sample,
                                          int column, const float (&d)[W / 2]) {
    const int features = in.plan.shape.features, left = features - first - column;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (sample + 8 * half >= in.samples) continue;
        float* row = in.grad_features + (sample + 8 * half) * features + first + column;
#pragma unroll
        for (int j = 0; j < W / 8; ++j) {
            if (8 * j >= left) break;
            atomic_add(row + 8 * j, d[4 * j + 2 * half]);
            atomic_add(row + 8 * j + 1, d[4 * j + 2 * half + 1]);
        }
    }
}

// Thread i clears number i.
static __global__ void __launch_bounds__(256) mlp_clear_kernel(float* gradients, std::int64_t count) {
    const std::int64_t i = std::int64_t{blockIdx.x} * 256 + thread_rank();
    if (i < count) gradients[i] = 0;
}

// Threads as in the forward, but nobody loads features. Written: deltas of every block of 64 rows that has a
// sample, zero in its other rows; the features' gradients of the samples where they are wanted.
template <int W, typename T>
__global__ void MIPNERF_CLUSTER(kCluster) __launch_bounds__(kThreads, 1)
    mlp_dgrad_kernel(const __grid_constant__ DgradParameters<T> p) {
    const MlpPlan& plan = p.in.plan;
    const SharedLayout layout = dgrad_layout<W>(p.stages);
    WeightRing ring(shared_memory<Barrier>(), shared_memory<unsigned char>(layout.stage()),
                    layout.stage_bytes, p.stages);
    const std::int64_t blocks = stash_blocks(p.in.samples);
    if (thread_rank() == 0) {
        ring.init();
        barrier_init_fence();
    }
    cluster_sync();

    constexpr Registers kRegisters = W == 256 ? kForWidest : kForNarrower;
    const int warpgroup = thread_rank() / kWarpgroup, t = thread_rank() % kWarpgroup;
    const bool wants_features = p.in.grad_features != nullptr;
    if (warpgroup == 2) {
        lower_registers<kRegisters.fetching>();
        if (t == 0) {
            for (int round = 0; round < p.rounds; ++round)
                for (int i = 0; i < p.passes.count; ++i)
                    if (wants_features || !p.passes.pass[i].for_features())
                        fetch_pass(ring, p.passes.pass[i], p.in.packed);
        }
    } else {
        raise_registers<kRegisters.multiplying>();
        const Fragment mine;
        using All = std::integral_constant<int, W / 64>;
        using Half = std::integral_constant<int, (W / 2 + 63) / 64>;
        unsigned a[W / 4];
#pragma unroll
        for (int i = 0; i < W / 4; ++i) a[i] = 0;
        for (int round = 0; round < p.rounds; ++round) {
            const std::int64_t block = 2 * (std::int64_t{round} * gridDim.x + blockIdx.x) + warpgroup;
            const std::int64_t sample = block * kBlockRows + mine.row;
            const bool keeps = block < blocks;
            int i = 0;
            const auto finish = [&](int hidden, const float (&d)[W / 2]) {
                const MlpLayer& layer = plan.layer[plan.hidden_layer[hidden]];
                Pack<unsigned, W / 64> mask{};
                if (keeps)
                    mask = load_pack<W / 64>(
                        mask_place<W>(static_cast<const unsigned*>(p.in.masks), plan, block, hidden));
                mask_deltas<T, W>(d, mask, a);
                if (keeps)
                    store_fragments(
                        static_cast<T*>(p.in.deltas) +
                            stash_block(blocks, kChannelColumns + layer.stash_column, layer.outputs, block),
                        a, layer.outputs);
            };
            const auto multiply_by = [&](float (&d)[W / 2], auto fragments, auto has_lead) {
                unsigned lead[4] = {};
                if (decltype(has_lead)::value) load_channels(p.in, sample, mine.column, lead);
                multiply<T, W, decltype(fragments)::value, decltype(has_lead)::value, false>(
                    d, ring, lead, a, nullptr, 0, true);
            };
            // From the heads: as many fragments as view 0 has outputs.
            const auto multiply_heads = [&](float (&d)[W / 2], int fragments) {
                if (fragments == 0)
                    multiply_by(d, std::integral_constant<int, 0>{}, std::true_type{});
                else if (fragments < All::value)
                    multiply_by(d, Half{}, std::true_type{});
                else
                    multiply_by(d, All{}, std::true_type{});
            };
            // The passes for the features' gradient that come next, if any.
            const auto feature_gradients = [&](const auto& product) {
                for (; i < p.passes.count && p.passes.pass[i].for_features(); ++i) {
                    if (!wants_features) continue;
                    float d[W / 2] = {};
                    product(d, p.passes.pass[i].fragments);
                    add_feature_gradients<T, W>(p.in, p.passes.pass[i].first_feature, sample, mine.column, d);
                }
            };

            if (keeps) {
                unsigned channels[4];
                load_channels(p.in, sample, mine.column, channels);
                store_fragments(static_cast<T*>(p.in.deltas) + stash_block(blocks, 0, kChannelColumns, block),
                                channels, kChannelColumns);
            }
            int hidden = plan.hidden - 1;
            if (plan.shape.has_view) {
                {
                    float d[W / 2] = {};
                    multiply_by(d, std::integral_constant<int, 0>{}, std::true_type{});
                    ++i;
                    finish(hidden--, d);
                }
                while (hidden >= plan.shape.depth) {
                    float d[W / 2] = {};
                    multiply_by(d, All{}, std::false_type{});
                    ++i;
                    finish(hidden--, d);
                }
            }
            feature_gradients(multiply_heads);
            {
                float d[W / 2] = {};
                multiply_heads(d, p.passes.pass[i++].fragments);
                finish(hidden--, d);
            }
            const auto multiply_trunk = [&](float (&d)[W / 2], int) {
                multiply_by(d, All{}, std::false_type{});
            };
            while (hidden >= 0) {
                feature_gradients(multiply_trunk);
                float d[W / 2] = {};
                multiply_trunk(d, 0);
                ++i;
                finish(hidden--, d);
            }
            feature_gradients(multiply_trunk);
        }
    }
    cluster_sync();  // nobody leaves while its neighbour may still send to it
}

// ---- gradients of the weights -------------------------------------------------------------------

// Every gradient is a sum over the samples of products of two matrices of the stash, rows of the one times
// columns of the other. A group is such a product, its result cut into one or two tiles of rows.
//     main    rows: a layer's outputs (its deltas); columns: W of what it reads; beside them the biases, as
//     products
//             with ones
//     heads   rows: what a head reads; columns: the channels (their deltas); beside them the sums of the
//     channels
struct WgradGroup {
    bool is_main;
    bool rows_from_deltas, columns_from_deltas;
    std::int16_t rows_before, rows;  // columns of the stash before the matrix, and its own: the result's rows
    std::int16_t columns_before, columns;  // the same of the other one
    std::int16_t first_column;             // of that one's: the result's columns
    std::int16_t tiles;                    // of rows
    std::int16_t layer;
    std::int16_t
        weight_column;   // of the layer's weight, that the result's first row (heads) or column (main) is
    std::int16_t valid;  // of those, how many it has
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

template <int W, typename T>
void launch_mlp_dgrad(const MlpDgradArguments<T>& arguments, Stream stream) {
    const Passes passes = make_passes(arguments.plan);
    DgradParameters<T> parameters{arguments, passes.backward, kMostStages, 0};
    while (dgrad_layout<W>(parameters.stages).bytes() > kMostSharedBytes) --parameters.stages;
    const PersistentGrid grid(ceil_div(arguments.samples, std::int64_t{kTileRows}));
    parameters.rounds = grid.rounds;
    if (arguments.grad_features != nullptr) {
        const std::int64_t count = arguments.samples * arguments.plan.shape.features;
        MIPNERF_LAUNCH(mlp_clear_kernel, grid_size(ceil_div(count, std::int64_t{256})), dim3(256), 0, stream,
                       arguments.grad_features, count);
    }
    MIPNERF_LAUNCH_CLUSTERS((mlp_dgrad_kernel<W, T>), kCluster, grid_size(grid.blocks), dim3(kThreads),
                            dgrad_layout<W>(parameters.stages).bytes(), stream, parameters);
}

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
        MIPNERF_LAUNCH(mlp_clear_kernel, grid_size(ceil_div(std::int64_t{plan.gradients}, std::int64_t{256})),
                       dim3(256), 0, stream, arguments.gradients, plan.gradients);
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
