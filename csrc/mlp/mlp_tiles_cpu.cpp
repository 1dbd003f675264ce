// The operator mlp_tiles_forward: the folded network on the CPU, tile by tile. A tile of samples goes through
// all layers while it is in the cache, where torch calls a product for every layer, waits for its threads and
// writes what it gives. Nothing but two tiles a thread is held beside what is asked for, and the weights are
// read as they lie in memory.
//
// A vector holds W samples of one column; two of them, one behind the other for every column, are a panel
// [columns, 2 W], and some panels a tile. A weight is broadcast.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/checks.h"
#include "../common/vector_tasks.h"
#include "../common/vector_transpose.h"
#include "mlp_folding.h"
#include "mlp_sums.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <int W>
constexpr int kPanel = 2 * W;

// Samples, whole panels: enough that reading all weights for every tile is little beside multiplying by them.
inline int tile_samples() {
    return vector_unit() == VectorUnit::kAvx512 ? 64 : 48;
}

struct Layer {
    const float *weights, *bias;  // [outputs, inputs]; a number for every output, or null
    int outputs, inputs;
};

// Columns of a tile's panels.
template <int W>
struct Columns {
    float* data;
    int count;

    MIPNERF_INLINE float* panel(int number) const { return data + int64_t{number} * count * kPanel<W>; }
};

template <int W, int R>
MIPNERF_INLINE void add_products(Vector<W> (&sum)[R][2], const float* weights, int64_t stride, const float* x,
                                 int count) {
    for (const float* const end = weights + count; weights < end; ++weights, x += kPanel<W>) {
        const Vector<W> a = load_vector<W>(x), b = load_vector<W>(x + W);
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
            const Vector<W> weight = splat<W>(weights[r * stride]);
            sum[r][0] = fused<W>(weight, a, sum[r][0]);
            sum[r][1] = fused<W>(weight, b, sum[r][1]);
        }
    }
}

// y[o] = bias[o] + sum_k weights[o, k] x[k], then the ReLU, of a panel, for the outputs from `first` on, R at
// a time, and fewer at last. `more` are inputs behind those of x; without a bias y holds it.
template <int W, int R, bool kRelu>
MIPNERF_INLINE void outputs_from(int first, const Layer& layer, const float* bias, const float* x, int inputs,
                                 const float* more, float* y) {
    for (; first + R <= layer.outputs; first += R) {
        const float* const weights = layer.weights + int64_t{first} * layer.inputs;
        float* const to = y + first * kPanel<W>;
        Vector<W> sum[R][2];
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) MIPNERF_UNROLL for (int v = 0; v < 2; ++v) sum[r][v] =
            bias == nullptr ? load_vector<W>(to + r * kPanel<W> + v * W) : splat<W>(bias[first + r]);
        add_products<W, R>(sum, weights, layer.inputs, x, inputs);
        if (more != nullptr)
            add_products<W, R>(sum, weights + inputs, layer.inputs, more, layer.inputs - inputs);
        const Vector<W> zero = splat<W>(0.0f);
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) MIPNERF_UNROLL for (int v = 0; v < 2; ++v) {
            Vector<W> value = sum[r][v];
            // Compared so that a NaN passes: swallowed here, it would leave the loss finite.
            if constexpr (kRelu) value = value < zero ? zero : value;
            store_vector<W>(to + r * kPanel<W> + v * W, value);
        }
    }
    if constexpr (R > 1)
        if (first < layer.outputs)
            outputs_from<W, fewer_sums(R), kRelu>(first, layer, bias, x, inputs, more, y);
}

// The rows of `count` samples from the one numbered `first` on, [S, columns], into a tile's panels.
template <int W>
MIPNERF_INLINE void rows_to_panels(const float* rows, int64_t first, int count, Columns<W> to) {
    constexpr int N = kTransposed<W>;
    const int whole = to.count / N * N;
    for (int s = 0; s < count; s += N) {
        float* const panel = to.panel(s / kPanel<W>) + s % kPanel<W>;
        const float* const row = rows + (first + s) * to.count;
        const int rest = std::min(N, count - s);
        if (rest == N)
            for (int k = 0; k < whole; k += N)
                transpose<N>(row + k, to.count, panel + k * kPanel<W>, kPanel<W>);
        for (int i = 0; i < rest; ++i)
            for (int k = rest == N ? whole : 0; k < to.count; ++k)
                panel[k * kPanel<W> + i] = row[int64_t{i} * to.count + k];
    }
}

// And back.
template <int W>
MIPNERF_INLINE void panels_to_rows(Columns<W> from, float* rows, int64_t first, int count) {
    constexpr int N = kTransposed<W>;
    const int whole = from.count / N * N;
    for (int s = 0; s < count; s += N) {
        const float* const panel = from.panel(s / kPanel<W>) + s % kPanel<W>;
        float* const row = rows + (first + s) * from.count;
        const int rest = std::min(N, count - s);
        if (rest == N)
            for (int k = 0; k < whole; k += N)
                transpose<N>(panel + k * kPanel<W>, kPanel<W>, row + k, from.count);
        for (int i = 0; i < rest; ++i)
            for (int k = rest == N ? whole : 0; k < from.count; ++k)
                row[int64_t{i} * from.count + k] = panel[k * kPanel<W> + i];
    }
}

// The rows of the samples' rays into a panel, for `count` samples from the one numbered `first` on.
template <int W>
MIPNERF_INLINE void ray_rows_to_panel(const float* rows, int64_t first, int count, int64_t samples_per_ray,
                                      int columns, float* panel) {
    for (int s = 0; s < count; ++s) {
        const float* const row = rows + (first + s) / samples_per_ray * columns;
        for (int k = 0; k < columns; ++k) panel[k * kPanel<W> + s] = row[k];
    }
}

// Layers in the operator's order: the trunk, density, what of the colour branch reads the trunk, view layers
// and colour.
struct Network {
    int64_t samples, samples_per_ray;
    int64_t skip_layer;
    int tile, features, depth, widest;
    const float *encoded,
        *ray_biases;  // [S, features]; [rays, outputs] of the colour branch's first, or null
    std::vector<Layer> layers;
    std::vector<float*> outputs;  // of every layer, [S, outputs], or null: nobody wants them

    // Whether the trunk's layer of this number reads the features beside its input; the heads are `depth`.
    bool reads_features(int layer) const { return layer > 1 && (layer - 1) % skip_layer == 0; }
    // What a thread works in, floats: a tile's features, what a layer reads and what it writes.
    int64_t room() const { return int64_t{features + 2 * widest} * tile; }
};

struct Tiles {
    const Network& network;
    float* rooms;  // one a thread

    // A layer's bias for a panel of samples from the one numbered `first` on, `count` or more than it holds;
    // the ray's where all are of one ray; otherwise null, and y holds the rays' rows.
    template <int W>
    MIPNERF_INLINE const float* bias_of(const Layer& layer, int64_t first, int count, float* y) const {
        if (layer.bias != nullptr) return layer.bias;
        count = std::min(count, kPanel<W>);
        const int64_t ray = first / network.samples_per_ray;
        if ((first + count - 1) / network.samples_per_ray == ray)
            return network.ray_biases + ray * layer.outputs;
        ray_rows_to_panel<W>(network.ray_biases, first, count, network.samples_per_ray, layer.outputs, y);
        return nullptr;
    }

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        const int64_t first = task * network.tile;
        const int count = static_cast<int>(std::min<int64_t>(network.tile, network.samples - first));
        const int panels = (count + kPanel<W> - 1) / kPanel<W>, depth = network.depth;
        float* const room = rooms + thread * network.room();
        const Columns<W> encoded{room, network.features};
        float* from = room + int64_t{network.features} * network.tile;
        float* to = from + int64_t{network.widest} * network.tile;
        // Behind the last sample the lanes hold anything: none reads another's.
        rows_to_panels<W>(network.encoded, first, count, encoded);
        Columns<W> x = encoded;
        for (int number = 0; number < static_cast<int>(network.layers.size()); ++number) {
            const Layer& layer = network.layers[number];
            const bool density = number == depth, reads_trunk = number <= depth + 1;
            const bool last = number + 1 == static_cast<int>(network.layers.size());
            const Columns<W> y{to, layer.outputs};
            const bool reads_features = reads_trunk && network.reads_features(std::min(number, depth));
            // Panel by panel: what one reads stays in the first-level cache for all outputs.
            for (int p = 0; p < panels; ++p) {
                const float* const more = reads_features ? encoded.panel(p) : nullptr;
                const float* const bias =
                    bias_of<W>(layer, first + p * kPanel<W>, count - p * kPanel<W>, y.panel(p));
                if (density || last)
                    outputs_from<W, kSumsAtATime<W>, false>(0, layer, bias, x.panel(p), x.count, more,
                                                            y.panel(p));
                else
                    outputs_from<W, kSumsAtATime<W>, true>(0, layer, bias, x.panel(p), x.count, more,
                                                           y.panel(p));
            }
            if (network.outputs[number] != nullptr)
                panels_to_rows<W>(y, network.outputs[number], first, count);
            if (density) continue;  // the next layer reads what this one did
            x = y;
            std::swap(from, to);
        }
    }
};

// See csrc/library.cpp.
std::vector<Tensor> mlp_tiles_forward_cpu(Tensor features, std::optional<Tensor> viewdirs_enc,
                                          std::vector<Tensor> parameters, int64_t depth, int64_t skip_layer,
                                          int64_t first_kept) {
    const Checker check{"mlp_tiles_forward"};
    check.dims("features", features, 2, "[S, F]");
    check.dtype("features", features, {ScalarType::Float});
    check.that(skip_layer > 0, "skip_layer", "1 or more", skip_layer);
    const bool has_views = viewdirs_enc.has_value();
    // Of the folded network, in which the bottleneck is no layer.
    const int64_t count = static_cast<int64_t>(parameters.size()) / 2 - (has_views ? 1 : 0);
    check.that(parameters.size() % 2 == 0 && depth > 0 && count >= depth + 2, "parameters",
               std::string("weight and bias of the trunk's layers, density") +
                   (has_views ? ", the bottleneck and colour" : " and colour"),
               parameters.size());
    std::vector<Tensor> copies;  // of what is not contiguous, while it is needed
    const auto data = [&copies, &check, &features](const char* name, const Tensor& tensor) {
        check.same_dtype(name, tensor, "features", features);
        check.same_device(name, tensor, "features", features);
        if (tensor.is_contiguous()) return static_cast<const float*>(tensor.const_data_ptr());
        copies.push_back(torch::stable::contiguous(tensor));
        return static_cast<const float*>(copies.back().const_data_ptr());
    };
    const auto made = [&features](std::initializer_list<int64_t> sizes, Tensor& tensor) {
        tensor = torch::stable::new_empty(features, sizes);
        return static_cast<float*>(tensor.mutable_data_ptr());
    };
    Network network{features.size(0),
                    1,
                    skip_layer,
                    tile_samples(),
                    static_cast<int>(features.size(1)),
                    static_cast<int>(depth),
                    1,
                    data("features", features),
                    nullptr,
                    {},
                    {}};
    std::vector<Tensor> kept;
    int64_t inputs = network.features, of_trunk = 0;
    Tensor rgb = features, density = features, top = features, ray_biases = features;
    for (int64_t number = 0; number < count; ++number) {
        const bool over_trunk = number == depth + 1, last = number + 1 == count;
        if (number <= depth + 1) {
            inputs = number == 0 ? network.features : of_trunk;
            if (network.reads_features(static_cast<int>(std::min(number, depth)))) inputs += network.features;
        }
        const int64_t place = 2 * (number + (has_views && number > depth ? 1 : 0));
        const Tensor &weight = parameters[place], &bias = parameters[place + 1];
        check.dims("parameters", weight, 2, "[outputs, inputs]");
        const int64_t outputs = weight.size(0);
        check.that(number != depth || outputs == 1, "parameters", "one row for density", outputs);
        check.that(!last || outputs == 3, "parameters", "three rows for colour", outputs);
        check.shape("parameters", bias, {outputs}, "of a bias");
        Layer layer{nullptr, data("parameters", bias), static_cast<int>(outputs), static_cast<int>(inputs)};
        float* const matrix = over_trunk ? made({outputs + 1, inputs}, top) : nullptr;
        if (over_trunk && has_views) {
            const Tensor &directions = *viewdirs_enc, &bottleneck = parameters[place - 2];
            check.dims("viewdirs_enc", directions, 2, "[B, V]");
            check.dims("parameters", bottleneck, 2, "[outputs, inputs]");
            const int64_t rays = directions.size(0), width = bottleneck.size(0);
            check.that(rays > 0 ? network.samples % rays == 0 : network.samples == 0, "viewdirs_enc",
                       "of rays with as many samples each", rays);
            check.shape("parameters", bottleneck, {width, inputs}, "of the bottleneck");
            check.shape("parameters", parameters[place - 1], {width}, "of the bottleneck's bias");
            check.shape("parameters", weight, {outputs, width + directions.size(1)},
                        "of the layer over the bottleneck");
            const Folding folding{outputs,
                                  width,
                                  inputs,
                                  directions.size(1),
                                  rays,
                                  data("viewdirs_enc", directions),
                                  data("parameters", weight),
                                  layer.bias,
                                  data("parameters", bottleneck),
                                  data("parameters", parameters[place - 1])};
            network.samples_per_ray = std::max<int64_t>(1, network.samples / std::max<int64_t>(1, rays));
            float* const rows = made({rays, outputs}, ray_biases);
            fold(folding, matrix, rows);
            network.ray_biases = rows;
            layer.weights = matrix;
            layer.bias = nullptr;
        } else {
            check.shape("parameters", weight, {outputs, inputs}, "of a layer");
            layer.weights = data("parameters", weight);
            if (over_trunk) std::copy_n(layer.weights, outputs * inputs, matrix);
        }
        if (over_trunk) std::copy_n(network.layers[depth].weights, inputs, matrix + outputs * inputs);
        network.layers.push_back(layer);
        network.widest = std::max(network.widest, static_cast<int>(outputs));
        float* wanted = nullptr;
        if (number == depth || last)
            wanted = made({network.samples, outputs}, last ? rgb : density);
        else if (number >= first_kept)
            wanted = made({network.samples, outputs}, kept.emplace_back(features));
        network.outputs.push_back(wanted);
        if (number < depth) of_trunk = outputs;
        inputs = outputs;
    }
    const int64_t tiles = (network.samples + network.tile - 1) / network.tile;
    if (tiles > 0) {
        const size_t bytes = static_cast<size_t>(task_threads(tiles) * network.room()) * sizeof(float);
        const std::unique_ptr<float, decltype(&std::free)> rooms(
            static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
        if (rooms == nullptr) throw std::bad_alloc();
        for_tasks(tiles, Tiles{network, rooms.get()});
    }
    std::vector<Tensor> results{rgb, density};
    results.insert(results.end(), kept.begin(), kept.end());
    results.push_back(top);
    return results;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("mlp_tiles_forward", TORCH_BOX(&mipnerf::mlp_tiles_forward_cpu));
}
