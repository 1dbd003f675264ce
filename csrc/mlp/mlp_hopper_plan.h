// How the wgmma kernels hold the network: the passes of their chains, the order of their packed weights and
// of what the forward keeps for the backward. For host and device, without CUDA headers.
//
// A pass is a product d[64 rows, columns] = a[64 rows, k] B[k, columns] whose B comes through shared memory
// in chunks, in the order in which the chain needs them: lead k (16 or none), then `fragments` times 64, then
// those of the features, 32 a chunk. Within a chunk: core matrices of 8 columns x 8 k (rows of 16 bytes),
// octets of columns first, then octets of k. What B has more of than the layer is zero.
//
// Passes of the forward; columns of B are outputs, k are inputs:
//     kForward, trunk l   W columns
//     kForwardHead        W/2 + 8 columns: the outputs of view 0 where they are W/2 at most; at W/2 the
//     density;
//                         after it, without a view branch, red, green, blue
//     kForward, view 0    W columns, where it has more outputs
//     kForward, view c    W columns
//     kForwardColour      8 columns; with a view branch
// Passes of the backward; columns of B are inputs, k are outputs. The lead k are the channels (red, green,
// blue, density):
//     kSeed               with a view branch: from the channels to what the colour layer reads
//     kBackward, view c   c from the last to 1
//     kBackwardHead       from the channels and from view 0 to what the heads read
//     kBackward, trunk l  l from the last to 1
// Where a layer reads the features, passes of the same k give their gradient, W of them each, right before
// the pass above (of layer 0: as the last). They are skipped where nobody wants it.
//
// Kept for the backward ("stash"), for each matrix of c columns: blocks of 64 rows; in each octet of columns
// after octet; in each 8 octets of rows; in each 8 rows of 16 bytes. So one store of a warp writes 128 bytes
// in a row, a range of columns of a block is one piece, and that piece is an operand for products whose k are
// the rows (Major::mn).
#pragma once

#include <cstdint>

#include "mlp_plan.h"

#if defined(__CUDACC__)
#define MIPNERF_MLP_INLINE __host__ __device__ __forceinline__
#else
#define MIPNERF_MLP_INLINE inline
#endif

namespace mipnerf {
namespace mlp_hopper {

constexpr int kBlockRows = 64;      // of a warpgroup, and of a block of the stash
constexpr int kChunkK = 64;         // of a chunk of fragments
constexpr int kFeatureChunkK = 32;  // of a chunk of features, which are padded to whole ones
constexpr int kChannelK = 16;       // lead k: four channels and zeros
constexpr int kChannelColumns = 8;  // of the channels' deltas in the stash

MIPNERF_MLP_INLINE constexpr int round_up(int n, int to) {
    return (n + to - 1) / to * to;
}

enum class PassKind : std::int8_t { kForward, kForwardHead, kForwardColour, kSeed, kBackward, kBackwardHead };

struct Pass {
    PassKind kind;
    std::int8_t layer;       // of the plan; of the heads view 0, or -1
    std::int8_t lead;        // k of the first chunk: kChannelK or 0
    std::int8_t fragments;   // chunks of 64 k that come from registers
    std::int16_t feature_k;  // a multiple of 32
    std::int16_t columns;
    std::int16_t first_feature;  // of a pass for the features' gradient; -1 of others
    std::int16_t hidden;         // forward: the hidden layer that it gives, -1: none
    std::int32_t offset;         // of its chunks, in elements
    std::int32_t bias;           // of the forward: of its biases, in floats

    MIPNERF_MLP_INLINE int k() const { return lead + fragments * kChunkK + feature_k; }
    MIPNERF_MLP_INLINE bool for_features() const { return first_feature >= 0; }
};

constexpr int kMostForward = kMlpMaxLayers;
constexpr int kMostBackward = kMlpMaxLayers + 2 * (kMlpMaxDepth + 1);

template <int Most>
struct PassList {
    int count;
    Pass pass[Most];
};

struct Passes {
    PassList<kMostForward> forward;
    PassList<kMostBackward> backward;
    int elements;  // of all packed weights
    int biases;    // floats, after the weights
};

MIPNERF_MLP_INLINE bool has_narrow_view(const MlpShape& shape) {
    return shape.has_view && shape.view_width <= shape.width / 2;
}
// None, as many as half the width needs, or as many as the width needs: the kernels know no others.
MIPNERF_MLP_INLINE int fragments_of(int k, int width) {
    if (k == 0) return 0;
    return ((k <= width / 2 ? width / 2 : width) + kChunkK - 1) / kChunkK;
}
MIPNERF_MLP_INLINE int density_layer(const MlpShape& shape) {
    return shape.depth;
}
MIPNERF_MLP_INLINE int colour_layer(const MlpPlan& plan) {
    return plan.layers - 1;
}

inline Passes make_passes(const MlpPlan& plan) {
    const MlpShape& shape = plan.shape;
    const int width = shape.width;
    Passes passes{};
    const auto finish = [&passes](Pass& pass, bool is_forward) {
        pass.offset = passes.elements;
        passes.elements += pass.k() * pass.columns;
        if (!is_forward) return;
        pass.bias = passes.biases;
        passes.biases += pass.columns;
    };
    const auto forward = [&](PassKind kind, int layer, const MlpLayer& reads, int columns, int hidden) {
        Pass& pass = passes.forward.pass[passes.forward.count++];
        pass.kind = kind;
        pass.layer = static_cast<std::int8_t>(layer);
        pass.fragments = static_cast<std::int8_t>(
            kind == PassKind::kForwardColour ? fragments_of(reads.input_columns, width)
                                             : fragments_of(reads.input_columns > 0 ? width : 0, width));
        pass.feature_k = static_cast<std::int16_t>(round_up(reads.feature_columns, kFeatureChunkK));
        pass.columns = static_cast<std::int16_t>(columns);
        pass.first_feature = -1;
        pass.hidden = static_cast<std::int16_t>(hidden);
        finish(pass, true);
    };
    const int density = density_layer(shape), colour = colour_layer(plan), view = density + 1;
    for (int l = 0; l < shape.depth; ++l) forward(PassKind::kForward, l, plan.layer[l], width, l);
    const bool narrow = has_narrow_view(shape);
    forward(PassKind::kForwardHead, narrow ? view : -1, plan.layer[density], width / 2 + 8,
            narrow ? shape.depth : -1);
    for (int c = narrow ? 1 : 0; c < shape.view_depth; ++c)
        forward(PassKind::kForward, view + c, plan.layer[view + c], width, shape.depth + c);
    if (shape.has_view) forward(PassKind::kForwardColour, colour, plan.layer[colour], 8, -1);

    const auto backward = [&](PassKind kind, int layer, int k, int first_feature) {
        Pass& pass = passes.backward.pass[passes.backward.count++];
        pass.kind = kind;
        pass.layer = static_cast<std::int8_t>(layer);
        pass.lead = kind == PassKind::kBackward ? 0 : kChannelK;
        pass.fragments =
            static_cast<std::int8_t>(fragments_of(kind == PassKind::kBackward ? width : k, width));
        pass.columns = static_cast<std::int16_t>(width);
        pass.first_feature = static_cast<std::int16_t>(first_feature);
        pass.hidden = -1;
        finish(pass, false);
    };
    const auto with_features = [&](PassKind kind, int layer, int k, const MlpLayer& reads, bool has_input) {
        for (int first = 0; first < reads.feature_columns; first += width) backward(kind, layer, k, first);
        if (has_input) backward(kind, layer, k, -1);
    };
    if (shape.has_view) {
        backward(PassKind::kSeed, colour, 0, -1);
        for (int c = shape.view_depth - 1; c > 0; --c)
            backward(PassKind::kBackward, view + c, shape.view_width, -1);
    }
    with_features(PassKind::kBackwardHead, shape.has_view ? view : -1, shape.view_width, plan.layer[density],
                  true);
    for (int l = shape.depth - 1; l >= 0; --l)
        with_features(PassKind::kBackward, l, width, plan.layer[l], l > 0);
    return passes;
}

// Which weight element (column, k) of a pass is: row and column of a layer's matrix, or layer -1 for zero.
struct WeightPlace {
    int layer, row, column;
};

MIPNERF_MLP_INLINE WeightPlace weight_place(const MlpPlan& plan, const Pass& pass, int column, int k) {
    const WeightPlace none{-1, 0, 0};
    const MlpShape& shape = plan.shape;
    int layer = pass.layer, row, from;  // from: column of the weight, features counted from the input's end
    bool of_features;
    if (pass.kind <= PassKind::kForwardColour) {
        row = column;
        if (pass.kind == PassKind::kForwardHead && column >= shape.width / 2) {
            const int channel = column - shape.width / 2;
            layer = channel == 0 ? density_layer(shape) : (shape.has_view ? -1 : colour_layer(plan));
            row = channel == 0 ? 0 : channel - 1;
        }
        of_features = k >= pass.fragments * kChunkK;
        from = of_features ? k - pass.fragments * kChunkK : k;
    } else {
        row = k - pass.lead;
        if (k < pass.lead) {
            const bool is_colour = k < 3;
            const bool has_colour = pass.kind == PassKind::kSeed || !shape.has_view;
            const bool has_density = pass.kind == PassKind::kBackwardHead;
            layer = -1;
            if (is_colour && has_colour) layer = colour_layer(plan);
            if (k == 3 && has_density) layer = density_layer(shape);
            row = is_colour ? k : 0;
        }
        of_features = pass.for_features();
        from = of_features ? pass.first_feature + column : column;
    }
    if (layer < 0) return none;
    const MlpLayer& matrix = plan.layer[layer];
    if (row >= matrix.outputs || from >= (of_features ? matrix.feature_columns : matrix.input_columns))
        return none;
    return {layer, row, of_features ? matrix.input_columns + from : from};
}

// Where element (column, k) of a pass lies among its own, and back: what is at `place`.
MIPNERF_MLP_INLINE int packed_place(const Pass& pass, int column, int k) {
    return ((k / 8 * (pass.columns / 8) + column / 8) * 8 + column % 8) * 8 + k % 8;
}
MIPNERF_MLP_INLINE void packed_at(const Pass& pass, int place, int& column, int& k) {
    const int matrix = place / 64;
    column = matrix % (pass.columns / 8) * 8 + place % 64 / 8;
    k = matrix / (pass.columns / 8) * 8 + place % 8;
}

// ---- the stash ----------------------------------------------------------------------------------

MIPNERF_MLP_INLINE std::int64_t stash_blocks(std::int64_t samples) {
    return (samples + kBlockRows - 1) / kBlockRows;
}
// Element (row, column) within a block.
MIPNERF_MLP_INLINE int stash_place(int row, int column) {
    return ((column / 8 * 8 + row / 8) * 8 + row % 8) * 8 + column % 8;
}
// The first element of a block of a matrix of `columns` that stands `before` columns into its array.
MIPNERF_MLP_INLINE std::int64_t stash_block(std::int64_t blocks, int before, int columns,
                                            std::int64_t block) {
    return (blocks * before + block * columns) * kBlockRows;
}
// Columns before hidden layer h: in the activations after the features, in the deltas after the channels.
MIPNERF_MLP_INLINE int stash_features(const MlpPlan& plan) {
    return round_up(plan.shape.features, kFeatureChunkK);
}

// Masks: for each block and hidden layer, W/64 words of each of the 128 threads. Bit of accumulator i of a
// thread in word i / 32: pairs are 8 bits apart, so that both halves of a packed pair are masked at once.
MIPNERF_MLP_INLINE int mask_bit(int i) {
    return 16 * (i % 32 / 16) + 8 * (i % 2) + 7 - i % 16 / 2;
}
MIPNERF_MLP_INLINE std::int64_t mask_words(const MlpPlan& plan, std::int64_t blocks) {
    return blocks * plan.hidden * 128 * (plan.shape.width / 64);
}

inline MlpSizes sizes_of(const MlpPlan& plan, std::int64_t samples) {
    const Passes passes = make_passes(plan);
    const std::int64_t blocks = stash_blocks(samples);
    MlpSizes sizes{};
    sizes.packed = std::int64_t{2} * passes.elements + std::int64_t{4} * passes.biases;
    sizes.activations = 2 * kBlockRows * blocks * (stash_features(plan) + plan.stash_columns);
    sizes.masks = 4 * mask_words(plan, blocks);
    sizes.deltas = 2 * kBlockRows * blocks * (kChannelColumns + plan.stash_columns);
    return sizes;
}

}  // namespace mlp_hopper
}  // namespace mipnerf
