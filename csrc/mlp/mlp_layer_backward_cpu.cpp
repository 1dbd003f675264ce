// The operator mlp_layer_backward: one layer's way down on the CPU. The gradients of its weight and bias, and
// the delta of the layer below behind its ReLU, share one pass over the threads, where torch starts them for
// every product, every sum and every mask. Both products are the same: rows of sums, each a number of one
// operand times a row of the other, which is packed for the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../common/checks.h"
#include "../common/vector_tasks.h"
#include "mlp_sums.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Columns that a task does.
template <int W>
constexpr int kColumns = 2 * W;
constexpr int kMostColumns = 32;

// Terms of a sum at a time: packed, two vectors of each are within the first-level cache.
constexpr int kTerms = 256;

// Terms that a row of factors is fetched ahead.
constexpr int kAhead = 12;

// Samples of a task that carries a delta down: packing a block of the weights for them is little beside.
constexpr int kSamples = 128;

// Columns of a task that sums deltas.
constexpr int kBiases = 64;

struct Rows {
    const float* data;  // null: there are none
    int64_t stride;
    int columns;
};

struct Layer {
    int64_t samples;
    Rows delta, x, beside, weight;  // [S, N], [S, K], [S, F], [N, K]
    float *below, *grad_weight, *grad_bias;
    int64_t below_stride, grad_stride;
    bool add;
    int outputs_at_a_time;  // of a task that sums the gradient of a block of the weight's columns
};

// Terms of `count` rows, from the column `first` on, at most 2 W of them and zeros beside.
template <int W>
MIPNERF_INLINE void pack(Rows rows, int64_t row, int count, int first, float* packed) {
    const int columns = std::min(kColumns<W>, rows.columns - first);
    const float* from = rows.data + row * rows.stride + first;
    if (columns == kColumns<W>) {
        for (int t = 0; t < count; ++t, from += rows.stride) {
            store_vector<W>(packed + t * kColumns<W>, load_vector<W>(from));
            store_vector<W>(packed + t * kColumns<W> + W, load_vector<W>(from + W));
        }
        return;
    }
    for (int t = 0; t < count; ++t, from += rows.stride)
        for (int c = 0; c < kColumns<W>; ++c) packed[t * kColumns<W> + c] = c < columns ? from[c] : 0.0f;
}

// Where the sums of a block go: [rows, columns], added to what is there or not; with a mask, after the last
// term, zero where it is.
struct Sums {
    float* data;
    int64_t stride;
    int columns;
    bool add;
    const float* mask;
    int64_t mask_stride;
};

// Numbers of a term's row: next to each other, or a stride apart and each term's next to the last one's.
template <bool kAdjacent>
struct Factors {
    const float* data;
    int64_t stride;
};

// sums[r, c] (+)= sum_t factors(r, t) packed[t, c], for the rows from `row` on, R at a time, and fewer at
// last.
template <int W, int R, bool kAdjacent>
MIPNERF_INLINE void add_products(Factors<kAdjacent> factors, const float* packed, int terms, Sums sums,
                                 int row, int rows) {
    for (; row + R <= rows; row += R) {
        Vector<W> sum[R][2];
        float line[kColumns<W>] = {};
        const bool whole = sums.columns == kColumns<W>;
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
            if (sums.add) {
                const float* from = sums.data + (row + r) * sums.stride;
                if (!whole) {
                    std::memcpy(line, from, sums.columns * sizeof(float));
                    from = line;
                }
                sum[r][0] = load_vector<W>(from);
                sum[r][1] = load_vector<W>(from + W);
            } else {
                sum[r][0] = sum[r][1] = splat<W>(0.0f);
            }
        }
        const float* factor = factors.data + (kAdjacent ? row : row * factors.stride);
        for (int t = 0; t < terms; ++t, factor += kAdjacent ? factors.stride : 1) {
            const Vector<W> a = load_vector<W>(packed + t * kColumns<W>);
            const Vector<W> b = load_vector<W>(packed + t * kColumns<W> + W);
            if constexpr (kAdjacent) {
                // A line of memory for every term, too far apart to be foreseen.
                __builtin_prefetch(factor + kAhead * factors.stride);
                __builtin_prefetch(factor + kAhead * factors.stride + R - 1);
            }
            MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
                const Vector<W> number = splat<W>(factor[kAdjacent ? r : r * factors.stride]);
                sum[r][0] = fused<W>(number, a, sum[r][0]);
                sum[r][1] = fused<W>(number, b, sum[r][1]);
            }
        }
        MIPNERF_UNROLL for (int r = 0; r < R; ++r) {
            float* const to = sums.data + (row + r) * sums.stride;
            if (sums.mask != nullptr) {
                const float* mask = sums.mask + (row + r) * sums.mask_stride;
                if (!whole) {
                    std::memcpy(line, mask, sums.columns * sizeof(float));
                    mask = line;
                }
                const Vector<W> zero = splat<W>(0.0f);
                MIPNERF_UNROLL for (int v = 0; v < 2; ++v) sum[r][v] =
                    load_vector<W>(mask + v * W) <= zero ? zero : sum[r][v];
            }
            if (whole) {
                store_vector<W>(to, sum[r][0]);
                store_vector<W>(to + W, sum[r][1]);
            } else {
                store_vector<W>(line, sum[r][0]);
                store_vector<W>(line + W, sum[r][1]);
                std::memcpy(to, line, sums.columns * sizeof(float));
            }
        }
    }
    if constexpr (R > 1)
        if (row < rows) add_products<W, fewer_sums(R), kAdjacent>(factors, packed, terms, sums, row, rows);
}

inline int parts_of(int64_t count, int64_t size) {
    return static_cast<int>((count + size - 1) / size);
}

// Tasks of four kinds, handed out in this order: the gradient of the weight, for some outputs and columns, of
// those that multiply x and of those beside; the delta below, for some samples and columns; the biases'.
struct WayDown {
    const Layer& layer;

    struct Counts {
        int parts, of_x, of_beside;  // of the outputs; blocks of columns
        int64_t below, biases;

        MIPNERF_INLINE int64_t weights() const { return int64_t{parts} * (of_x + of_beside); }
    };

    // With so many columns in a block.
    MIPNERF_INLINE Counts counts(int columns) const {
        const int of_x = parts_of(layer.x.columns, columns);
        return {parts_of(layer.delta.columns, layer.outputs_at_a_time), of_x,
                parts_of(layer.beside.columns, columns),
                layer.below == nullptr ? 0 : int64_t{of_x} * parts_of(layer.samples, kSamples),
                parts_of(layer.delta.columns, kBiases)};
    }

    int64_t tasks() const {
        const Counts all = counts(2 * vector_lanes());
        return all.weights() + all.below + all.biases;
    }

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t) const {
        const Counts all = counts(kColumns<W>);
        if (task < all.weights()) {
            const int block = static_cast<int>(task / all.parts), part = static_cast<int>(task % all.parts);
            return block < all.of_x ? grad_weight<W>(layer.x, block, part, 0)
                                    : grad_weight<W>(layer.beside, block - all.of_x, part, layer.x.columns);
        }
        task -= all.weights();
        if (task < all.below) return delta_below<W>(static_cast<int>(task % all.of_x), task / all.of_x);
        grad_bias<W>(static_cast<int>(task - all.below));
    }

    template <int W>
    MIPNERF_INLINE void grad_weight(Rows x, int block, int part, int columns_before) const {
        alignas(64) float packed[kTerms * kMostColumns];
        const int first = block * kColumns<W>, output = part * layer.outputs_at_a_time;
        const int outputs = std::min(layer.outputs_at_a_time, layer.delta.columns - output);
        Sums sums{layer.grad_weight + output * layer.grad_stride + columns_before + first,
                  layer.grad_stride,
                  std::min(kColumns<W>, x.columns - first),
                  layer.add,
                  nullptr,
                  0};
        // Once without samples too: the gradient is zero then.
        for (int64_t sample = 0; sample == 0 || sample < layer.samples; sample += kTerms) {
            const int terms = static_cast<int>(std::min<int64_t>(kTerms, layer.samples - sample));
            pack<W>(x, sample, terms, first, packed);
            const Factors<true> deltas{layer.delta.data + sample * layer.delta.stride + output,
                                       layer.delta.stride};
            add_products<W, kSumsAtATime<W>>(deltas, packed, terms, sums, 0, outputs);
            sums.add = true;
        }
    }

    template <int W>
    MIPNERF_INLINE void delta_below(int block, int64_t part) const {
        alignas(64) float packed[kTerms * kMostColumns];
        const int64_t sample = part * kSamples;
        const int samples = static_cast<int>(std::min<int64_t>(kSamples, layer.samples - sample));
        const int first = block * kColumns<W>, outputs = layer.delta.columns;
        Sums sums{layer.below + sample * layer.below_stride + first,
                  layer.below_stride,
                  std::min(kColumns<W>, layer.x.columns - first),
                  false,
                  nullptr,
                  layer.x.stride};
        for (int output = 0; output < outputs; output += kTerms) {
            const int terms = std::min(kTerms, outputs - output);
            pack<W>(layer.weight, output, terms, first, packed);
            if (output + terms == outputs) sums.mask = layer.x.data + sample * layer.x.stride + first;
            const Factors<false> deltas{layer.delta.data + sample * layer.delta.stride + output,
                                        layer.delta.stride};
            add_products<W, kSumsAtATime<W>>(deltas, packed, terms, sums, 0, samples);
            sums.add = true;
        }
    }

    // In parts of as many samples as the products', so that no sum has thousands of terms one after the
    // other.
    template <int W>
    MIPNERF_INLINE void grad_bias(int part) const {
        const int first = part * kBiases, columns = std::min(kBiases, layer.delta.columns - first);
        float total[kBiases] = {}, some[kBiases];
        if (layer.add) std::copy_n(layer.grad_bias + first, columns, total);
        for (int64_t sample = 0; sample < layer.samples; sample += kTerms) {
            const int64_t end = std::min(sample + kTerms, layer.samples);
            std::fill_n(some, kBiases, 0.0f);
            for (int64_t s = sample; s < end; ++s) {
                const float* const delta = layer.delta.data + s * layer.delta.stride + first;
                if (columns == kBiases) {
                    MIPNERF_UNROLL for (int c = 0; c < kBiases; c += W)
                        store_vector<W>(some + c, load_vector<W>(some + c) + load_vector<W>(delta + c));
                } else {
                    for (int c = 0; c < columns; ++c) some[c] += delta[c];
                }
            }
            for (int c = 0; c < columns; ++c) total[c] += some[c];
        }
        std::copy_n(total, columns, layer.grad_bias + first);
    }
};

// See csrc/library.cpp.
void mlp_layer_backward_cpu(Tensor delta, Tensor x, std::optional<Tensor> beside, Tensor weight,
                            std::optional<Tensor> below, Tensor grad_weight, Tensor grad_bias, bool add) {
    const Checker check{"mlp_layer_backward"};
    check.dims("delta", delta, 2, "[S, N]");
    check.dtype("delta", delta, {ScalarType::Float});
    const int64_t samples = delta.size(0), outputs = delta.size(1);
    const auto rows = [&](const char* name, const Tensor& tensor, const char* meaning) {
        check.dims(name, tensor, 2, meaning);
        check.same_dtype(name, tensor, "delta", delta);
        check.same_device(name, tensor, "delta", delta);
        check.that(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, "of rows without gaps",
                   tensor.stride(1));
        return Rows{static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0),
                    static_cast<int>(tensor.size(1))};
    };
    Layer layer{};
    layer.samples = samples;
    layer.delta = rows("delta", delta, "[S, N]");
    layer.x = rows("x", x, "[S, K]");
    const int64_t inputs = x.size(1);
    check.shape("x", x, {samples, inputs}, "[S, K]");
    int64_t columns = inputs;
    if (beside.has_value()) {
        layer.beside = rows("beside", *beside, "[S, F]");
        check.shape("beside", *beside, {samples, beside->size(1)}, "[S, F]");
        columns += beside->size(1);
    }
    layer.weight = rows("weight", weight, "[N, K]");
    check.shape("weight", weight, {outputs, inputs}, "[N, K]");
    if (below.has_value()) {
        layer.below_stride = rows("below", *below, "[S, K]").stride;
        check.shape("below", *below, {samples, inputs}, "[S, K]");
        layer.below = static_cast<float*>(below->mutable_data_ptr());
    }
    layer.grad_stride = rows("grad_weight", grad_weight, "[N, K + F]").stride;
    check.shape("grad_weight", grad_weight, {outputs, columns}, "[N, K + F]");
    layer.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
    check.same_dtype("grad_bias", grad_bias, "delta", delta);
    check.same_device("grad_bias", grad_bias, "delta", delta);
    check.shape("grad_bias", grad_bias, {outputs}, "[N]");
    check.that(outputs <= 1 || grad_bias.stride(0) == 1, "grad_bias", "without gaps", grad_bias.stride(0));
    layer.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
    layer.add = add;
    // Enough parts for every thread to find work to the end.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = parts_of(inputs, kMostColumns);
    const int64_t parts = std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, blocks));
    layer.outputs_at_a_time = static_cast<int>(std::max<int64_t>(24, parts_of(outputs, parts)));
    const WayDown body{layer};
    for_tasks(body.tasks(), body);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("mlp_layer_backward", TORCH_BOX(&mipnerf::mlp_layer_backward_cpu));
}
