// How the mma.sync kernels walk through the network: a list of passes, each a product of a tile of samples
// with one weight, and where the weights of each pass lie in the packed buffer. No torch, no CUDA header.
//
// Packed weights are fragments. A unit is the 16 bytes that one lane feeds to two products (tensor_core.cuh):
// b0 and b1 of 8 columns, b0 and b1 of the next 8. 32 units are a block of 16 x 16 (contraction x columns);
// the blocks of a step of the contraction stand beside each other, its steps after each other, in the order
// in which a pass takes them. So a run of steps is one contiguous copy, and what a lane reads of it is
// contiguous among the lanes.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "mlp_plan.h"

namespace mipnerf {
namespace mlp_mma {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 128;  // samples of a block
constexpr int kMaxPasses = 32;
constexpr int kMaxPieces = 64;
constexpr int kUnitsPerBlock = 32;
constexpr int kHeadColumns = 16;  // of a head's packed weight, four of them used

// Where the operand of a step comes from, in the order in which a pass takes them.
enum Source { kFromHeads, kFromTile, kFromFeatures, kSources };

struct MlpPass {
    int steps[kSources];  // of 16
    int columns;          // of the result, a multiple of 16; 0: heads alone
    int hidden;        // the hidden layer whose activations (dgrad: deltas) result; -1: gradients of features
    int stash_column;  // of those: they start at stash_column * samples
    int weights;       // first unit of its packed weights
    int bias;          // forward: first of the packed biases; -1: the bias of each ray
    int head_weights;  // forward: first unit of the heads that read what this pass reads; -1: none
    int head_bias;     // forward: four packed biases
    int head_channels;  // forward: a bit for each channel that those heads give
    int first_column;   // dgrad to the features: of the features
    int accumulates;    // dgrad to the features: added to what an earlier pass wrote
};

struct MlpPasses {
    int count;
    MlpPass pass[kMaxPasses];
};

// A part of the packed buffer and where its numbers come from.
struct MlpPiece {
    int first_unit;
    int units;
    int blocks;      // of a step
    int layer;       // whose weight; -1: heads
    int transposed;  // contraction over the weight's rows (dgrad)
    int rows;        // of the contraction that are not padding
    int columns;     // that are not padding
    int first;       // column of the weight that is the first of the contraction (transposed: of the columns)
    int heads_of;    // layer -1: the heads that read this hidden layer
};

struct MlpPacking {
    int pieces;
    MlpPiece piece[kMaxPieces];
    int units;   // of weights; the biases follow
    int biases;  // floats, a multiple of 4
};

struct MlpSchedule {
    MlpPasses forward;
    MlpPasses dgrad;           // to the hidden layers
    MlpPasses dgrad_features;  // to the hidden layers and the features
    MlpPacking packing;
};

inline int padded16(int n) {
    return (n + 15) / 16 * 16;
}

inline MlpSchedule make_mlp_schedule(const MlpPlan& plan) {
    MlpSchedule schedule{};
    MlpPacking& packing = schedule.packing;
    const int width = plan.shape.width;

    const auto add_piece = [&packing](int layer, int heads_of, bool transposed, int rows, int columns,
                                      int padded_columns, int first) {
        const int steps = padded16(rows) / 16, blocks = padded_columns / 16;
        if (steps == 0) return 0;
        if (packing.pieces == kMaxPieces) throw std::logic_error("mlp: more pieces of weights than foreseen");
        packing.piece[packing.pieces++] = {
            packing.units, steps * blocks * kUnitsPerBlock, blocks, layer, transposed, rows, columns, first,
            heads_of};
        packing.units += steps * blocks * kUnitsPerBlock;
        return steps;
    };
    const auto heads_reading = [&plan](int hidden) {
        int channels = 0;
        for (int l = 0; l < plan.layers; ++l)
            if (plan.layer[l].channel >= 0 && plan.layer[l].input == hidden)
                channels |= ((1 << plan.layer[l].outputs) - 1) << plan.layer[l].channel;
        return channels;
    };
    // All heads of one hidden layer read the same columns.
    const auto head_reading = [&plan](int hidden) {
        for (int l = 0; l < plan.layers; ++l)
            if (plan.layer[l].channel >= 0 && plan.layer[l].input == hidden) return l;
        return -1;
    };

    // Forward: the hidden layers one after the other; heads ride with the layer that reads what they read.
    for (int h = 0; h <= plan.hidden; ++h) {
        const MlpLayer* layer = h < plan.hidden ? &plan.layer[plan.hidden_layer[h]] : nullptr;
        const int input = layer ? layer->input : plan.hidden - 1;
        const int head = input < 0 ? -1 : head_reading(input);
        MlpPass& pass = schedule.forward.pass[schedule.forward.count++];
        pass.hidden = layer ? h : -1;
        pass.weights = packing.units;
        pass.head_weights = pass.head_bias = pass.bias = -1;
        const MlpLayer& reader = layer ? *layer : plan.layer[head];
        if (layer) {
            pass.columns = layer->outputs;
            pass.stash_column = layer->stash_column;
            const int number = plan.hidden_layer[h];
            pass.steps[kFromTile] =
                add_piece(number, -1, false, layer->input_columns, layer->outputs, layer->outputs, 0);
            pass.steps[kFromFeatures] = add_piece(number, -1, false, layer->feature_columns, layer->outputs,
                                                  layer->outputs, layer->input_columns);
            if (!layer->has_ray_bias) {
                pass.bias = packing.biases;
                packing.biases += layer->outputs;
            }
        } else {
            pass.steps[kFromTile] = padded16(reader.input_columns) / 16;
            pass.steps[kFromFeatures] = padded16(reader.feature_columns) / 16;
        }
        if (head >= 0) {
            pass.head_weights = packing.units;
            pass.head_channels = heads_reading(input);
            pass.head_bias = packing.biases;
            packing.biases += kMlpChannels;
            add_piece(-1, input, false, reader.input_columns, kMlpChannels, kHeadColumns, 0);
            add_piece(-1, input, false, reader.feature_columns, kMlpChannels, kHeadColumns,
                      reader.input_columns);
        }
    }

    // Backward: from the last hidden layer to the first. What is packed for the gradients of the features is
    // packed in any case.
    const auto add_pass = [&schedule](const MlpPass& pass) {
        if (schedule.dgrad_features.count == kMaxPasses)
            throw std::logic_error("mlp: more passes than foreseen");
        schedule.dgrad_features.pass[schedule.dgrad_features.count++] = pass;
        if (pass.hidden >= 0) schedule.dgrad.pass[schedule.dgrad.count++] = pass;
    };
    bool accumulates = false;
    // From the heads that read `input` (where they take part) and the layer with this number (or -1).
    const auto to_features = [&](int input, bool with_heads, int number) {
        for (int first = 0; first < plan.shape.features; first += width) {
            const int left = plan.shape.features - first, columns = left < width ? left : width;
            MlpPass pass{};
            pass.hidden = -1;
            pass.columns = padded16(columns);
            pass.weights = packing.units;
            pass.first_column = first;
            pass.accumulates = accumulates;
            if (with_heads)
                pass.steps[kFromHeads] = add_piece(-1, input, true, kMlpChannels, columns, pass.columns,
                                                   plan.layer[head_reading(input)].input_columns + first);
            if (number >= 0)
                pass.steps[kFromTile] = add_piece(number, -1, true, plan.layer[number].outputs, columns,
                                                  pass.columns, plan.layer[number].input_columns + first);
            add_pass(pass);
        }
        accumulates = true;
    };
    const auto to_hidden = [&](int hidden, int number) {
        MlpPass pass{};
        pass.hidden = hidden;
        pass.columns = plan.layer[plan.hidden_layer[hidden]].outputs;
        pass.stash_column = plan.layer[plan.hidden_layer[hidden]].stash_column;
        pass.weights = packing.units;
        if (heads_reading(hidden))
            pass.steps[kFromHeads] = add_piece(-1, hidden, true, kMlpChannels, pass.columns, pass.columns, 0);
        if (number >= 0)
            pass.steps[kFromTile] =
                add_piece(number, -1, true, plan.layer[number].outputs, pass.columns, pass.columns, 0);
        add_pass(pass);
    };
    const auto heads_read_features = [&](int hidden) {
        const int head = head_reading(hidden);
        return head >= 0 && plan.layer[head].feature_columns > 0;
    };
    if (heads_read_features(plan.hidden - 1)) to_features(plan.hidden - 1, true, -1);
    to_hidden(plan.hidden - 1, -1);
    for (int h = plan.hidden - 1; h >= 0; --h) {
        const int number = plan.hidden_layer[h];
        const MlpLayer& layer = plan.layer[number];
        if (layer.feature_columns > 0)
            to_features(layer.input, layer.input >= 0 && heads_read_features(layer.input), number);
        if (layer.input >= 0) to_hidden(layer.input, number);
    }
    return schedule;
}

// ---- wgrad: a product of deltas and inputs over all samples for each matrix of gradients

struct MlpGradientMatrix {
    int delta_column;  // deltas of this layer start at delta_column * samples
    int delta_pitch;   // columns of the deltas; those of the heads: 8
    int first_row;     // column of the deltas that is its first row
    int rows;
    int input_column;  // activations of its input start at input_column * samples; -1: the features
    int columns;       // of the input, all of them
    int gradient;      // first float
    int gradient_pitch;
    int bias;               // first float; -1: another matrix of the layer has it
    int tiles_down, tiles;  // of the block's tile
};

struct MlpGradientMatrices {
    int count;
    int tiles;
    MlpGradientMatrix matrix[2 * kMlpMaxLayers];
};

constexpr int kHeadDeltas = 8;  // columns of the deltas of the heads, which lie behind those of the layers

inline MlpGradientMatrices make_gradient_matrices(const MlpPlan& plan, int tile) {
    MlpGradientMatrices matrices{};
    for (int l = 0; l < plan.layers; ++l) {
        const MlpLayer& layer = plan.layer[l];
        bool has_bias = false;
        for (int source = 0; source < 2; ++source) {
            const int columns = source == 0 ? layer.input_columns : layer.feature_columns;
            if (columns == 0) continue;
            MlpGradientMatrix& matrix = matrices.matrix[matrices.count++];
            const bool head = layer.channel >= 0;
            matrix.delta_column = head ? plan.stash_columns : layer.stash_column;
            matrix.delta_pitch = head ? kHeadDeltas : layer.outputs;
            matrix.first_row = head ? layer.channel : 0;
            matrix.rows = layer.outputs;
            matrix.input_column = source == 0 ? plan.layer[plan.hidden_layer[layer.input]].stash_column : -1;
            matrix.columns = columns;
            matrix.gradient = layer.weight_offset + (source == 0 ? 0 : layer.input_columns);
            matrix.gradient_pitch = layer.input_columns + layer.feature_columns;
            matrix.bias = has_bias ? -1 : layer.bias_offset;
            has_bias = true;
            matrix.tiles_down = head ? 1 : (layer.outputs + tile - 1) / tile;
            matrix.tiles = matrix.tiles_down * ((columns + tile - 1) / tile);
            matrices.tiles += matrix.tiles;
        }
    }
    return matrices;
}

// Samples are split among so many blocks for each tile of gradients. A function of the samples alone, so that
// the sums are the same on every GPU.
inline int wgrad_splits(std::int64_t samples) {
    const std::int64_t wanted = samples / 4096;
    return static_cast<int>(wanted < 1 ? 1 : wanted > 16 ? 16 : wanted);
}

inline MlpSizes mlp_sizes(const MlpPlan& plan, std::int64_t samples) {
    const MlpPacking packing = make_mlp_schedule(plan).packing;
    const std::int64_t tiles = (samples + kTileRows - 1) / kTileRows;
    const std::int64_t stash = 2 * tiles * kTileRows * plan.stash_columns;
    const int splits = wgrad_splits(samples);
    MlpSizes sizes{};
    sizes.packed = 16ll * packing.units + 4ll * packing.biases;
    sizes.activations = stash;
    sizes.masks = 4 * tiles * plan.hidden * kThreads * (plan.shape.width / 64);
    sizes.deltas = stash + 2 * tiles * kTileRows * kHeadDeltas;
    sizes.workspace = splits > 1 ? 4ll * splits * plan.gradients : 0;
    return sizes;
}

}  // namespace mlp_mma
}  // namespace mipnerf
