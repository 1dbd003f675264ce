// Dense layers over samples on the CPU: a sample's features lie one after the other in its row, a vector
// holds W outputs of one sample, and an input is broadcast. Rows may be picked by an index, so that the
// samples that count need not be copied together. No torch.
//
// Outputs come in blocks of 16: rows of outputs have room for whole blocks, and what lies behind a layer's
// last output is zero (its weights are).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/vector_tasks.h"

namespace mipnerf {

constexpr int kOutputBlock = 16;

inline constexpr int padded_outputs(int outputs) {
    return (outputs + kOutputBlock - 1) / kOutputBlock * kOutputBlock;
}

// Rows of floats, one a sample: the s-th is that of sample pick[s], or of s without a pick.
template <typename T>
struct RowsOf {
    T* data;
    int64_t stride;
    const int32_t* pick = nullptr;

    MIPNERF_INLINE T* operator[](int64_t s) const { return data + stride * (pick == nullptr ? s : pick[s]); }
    operator RowsOf<const T>() const { return {data, stride, pick}; }
};
using Rows = RowsOf<float>;
using ConstRows = RowsOf<const float>;
constexpr ConstRows kNoRows{nullptr, 0};

// A layer's weights as dense_rows reads them from front to back: [blocks of 16 outputs, depth, 16].
struct PackedLayer {
    const float* data;
    int outputs, depth;
    int64_t block_stride;

    PackedLayer of_inputs(int first, int count) const {
        return {data + first * kOutputBlock, outputs, count, block_stride};
    }
    PackedLayer of_first_outputs(int count) const { return {data, count, depth, block_stride}; }
};

inline void pack_weights(const float* weights, int outputs, int depth, int output_stride, int depth_stride,
                         float* packed) {
    for (int first = 0; first < outputs; first += kOutputBlock)
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < kOutputBlock; ++i) {
                const int output = first + i;
                *packed++ = output < outputs ? weights[output * output_stride + k * depth_stride] : 0.0f;
            }
}

enum class Epilogue { kNone, kRelu, kReluGradient };

// By the number of registers there are: samples that share a load of the weights, and vectors of outputs that
// share a broadcast input.
template <int W>
constexpr int kSamplesAtATime = W == 4 ? 3 : 6;
template <int W>
constexpr int kVectorsAtATime = W == 16 ? 2 : kOutputBlock / W;

// The outputs from `first` on, V vectors of them, of the samples s to s + count.
template <int W, int V, Epilogue kEpilogue>
MIPNERF_INLINE void dense_block(const PackedLayer& layer, int first, const float* const* x, ConstRows bias,
                                ConstRows gate, Rows y, int s, int count) {
    constexpr int R = kSamplesAtATime<W>;
    const float* weight = layer.data + first / kOutputBlock * layer.block_stride;
    Vector<W> sum[R][V];
    if (bias.data == nullptr) {
        MIPNERF_UNROLL for (int i = 0; i < R; ++i) MIPNERF_UNROLL for (int v = 0; v < V; ++v) sum[i][v] =
            splat<W>(0.0f);
    } else {
        MIPNERF_UNROLL for (int i = 0; i < R; ++i) {
            const float* from = bias[s + std::min(i, count - 1)] + first;
            MIPNERF_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = load_vector<W>(from + v * W);
        }
    }
    for (int k = 0; k < layer.depth; ++k) {
        Vector<W> w[V];
        MIPNERF_UNROLL for (int v = 0; v < V; ++v) w[v] = load_vector<W>(
            weight + v * W / kOutputBlock * layer.block_stride + k * kOutputBlock + v * W % kOutputBlock);
        MIPNERF_UNROLL for (int i = 0; i < R; ++i) {
            const Vector<W> input = splat<W>(x[i][k]);
            MIPNERF_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = fused<W>(input, w[v], sum[i][v]);
        }
    }
    MIPNERF_UNROLL for (int i = 0; i < R; ++i) {
        if (i >= count) break;
        float* const to = y[s + i] + first;
        MIPNERF_UNROLL for (int v = 0; v < V; ++v) {
            Vector<W> value = sum[i][v];
            const Vector<W> zero = splat<W>(0.0f);
            // Compared so that a NaN passes: swallowed here, it would leave the loss finite.
            if constexpr (kEpilogue == Epilogue::kRelu) value = value < zero ? zero : value;
            if constexpr (kEpilogue == Epilogue::kReluGradient)
                value = load_vector<W>(gate[s + i] + first + v * W) <= zero ? zero : value;
            store_vector<W>(to + v * W, value);
        }
    }
}

// y[s][o] = bias[s][o] + sum_k weights[o, k] x[s][k]; then ReLU, or the gradient of a ReLU whose output was
// gate[s][o].
template <int W, Epilogue kEpilogue>
MIPNERF_INLINE void dense_rows(const PackedLayer& layer, ConstRows x, Rows y, int samples,
                               ConstRows bias = kNoRows, ConstRows gate = kNoRows) {
    constexpr int R = kSamplesAtATime<W>, V = kVectorsAtATime<W>;
    const int outputs = padded_outputs(layer.outputs);
    for (int s = 0; s < samples; s += R) {
        const int count = std::min(R, samples - s);
        const float* from[R];
        MIPNERF_UNROLL for (int i = 0; i < R; ++i) from[i] = x[s + std::min(i, count - 1)];
        int first = 0;
        for (; first + V * W <= outputs; first += V * W)
            dense_block<W, V, kEpilogue>(layer, first, from, bias, gate, y, s, count);
        if constexpr (V * W > kOutputBlock)
            if (first < outputs)
                dense_block<W, kOutputBlock / W, kEpilogue>(layer, first, from, bias, gate, y, s, count);
    }
}

// Adds to gradient[k + j, first + ...] for K inputs and V vectors of outputs.
template <int W, int V, int K>
MIPNERF_INLINE void weight_gradient_block(ConstRows dy, int first, ConstRows x, int k, int samples,
                                          float* gradient, int64_t stride) {
    Vector<W> sum[K][V];
    MIPNERF_UNROLL for (int j = 0; j < K; ++j) MIPNERF_UNROLL for (int v = 0; v < V; ++v) sum[j][v] =
        load_vector<W>(gradient + (k + j) * stride + first + v * W);
    for (int s = 0; s < samples; ++s) {
        const float* const from = x[s] + k;
        Vector<W> y[V];
        MIPNERF_UNROLL for (int v = 0; v < V; ++v) y[v] = load_vector<W>(dy[s] + first + v * W);
        MIPNERF_UNROLL for (int j = 0; j < K; ++j) {
            const Vector<W> input = splat<W>(from[j]);
            MIPNERF_UNROLL for (int v = 0; v < V; ++v) sum[j][v] = fused<W>(input, y[v], sum[j][v]);
        }
    }
    MIPNERF_UNROLL for (int j = 0; j < K; ++j) MIPNERF_UNROLL for (int v = 0; v < V; ++v)
        store_vector<W>(gradient + (k + j) * stride + first + v * W, sum[j][v]);
}

template <int W, int V>
MIPNERF_INLINE void weight_gradient_outputs(ConstRows dy, int first, ConstRows x, int inputs, int samples,
                                            float* gradient, int64_t stride) {
    // As many inputs at a time as there are registers for their sums.
    constexpr int K = W == 4 ? 2 : 6;
    int k = 0;
    for (; k + K <= inputs; k += K)
        weight_gradient_block<W, V, K>(dy, first, x, k, samples, gradient, stride);
    if constexpr (K > 2)
        for (; k < inputs; k += 2) weight_gradient_block<W, V, 2>(dy, first, x, k, samples, gradient, stride);
}

// gradient[k, o] += sum_s x[s][k] dy[s][o]: inputs (an even number) x padded outputs.
template <int W>
MIPNERF_INLINE void weight_gradient(ConstRows dy, int outputs, ConstRows x, int inputs, int samples,
                                    float* gradient) {
    constexpr int V = kVectorsAtATime<W>;
    const int padded = padded_outputs(outputs);
    int first = 0;
    for (; first + V * W <= padded; first += V * W)
        weight_gradient_outputs<W, V>(dy, first, x, inputs, samples, gradient, padded);
    if constexpr (V * W > kOutputBlock)
        if (first < padded)
            weight_gradient_outputs<W, kOutputBlock / W>(dy, first, x, inputs, samples, gradient, padded);
}

// ---- the last layer: three outputs, its weights [3, padded hidden], rows of outputs four wide

template <int W>
MIPNERF_INLINE void three_outputs(const float* weights, ConstRows x, int hidden, Rows y, int samples) {
    const int padded = padded_outputs(hidden);
    for (int s = 0; s < samples; ++s) {
        const float* const from = x[s];
        Vector<W> sum[3][2];
        MIPNERF_UNROLL for (int c = 0; c < 3; ++c) sum[c][0] = sum[c][1] = splat<W>(0.0f);
        int k = 0;
        for (; k + 2 * W <= padded; k += 2 * W) MIPNERF_UNROLL for (int half = 0; half < 2; ++half) {
                const Vector<W> input = load_vector<W>(from + k + half * W);
                MIPNERF_UNROLL for (int c = 0; c < 3; ++c) sum[c][half] =
                    fused<W>(load_vector<W>(weights + c * padded + k + half * W), input, sum[c][half]);
            }
        if (k < padded)  // 16 wide vectors, an odd number of blocks
            MIPNERF_UNROLL for (int c = 0; c < 3; ++c) sum[c][0] =
                fused<W>(load_vector<W>(weights + c * padded + k), load_vector<W>(from + k), sum[c][0]);
        MIPNERF_UNROLL for (int c = 0; c < 3; ++c) y[s][c] = sum_lanes<W>(sum[c][0] + sum[c][1]);
    }
}

// Of its inputs, behind the ReLU whose outputs they are, and of its weights: gradient [3, padded hidden]
// grows.
template <int W>
MIPNERF_INLINE void three_outputs_backward(const float* weights, ConstRows dy, ConstRows x, int hidden,
                                           Rows dx, int samples, float* gradient) {
    const int padded = padded_outputs(hidden);
    for (int k = 0; k < padded; k += W) {
        Vector<W> weight[3], sum[3];
        MIPNERF_UNROLL for (int c = 0; c < 3; ++c) {
            weight[c] = load_vector<W>(weights + c * padded + k);
            sum[c] = load_vector<W>(gradient + c * padded + k);
        }
        for (int s = 0; s < samples; ++s) {
            const float* const given = dy[s];
            const Vector<W> input = load_vector<W>(x[s] + k), zero = splat<W>(0.0f);
            Vector<W> value = zero;
            MIPNERF_UNROLL for (int c = 0; c < 3; ++c) {
                const Vector<W> g = splat<W>(given[c]);
                value = fused<W>(g, weight[c], value);
                sum[c] = fused<W>(g, input, sum[c]);
            }
            store_vector<W>(dx[s] + k, input <= zero ? zero : value);
        }
        MIPNERF_UNROLL for (int c = 0; c < 3; ++c) store_vector<W>(gradient + c * padded + k, sum[c]);
    }
}

// to[row of the pick] += from[s], whole rows.
template <int W>
MIPNERF_INLINE void add_rows(ConstRows from, Rows to, int width, int samples) {
    for (int s = 0; s < samples; ++s) {
        const float* const source = from[s];
        float* const sum = to[s];
        for (int k = 0; k < width; k += W)
            store_vector<W>(sum + k, load_vector<W>(sum + k) + load_vector<W>(source + k));
    }
}

}  // namespace mipnerf
