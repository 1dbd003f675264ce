// The first half of the fused network's backward on compute capability 9.0a: deltas, by the same chain as the
// forward (mlp_hopper_chain.cuh). mlp_hopper_wgrad_kernels.cuh has the other.
#pragma once

#include "mlp_hopper_chain.cuh"
#include "mlp_launch.h"

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
        MIPNERF_LAUNCH((mlp_clear_kernel<float>), grid_size(ceil_div(count, std::int64_t{256})), dim3(256), 0,
                       stream, arguments.grad_features, count);
    }
    MIPNERF_LAUNCH_CLUSTERS((mlp_dgrad_kernel<W, T>), kCluster, grid_size(grid.blocks), dim3(kThreads),
                            dgrad_layout<W>(parameters.stages).bytes(), stream, parameters);
}

}  // namespace mlp_hopper
}  // namespace mipnerf
