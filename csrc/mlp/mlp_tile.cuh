// What the forward and the dgrad kernel share: a tile of 128 samples in shared memory, the weights that
// stream past it, and their product in registers.
//
// A block is 8 warps and one tile. The tile holds the operand of the current pass, [128, 128 or W] of T, and
// its result takes its place when every warp has read it: activations never leave the multiprocessor. 16-byte
// pieces of row r stand at their place xor r % 8, so that neither 8 rows of a column nor the fragments of a
// result meet in a bank. The result of a pass is [128, W] floats in the registers of the block; a warp has 16
// (W / 64) rows and every (W / 64)th block of 16 columns of them, so that a narrower layer still occupies
// every warp.
//
// Weights come through a ring of 8 KB stages, asynchronously and always ahead: across passes, and across the
// tiles that a block takes one after the other.
#pragma once

#include "../common/tensor_core.cuh"
#include "mlp_schedule.h"

namespace mipnerf {
namespace mlp_mma {

constexpr int kStageBytes = 8192;

template <int W>
struct Geometry {
    static_assert(W == 64 || W == 128 || W == 256, "widths are 64, 128 and 256");
    static constexpr int kPitch = W < kMlpMaxFeatures ? kMlpMaxFeatures : W;
    static constexpr int kTileBytes = kTileRows * kPitch * 2;
    static constexpr int kWarpsAcross = W / 64;
    static constexpr int kRowBlocks = W / 64;  // blocks of 16 rows of a warp
    static constexpr int kPairs = 4;           // blocks of 16 columns of a warp
    static constexpr int kStageSteps = kStageBytes / (32 * W);
    static constexpr int kStages = W == 256 ? 4 : 2;
    static constexpr int kBlocksTogether = W == 256 ? 1 : 2;  // on a multiprocessor
    static constexpr std::size_t kSharedBytes = kTileBytes + kStages * kStageBytes;
};

template <int W, typename T>
MIPNERF_DEVICE T* tile_at(T* tile, int row, int column) {
    return tile + row * Geometry<W>::kPitch + (((column >> 3) ^ (row & 7)) << 3) + (column & 7);
}

// This thread's part of a fragment (tensor_core.cuh): row g, columns 2q and 2q + 1.
struct Lane {
    int lane = lane_index();
    int g = lane / 4;
    int q = lane % 4;
};

// ---- the weights

// A group of copies for each stage: next() waits for the oldest, then starts the one that takes the place of
// the stage used last.
template <int W>
class WeightStream {
    using G = Geometry<W>;

  public:
    MIPNERF_DEVICE WeightStream(const MlpPasses& passes, const unsigned char* packed, int tiles)
        : passes_(passes), packed_(packed), tiles_(tiles) {
        advance();
#pragma unroll
        for (int stage = 0; stage < G::kStages - 1; ++stage) issue(stage);
    }

    // The next kStageSteps steps of the weights, or as many as the source has left. Every thread of the block
    // takes part; what was written to shared memory before is seen by all afterwards.
    MIPNERF_DEVICE const unsigned char* next() {
        async_wait<G::kStages - 2>();
        block_sync();  // the stage is there for every warp, and the one used last is free
        issue(reading_ == 0 ? G::kStages - 1 : reading_ - 1);
        const unsigned char* stage = stages() + reading_ * kStageBytes;
        reading_ = reading_ + 1 == G::kStages ? 0 : reading_ + 1;
        return stage;
    }

  private:
    static MIPNERF_DEVICE unsigned char* stages() { return shared_memory<unsigned char>(G::kTileBytes); }

    MIPNERF_DEVICE void issue(int stage) {
        if (tiles_ > 0) {
            const int steps = left_ < G::kStageSteps ? left_ : G::kStageSteps;
            const int bytes = steps * step_bytes_;
            unsigned char* to = stages() + stage * kStageBytes;
#pragma unroll
            for (int round = 0; round < kStageBytes / (16 * kThreads); ++round) {
                const int i = 16 * (round * kThreads + thread_rank());
                if (i < bytes) async_copy16(to + i, from_ + i);
            }
            from_ += bytes;
            left_ -= steps;
            if (left_ == 0) advance();
        }
        async_commit();
    }

    // To the next source that has steps, of this pass, the next, or the first of the next tile.
    MIPNERF_DEVICE void advance() {
        do {
            if (++source_ == kSources) {
                source_ = 0;
                if (++pass_ == passes_.count) {
                    pass_ = 0;
                    if (--tiles_ == 0) return;
                }
            }
            const MlpPass& pass = passes_.pass[pass_];
            if (source_ == 0) {
                from_ = packed_ + 16ll * pass.weights;
                step_bytes_ = 32 * pass.columns;
            }
            left_ = pass.columns == 0 ? 0 : pass.steps[source_];
        } while (left_ == 0);
    }

    const MlpPasses& passes_;
    const unsigned char* packed_;
    const unsigned char* from_ = nullptr;
    int tiles_;  // whose weights are still to be asked for
    int pass_ = -1;
    int source_ = kSources - 1;
    int left_ = 0;  // steps of the source
    int step_bytes_ = 0;
    int reading_ = 0;
};

// ---- the product

template <int W>
struct Result {
    using G = Geometry<W>;
    float value[G::kRowBlocks][2 * G::kPairs][4];
};

template <int W>
struct Operand {
    unsigned value[Geometry<W>::kRowBlocks][4];
};

// Which part of the result is this warp's.
template <int W>
struct WarpPart {
    int row = warp_index() / Geometry<W>::kWarpsAcross * 16 * Geometry<W>::kRowBlocks;
    int block = warp_index() % Geometry<W>::kWarpsAcross;

    MIPNERF_DEVICE int block_of(int pair) const { return pair * Geometry<W>::kWarpsAcross + block; }
};

// 16 columns of 16 rows, as a product takes them.
template <int W, typename T>
MIPNERF_DEVICE void load_fragment(unsigned (&a)[4], T* tile, int row, int step) {
    const int lane = lane_index();
    ldmatrix_x4(a, tile_at<W>(tile, row + lane % 16, 16 * step + lane / 16 * 8));
}

template <int W, typename T>
MIPNERF_DEVICE void load_operand(Operand<W>& operand, T* tile, const WarpPart<W>& part, int step) {
#pragma unroll
    for (int r = 0; r < Geometry<W>::kRowBlocks; ++r)
        load_fragment<W>(operand.value[r], tile, part.row + 16 * r, step);
}

template <int W, typename T>
MIPNERF_DEVICE void multiply_pair(Result<W>& result, const Operand<W>& operand, const Pack<unsigned, 4>& b,
                                  int pair) {
#pragma unroll
    for (int r = 0; r < Geometry<W>::kRowBlocks; ++r) {
        mma_m16n8k16<T>(result.value[r][2 * pair], operand.value[r], b.value[0], b.value[1]);
        mma_m16n8k16<T>(result.value[r][2 * pair + 1], operand.value[r], b.value[2], b.value[3]);
    }
}

// One step of the contraction; `weights`: the step's blocks, columns / 16 of them.
template <int W, typename T>
MIPNERF_DEVICE void multiply(Result<W>& result, const Operand<W>& operand, const unsigned char* weights,
                             const WarpPart<W>& part, int columns) {
    using G = Geometry<W>;
    const auto* mine =
        reinterpret_cast<const unsigned*>(weights) + 4 * (part.block * kUnitsPerBlock + lane_index());
    constexpr int kToNext = 4 * G::kWarpsAcross * kUnitsPerBlock;
    if (columns == W) {  // the usual case: all loads before the first product waits for one
        Pack<unsigned, 4> b[G::kPairs];
#pragma unroll
        for (int pair = 0; pair < G::kPairs; ++pair) b[pair] = load_pack_shared<4>(mine + pair * kToNext);
#pragma unroll
        for (int pair = 0; pair < G::kPairs; ++pair) multiply_pair<W, T>(result, operand, b[pair], pair);
    } else {
#pragma unroll
        for (int pair = 0; pair < G::kPairs; ++pair) {
            if (16 * part.block_of(pair) >= columns) break;
            multiply_pair<W, T>(result, operand, load_pack_shared<4>(mine + pair * kToNext), pair);
        }
    }
}

// The tile's first 16 steps columns times the weights that come next. The tile must be complete for every
// warp.
template <int W, typename T>
MIPNERF_DEVICE void multiply_tile(Result<W>& result, WeightStream<W>& stream, T* tile,
                                  const WarpPart<W>& part, int steps, int columns) {
    constexpr int kStageSteps = Geometry<W>::kStageSteps;
    for (int first = 0; first < steps; first += kStageSteps) {
        Operand<W> operand;
        load_operand(operand, tile, part, first);  // while the weights are waited for
        const unsigned char* weights = stream.next();
#pragma unroll
        for (int s = 0; s < kStageSteps; ++s) {
            if (first + s >= steps) break;
            if (s > 0) load_operand(operand, tile, part, first + s);
            multiply<W, T>(result, operand, weights + s * 32 * columns, part, columns);
        }
    }
}

// Calls f(row block, product, row, column, value) for every two pairs of neighbouring columns that this
// thread has of the first `columns`: value[0], value[1] of `row`, value[2], value[3] of row + 8.
template <int W, typename F>
MIPNERF_DEVICE void for_each_part(Result<W>& result, const WarpPart<W>& part, int columns, const F& f) {
    const Lane lane;
#pragma unroll
    for (int pair = 0; pair < Geometry<W>::kPairs; ++pair) {
        if (16 * part.block_of(pair) >= columns) break;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int r = 0; r < Geometry<W>::kRowBlocks; ++r)
                f(r, 2 * pair + half, part.row + 16 * r + lane.g,
                  16 * part.block_of(pair) + 8 * half + 2 * lane.q, result.value[r][2 * pair + half]);
    }
}

// ---- the tile and global memory

// Two neighbours of one row, rounded.
template <int W, typename T>
MIPNERF_DEVICE void store_to_tile(T* tile, int row, int column, float low, float high) {
    store_pack_shared(tile_at<W>(tile, row, column), pack_from_float<T>(Floats<2>{{low, high}}));
}

// The first rows of the tile to a matrix of this many columns (a multiple of 8).
template <int W, typename T>
MIPNERF_DEVICE void store_tile(T* tile, T* matrix, int rows, int columns) {
    const int pieces = columns / 8;
    int row = thread_rank() / pieces, piece = thread_rank() % pieces;
    const int rows_on = kThreads / pieces, pieces_on = kThreads % pieces;
    while (row < rows) {
        store_pack_streaming(matrix + static_cast<std::int64_t>(row) * columns + 8 * piece,
                             load_pack_shared<8>(tile_at<W>(tile, row, 8 * piece)));
        row += rows_on;
        piece += pieces_on;
        if (piece >= pieces) {
            piece -= pieces;
            ++row;
        }
    }
}

// A tile's place among the samples.
struct TileRows {
    std::int64_t first;
    int count;

    MIPNERF_DEVICE TileRows(std::int64_t first_, std::int64_t end) : first(first_) {
        count = end - first < kTileRows ? static_cast<int>(end - first) : kTileRows;
    }
    MIPNERF_DEVICE TileRows(int tile, std::int64_t samples)
        : TileRows(static_cast<std::int64_t>(tile) * kTileRows, samples) {}
};

// A tile of a group (mlp_plan.h).
MIPNERF_DEVICE TileRows rows_of_group(const MlpTiling& tiling, int group, int tile) {
    const std::int64_t first = group * tiling.group_samples, end = first + tiling.group_samples;
    return {first + tile * kTileRows, end < tiling.samples ? end : tiling.samples};
}

MIPNERF_HOST_DEVICE int tile_count(std::int64_t samples) {
    return static_cast<int>((samples + kTileRows - 1) / kTileRows);
}

// Tiles blockIdx.x, blockIdx.x + gridDim.x, ... are this block's.
MIPNERF_DEVICE int tiles_of_block(int tiles) {
    return (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) /
           static_cast<int>(gridDim.x);
}

// Blocks that run at once take the tiles (or groups of tiles) in turn.
template <typename... P>
dim3 persistent_grid(void (*kernel)(P...), std::int64_t tiles, std::size_t shared_bytes) {
    if (tiles > std::int64_t{1} << 30)
        throw std::runtime_error("mlp: " + std::to_string(tiles) +
                                 " tiles of 128 samples in one launch are too many");
    if (tiles == 0) return dim3(0);
    const int resident = resident_blocks(kernel, kThreads, shared_bytes);
    return grid_size(tiles < resident ? tiles : resident);
}

}  // namespace mlp_mma
}  // namespace mipnerf
