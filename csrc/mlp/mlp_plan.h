// The folded network as a list of run-time layers, and what the launches of both kernel generations take
// (mma.sync in mlp_kernels.cuh, wgmma in mlp_hopper_kernels.cuh). No torch, no CUDA header.
//
// The network (Barron et al. 2021, figure 7; reference/mlp.py) after folding its linear bottleneck into the
// first view layer, which is exact:
//     trunk    x_{l+1} = relu(W_l [x_l, features where the skip is read] + b_l), x_0 = features
//     density  W_d h + b_d, h = [x_D, features where the skip is read]
//     view     v_1 = relu(W_eff h + the ray's bias), v_{c+1} = relu(W_c v_c + b_c); without it v = h
//     colour   W_rgb v + b_rgb
// W_eff = W_view0[:, :width] W_bottleneck, and the ray's bias holds all that the samples of a ray share.
// Operands (features, activations, weights, deltas) are of T, rounded to nearest even; products are summed in
// float from the bias on; a mask is y > 0 before rounding.
//
// Order of the layers: trunk 0 .. depth-1, density, view 0 .. view_depth-1, colour. Those with a ReLU are
// "hidden" and numbered by themselves, trunk first. Columns of a weight: first those of the layer's input,
// then those of the features.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../composite/composite_math.h"

namespace mipnerf {

constexpr int kMlpMaxFeatures = 128;
constexpr int kMlpMaxDepth = 8;  // of the trunk, and of the view branch
constexpr int kMlpMaxHidden = 2 * kMlpMaxDepth;
constexpr int kMlpMaxLayers = kMlpMaxHidden + 2;
constexpr int kMlpChannels = 4;  // what the heads give: red, green, blue, density

struct MlpShape {
    int features;    // even
    int width;       // 64, 128 or 256
    int depth;       // 1 .. 8
    int skip_layer;  // the features are read again after every layer number > 0 that this divides
    bool has_view;
    int view_width;  // a multiple of 16, at most width; 0 without a view branch
    int view_depth;  // 1 .. 8; 0 without a view branch
};

struct MlpLayer {
    int input;            // the hidden layer that it reads, -1 for the features alone
    int input_columns;    // of the weight: what it reads of that layer
    int feature_columns;  // of the weight, after those: all features, or 0
    int outputs;          // rows of the weight
    int hidden;           // its number among the hidden layers, -1 for a head
    int channel;          // a head's first channel, -1 otherwise
    bool has_ray_bias;    // view 0: its bias is given for each ray, not packed
    int weight_offset;    // into the gradients, in floats: [outputs, input_columns + feature_columns]
    int bias_offset;      // into the gradients, in floats: [outputs]
    int stash_column;     // of a hidden layer: outputs of the hidden layers before it
};

struct MlpPlan {
    MlpShape shape;
    int layers;
    int hidden;
    MlpLayer layer[kMlpMaxLayers];
    int hidden_layer[kMlpMaxHidden];  // the layer that each hidden number means
    int gradients;                    // floats: every weight and bias, each starting at a multiple of 4
    int stash_columns;                // outputs of all hidden layers together
};

inline bool mlp_reads_skip(const MlpShape& shape, int layers_before) {
    const int last = layers_before - 1;
    return last > 0 && last % shape.skip_layer == 0;
}

inline void check_mlp_shape(const MlpShape& shape) {
    const auto require = [](bool holds, const char* field, const char* wanted, int got) {
        if (!holds)
            throw std::invalid_argument(std::string("mlp: ") + field + " must be " + wanted + ", got " +
                                        std::to_string(got));
    };
    require(shape.features >= 2 && shape.features <= kMlpMaxFeatures && shape.features % 2 == 0, "features",
            "even, 2 to 128", shape.features);
    require(shape.width == 64 || shape.width == 128 || shape.width == 256, "width", "64, 128 or 256",
            shape.width);
    require(shape.depth >= 1 && shape.depth <= kMlpMaxDepth, "depth", "1 to 8", shape.depth);
    require(shape.skip_layer >= 1, "skip_layer", "1 or more", shape.skip_layer);
    if (shape.has_view) {
        require(shape.view_width >= 16 && shape.view_width <= shape.width && shape.view_width % 16 == 0,
                "view_width", "a multiple of 16, at most the width", shape.view_width);
        require(shape.view_depth >= 1 && shape.view_depth <= kMlpMaxDepth, "view_depth", "1 to 8",
                shape.view_depth);
    } else {
        require(shape.view_width == 0, "view_width", "0 without a view branch", shape.view_width);
        require(shape.view_depth == 0, "view_depth", "0 without a view branch", shape.view_depth);
    }
}

inline MlpPlan make_mlp_plan(const MlpShape& shape) {
    check_mlp_shape(shape);
    MlpPlan plan{};
    plan.shape = shape;
    const auto add = [&plan](int input, int input_columns, int feature_columns, int outputs, int channel) {
        MlpLayer& layer = plan.layer[plan.layers];
        layer.input = input;
        layer.input_columns = input_columns;
        layer.feature_columns = feature_columns;
        layer.outputs = outputs;
        layer.channel = channel;
        layer.hidden = -1;
        layer.weight_offset = plan.gradients;
        layer.bias_offset = layer.weight_offset + (outputs * (input_columns + feature_columns) + 3) / 4 * 4;
        plan.gradients = layer.bias_offset + (outputs + 3) / 4 * 4;
        if (channel < 0) {
            layer.hidden = plan.hidden;
            layer.stash_column = plan.stash_columns;
            plan.hidden_layer[plan.hidden++] = plan.layers;
            plan.stash_columns += outputs;
        }
        ++plan.layers;
        return plan.hidden - 1;
    };
    int last = -1;
    for (int l = 0; l < shape.depth; ++l)
        last = add(last, l == 0 ? 0 : shape.width, l == 0 || mlp_reads_skip(shape, l) ? shape.features : 0,
                   shape.width, -1);
    const int skip_columns = mlp_reads_skip(shape, shape.depth) ? shape.features : 0;
    const int trunk = last;
    add(trunk, shape.width, skip_columns, 1, 3);
    if (!shape.has_view) {
        add(trunk, shape.width, skip_columns, 3, 0);
        return plan;
    }
    for (int c = 0; c < shape.view_depth; ++c) {
        last = add(last, c == 0 ? shape.width : shape.view_width, c == 0 ? skip_columns : 0, shape.view_width,
                   -1);
        plan.layer[plan.layers - 1].has_ray_bias = c == 0;
    }
    add(last, shape.view_width, 0, 3, 0);
    return plan;
}

// ---- what the launches take. All arrays are contiguous on the device and start at a multiple of 16 bytes.
// Samples are rows; the ray of sample s is s / samples_per_ray, and samples is a multiple of samples_per_ray.
// What lies in packed, activations, masks, deltas and workspace is each generation's own business; its
// mlp_sizes says how large they are. Those of activations and masks are a multiple of what 128 samples need.

struct MlpSizes {              // in bytes
    std::int64_t packed;       // depends on the plan alone
    std::int64_t activations;  // written by the forward for training, read by wgrad
    std::int64_t masks;        // written by the forward for training, read by dgrad
    std::int64_t deltas;       // written by dgrad, read by wgrad
    std::int64_t workspace;    // of the deterministic wgrad
};

struct MlpPackArguments {
    MlpPlan plan;
    const float*
        weights[kMlpMaxLayers];  // [outputs, input_columns + feature_columns] of each layer; view 0: W_eff
    const float* biases[kMlpMaxLayers];  // [outputs]; null for view 0
    void* packed;
};

// What the forward for inference may compute the features from, in place of reading them.
struct MlpEncoding {
    const float* t_vals;      // [rays, samples_per_ray + 1]; null: features are given
    const float* origins;     // [rays, 3]
    const float* directions;  // [rays, 3]
    const float* radii;       // [rays]
    int min_deg;              // features = 6 degrees
    bool cylinder;
    bool integrated;
};

// What the forward for inference may make of its raw colours and densities, in place of writing them. It asks
// for an encoding, and for a network that `mlp_composites`.
struct MlpCompositing {
    CompositeOptions<float> options;
    CompositeResults results;  // rgb null: no compositing. The weights hold raw densities in between.
};

// The heads of a network without a view branch that reads the features last find their first half's result
// in memory again, and compositing has no memory for colours.
inline bool mlp_composites(const MlpShape& shape) {
    return shape.has_view || !mlp_reads_skip(shape, shape.depth);
}

// Tiles of 128 rows that hold whole rays where compositing follows: as many rays as fit, or the tiles of one
// longer ray one after the other.
struct MlpTiling {
    std::int64_t samples;
    std::int64_t group_samples;  // of one group of tiles
    std::int64_t groups;
    int rays;   // of a group
    int tiles;  // of a group
};

inline MlpTiling mlp_tiling(std::int64_t samples, std::int64_t samples_per_ray, bool composites) {
    constexpr int kRows = 128;
    MlpTiling tiling{samples, kRows, 0, 0, 1};
    if (composites) {
        tiling.rays = samples_per_ray > kRows ? 1 : kRows / static_cast<int>(samples_per_ray);
        tiling.group_samples = tiling.rays * samples_per_ray;
        tiling.tiles = static_cast<int>((tiling.group_samples + kRows - 1) / kRows);
    }
    tiling.groups = (samples + tiling.group_samples - 1) / tiling.group_samples;
    return tiling;
}

template <typename T>
struct MlpForwardArguments {
    MlpPlan plan;
    std::int64_t samples;
    std::int64_t samples_per_ray;
    const T* features;  // [samples, features]
    MlpEncoding encoding;
    MlpCompositing compositing;
    const float* ray_bias;  // [rays, view_width]; null without a view branch
    const void* packed;
    float* rgb;         // [samples, 3]; null with compositing
    float* density;     // [samples]; null with compositing
    void* activations;  // null: inference
    void* masks;        // null: inference
};

template <typename T>
struct MlpDgradArguments {
    MlpPlan plan;
    std::int64_t samples;
    const float* grad_rgb;      // [samples, 3]; null: zero
    const float* grad_density;  // [samples]; null: zero
    const void* packed;
    const void* masks;
    void* deltas;
    float* grad_features;  // [samples, features]; null: not wanted
};

template <typename T>
struct MlpWgradArguments {
    MlpPlan plan;
    std::int64_t samples;
    std::int64_t samples_per_ray;
    const T* features;
    const void* activations;
    const void* deltas;
    float* gradients;  // plan.gradients floats; the bias of view 0 holds the sum of its deltas
    float* ray_sums;   // [rays, view_width]: of the deltas of view 0; null without a view branch
    void* workspace;   // null: atomic additions in an order that differs from run to run
};

}  // namespace mipnerf
