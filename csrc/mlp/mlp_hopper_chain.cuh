// What forward and dgrad of compute capability 9.0a share: a chain of warpgroup products whose activations
// (deltas) stay in registers from layer to layer. mlp_hopper_plan.h says what lies where.
//
// A block is 128 rows: two warpgroups that multiply, 64 rows each, and one that fetches. What a warpgroup
// holds of d after a product is, packed in pairs, operand A of the next (hopper.cuh). Weights are fetched
// once for the two blocks of a cluster: each loads half of every chunk and sends it to both, through a ring
// of stages.
//
// The emulation shows numbers, layouts, and the order of everything that goes through barriers. It cannot
// show that the silicon reads unswizzled operands as documented, bank conflicts, whether two warpgroups hide
// each other's epilogues, nor speed: none of this has run on a GPU yet.
#pragma once

#include "../common/hopper.cuh"
#include "../common/tensor_core.cuh"
#include "mlp_hopper_plan.h"

namespace mipnerf {
namespace mlp_hopper {

using namespace hopper;

constexpr int kCluster = 2;
constexpr int kTileRows = 2 * kBlockRows;
constexpr int kThreads = 3 * kWarpgroup;
// How many registers threads have that multiply, and those that fetch: 2 a + b = 3 * 168, what a launch gives
// 384.
struct Registers {
    int multiplying, fetching;
};
constexpr Registers kForWidest{232, 40}, kForEncoding{224, 56}, kForNarrower{208, 88};
constexpr int kMostStages = 8;
constexpr std::size_t kMostSharedBytes = 227 * 1024;

// Shared memory: barriers; the features' tile, one half for each multiplying warpgroup; stages; biases; with
// compositing the colours of a tile.
struct SharedLayout {
    static constexpr unsigned kBarrierBytes = 256;
    unsigned tile_bytes;  // of one warpgroup
    unsigned stage_bytes;
    int stages;
    unsigned bias_bytes;
    unsigned colour_bytes = 0;

    MIPNERF_HOST_DEVICE unsigned tile(int warpgroup) const {
        return kBarrierBytes + static_cast<unsigned>(warpgroup) * tile_bytes;
    }
    MIPNERF_HOST_DEVICE unsigned stage() const { return tile(2); }
    MIPNERF_HOST_DEVICE unsigned bias() const {
        return stage() + static_cast<unsigned>(stages) * stage_bytes;
    }
    MIPNERF_HOST_DEVICE unsigned colour() const { return bias() + bias_bytes; }
    MIPNERF_HOST_DEVICE std::size_t bytes() const { return std::size_t{colour()} + colour_bytes; }
};

// ---- the ring of weights ------------------------------------------------------------------------

// Stages in shared memory and, of each, a barrier for "has come" and one for "may be replaced". Blocks is the
// size of the cluster that fetches together.
template <int Blocks>
struct Ring {
    Barrier* full;
    Barrier* empty;
    unsigned char* stages;
    unsigned stage_bytes;
    int count;
    int stage = 0;
    unsigned parity = 0;

    MIPNERF_DEVICE Ring(Barrier* barriers, unsigned char* first, unsigned bytes, int stages_)
        : full(barriers), empty(barriers + kMostStages), stages(first), stage_bytes(bytes), count(stages_) {}

    // By one thread, before anything else. A stage is free when both warpgroups of every block have let it
    // go.
    MIPNERF_DEVICE void init() const {
        for (int i = 0; i < count; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 2 * Blocks);
        }
    }
    MIPNERF_DEVICE void next() {
        if (++stage == count) {
            stage = 0;
            parity ^= 1u;
        }
    }
    MIPNERF_DEVICE unsigned char* here() const { return stages + static_cast<unsigned>(stage) * stage_bytes; }

    // The fetching thread: waits for a free stage and announces what will come to it.
    MIPNERF_DEVICE void begin(unsigned bytes) const {
        barrier_wait(empty + stage, parity ^ 1u);
        barrier_arrive_expect(full + stage, bytes);
    }
    // This block's part of a chunk, to every block.
    MIPNERF_DEVICE void fetch(const unsigned char* chunk, unsigned bytes) {
        begin(bytes);
        const unsigned part = bytes / Blocks, mine = static_cast<unsigned>(cluster_rank()) * part;
        copy_bulk_multicast(here() + mine, chunk + mine, part, full + stage, (1u << Blocks) - 1);
        next();
    }

    MIPNERF_DEVICE void wait() const { barrier_wait(full + stage, parity); }
    // A multiplying warpgroup lets a stage go, in every block: its thread 32 r tells block r.
    MIPNERF_DEVICE void release(int of_stage) const {
        const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
        if constexpr (Blocks == 1) {
            if (t == 0) barrier_arrive(empty + of_stage);
        } else {
            if (t % kWarpSize == 0 && t / kWarpSize < Blocks)
                barrier_arrive_at(empty + of_stage, t / kWarpSize);
        }
    }
};
using WeightRing = Ring<kCluster>;

// Every chunk of a pass, by the fetching thread.
MIPNERF_DEVICE void fetch_pass(WeightRing& ring, const Pass& pass, const void* packed) {
    const unsigned char* chunk = static_cast<const unsigned char*>(packed) + std::size_t{2} * pass.offset;
    const auto fetch = [&](int k) {
        const unsigned bytes = static_cast<unsigned>(2 * k * pass.columns);
        ring.fetch(chunk, bytes);
        chunk += bytes;
    };
    if (pass.lead > 0) fetch(pass.lead);
    for (int i = 0; i < pass.fragments; ++i) fetch(kChunkK);
    for (int k = 0; k < pass.feature_k; k += kFeatureChunkK) fetch(kFeatureChunkK);
}

// A product of one warpgroup over the chunks of a pass: of a lead chunk where `lead` (A, 4 words) is given,
// of Fragments chunks with A in registers (a, 16 words each), of the features, whose rows lie in shared
// memory as a block of the stash does. One group of products stays under way while the next chunk is waited
// for; the stage before is let go as soon as its products are through. d holds what the sums start from, or
// with `from_zero` nothing.
//
// The shape of the code is the compiler's wish: it gives up the pipeline (warnings C7511 to C7520) where
// products under way meet a branch, or a loop other than that over whole chunks. So how many fragments there
// are is known at compile time, and k of the features is padded to whole chunks of 32.
template <typename T, int N, int Fragments, bool HasLead, bool HasFeatures, int Words>
MIPNERF_DEVICE void multiply(float (&d)[N / 2], WeightRing& ring, const unsigned (&lead)[4],
                             const unsigned (&a)[Words], const unsigned char* features, int feature_k,
                             bool from_zero) {
    static_assert(16 * Fragments <= Words, "more fragments than words");
    constexpr unsigned kOctet = N * 16;  // bytes of 8 k
    int held = -1;
    const auto begin = [&]() {
        ring.wait();
        wgmma_hold(d);
        wgmma_fence();
        return operand_descriptor(ring.here(), kOctet, 128);
    };
    const auto end = [&]() {
        wgmma_commit();
        wgmma_wait<1>();
        if (held >= 0) ring.release(held);
        held = ring.stage;
        ring.next();
    };
    if constexpr (HasLead) {
        const std::uint64_t b = begin();
        wgmma_registers<T, N>(d, lead, b, !from_zero);
        end();
    }
#pragma unroll
    for (int i = 0; i < Fragments; ++i) {
        const std::uint64_t b = begin();
#pragma unroll
        for (int step = 0; step < kChunkK / 16; ++step)
            wgmma_registers<T, N>(d, a + 16 * i + 4 * step,
                                  advance(b, static_cast<unsigned>(2 * step) * kOctet),
                                  HasLead || i + step > 0 || !from_zero);
        end();
    }
    if constexpr (HasFeatures) {
        std::uint64_t of_features = operand_descriptor(features, kBlockRows * 16, 128);
        for (int k = 0; k < feature_k; k += kFeatureChunkK) {
            const std::uint64_t b = begin();
#pragma unroll
            for (int step = 0; step < kFeatureChunkK / 16; ++step)
                wgmma_shared<T, N, Major::k, Major::k>(
                    d, advance(of_features, static_cast<unsigned>(step) * 2 * kBlockRows * 16),
                    advance(b, static_cast<unsigned>(2 * step) * kOctet), true);
            of_features = advance(of_features, kFeatureChunkK / 16 * 2 * kBlockRows * 16);
            end();
        }
    }
    wgmma_wait<0>();
    wgmma_hold(d);
    ring.release(held);
}

// ---- what a warpgroup holds ---------------------------------------------------------------------

struct Fragment {
    int row, column;  // thread t holds rows `row` and `row` + 8, columns `column` and the next of every octet

    MIPNERF_DEVICE Fragment() {
        const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
        row = t / kWarpSize * 16 + t % kWarpSize / 4;
        column = 2 * (t % 4);
    }
};

// Packs the sums of a hidden layer, after the ReLU, into operand A of the next product; zeros beyond them.
template <typename T, int Sums, int Words>
MIPNERF_DEVICE void activate(const float (&d)[Sums], unsigned (&a)[Words]) {
#pragma unroll
    for (int i = 0; i < Words; ++i)
        a[i] = 2 * i < Sums ? pair_relu<T>(d[2 * i % Sums], d[(2 * i + 1) % Sums]) : 0u;
}

// To a block of the stash: of octet j of columns a warp stores words 2 j and 2 j + 1, 128 bytes each.
template <int Words, typename T>
MIPNERF_DEVICE void store_fragments(T* block, const unsigned (&a)[Words], int columns) {
    const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
    unsigned* mine = reinterpret_cast<unsigned*>(block) + t / kWarpSize * 64 + t % kWarpSize;
#pragma unroll
    for (int j = 0; j < Words / 2; ++j) {
        if (8 * j >= columns) break;
        store_pack_streaming(mine + 256 * j, Pack<unsigned, 1>{{a[2 * j]}});
        store_pack_streaming(mine + 256 * j + 32, Pack<unsigned, 1>{{a[2 * j + 1]}});
    }
}

// Where the mask words of this thread are.
template <int W, typename Word>
MIPNERF_DEVICE Word* mask_place(Word* masks, const MlpPlan& plan, std::int64_t block, int hidden) {
    const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
    return masks + ((block * plan.hidden + hidden) * kWarpgroup + t) * (W / 64);
}

template <int W, int Sums>
MIPNERF_DEVICE void store_mask(unsigned* place, const float (&d)[Sums]) {
    Pack<unsigned, W / 64> words;
#pragma unroll
    for (int w = 0; w < W / 64; ++w) {
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (32 * w + i < Sums && passes_relu(d[(32 * w + i) % Sums])) bits |= 1u << mask_bit(i);
        words.value[w] = bits;
    }
    store_pack_streaming(place, words);
}

// ---- the grid ------------------------------------------------------------------------------------

// Blocks of a persistent grid over `tiles`, in whole clusters, and the tiles of each.
struct PersistentGrid {
    std::int64_t blocks;
    int rounds;

    explicit PersistentGrid(std::int64_t tiles) {
        const std::int64_t most = multiprocessors() / kCluster * kCluster;
        blocks = (tiles + kCluster - 1) / kCluster * kCluster;
        if (blocks > most) blocks = most;
        rounds = blocks == 0 ? 0 : static_cast<int>(ceil_div(tiles, blocks));
    }
};

// Thread i clears number i.
template <typename T>
__global__ void __launch_bounds__(256) mlp_clear_kernel(T* numbers, std::int64_t count) {
    const std::int64_t i = std::int64_t{blockIdx.x} * 256 + thread_rank();
    if (i < count) numbers[i] = 0;
}

}  // namespace mlp_hopper
}  // namespace mipnerf
