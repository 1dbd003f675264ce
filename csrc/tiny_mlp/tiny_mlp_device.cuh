// The two small networks on the device: 64 samples at a time by a block of 64 threads.
//
// A tile lies in shared memory as rows, one feature of the 64 samples each, 68 floats apart (so that neighbouring
// rows start four banks apart). In a layer, thread (tx, ty) = (i % 8, i / 8) computes outputs tx, tx + 8, ... of
// samples 8 ty to 8 ty + 7: with 64 outputs, 64 sums from 2 + 2 loads of 16 bytes per input. Weights are read
// through the first-level cache in the order of NetworkLayout, where a thread's outputs lie side by side. Hidden
// layers narrower than 64 are padded with zeros, which stay zero in every product.
#pragma once

#include "../common/device.cuh"
#include "tiny_mlp_math.h"

namespace mipnerf {

constexpr int kTileSamples = 64;
constexpr int kTileThreads = 64;
constexpr int kRowStride = 68;
constexpr int kTileWidth = 64;  // widest hidden layer

MIPNERF_HOST_DEVICE constexpr std::size_t tile_bytes(int rows) {
    return static_cast<std::size_t>(rows) * kRowStride * sizeof(float);
}

// One matrix as the layers read it: [depth, outputs], output o at column (o % 8) (outputs / 8) + o / 8.
struct PackedMatrix {
    const float* source;
    int rows, inputs;               // of the weights that are there
    int row_stride, input_stride;   // in floats: exchanged for a transpose
    int depth, outputs;             // with padding; outputs 8, 16, 32 or 64
    int at;                         // in the packed array
};

MIPNERF_DEVICE float packed_weight(const PackedMatrix& matrix, int element) {
    const int k = element / matrix.outputs, column = element % matrix.outputs, per_thread = matrix.outputs / 8;
    const int o = column / per_thread + 8 * (column % per_thread);
    return o < matrix.rows && k < matrix.inputs
               ? matrix.source[o * matrix.row_stride + k * matrix.input_stride]
               : 0.0f;
}

MIPNERF_DEVICE int tile_x() {
    return static_cast<int>(threadIdx.x & 7);
}
MIPNERF_DEVICE int tile_y() {
    return static_cast<int>(threadIdx.x >> 3);
}

MIPNERF_DEVICE Floats<8> load_eight(const float* row) {
    const Pack<float, 4> low = load_pack_shared<4>(row), high = load_pack_shared<4>(row + 4);
    Floats<8> y;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y.value[i] = low.value[i];
        y.value[4 + i] = high.value[i];
    }
    return y;
}
MIPNERF_DEVICE void store_eight(float* row, const Floats<8>& x) {
    Pack<float, 4> low, high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        low.value[i] = x.value[i];
        high.value[i] = x.value[4 + i];
    }
    store_pack(row, low);
    store_pack(row + 4, high);
}

// Output tx + 8 i of samples 8 ty + j.
template <int kOutputs>
struct TileSums {
    Floats<8> of[kOutputs / 8];
};

template <int kOutputs>
MIPNERF_DEVICE Floats<kOutputs / 8> load_weights(const float* weights) {
    constexpr int R = kOutputs / 8, kPack = R < 4 ? R : 4;
    Floats<R> w;
#pragma unroll
    for (int first = 0; first < R; first += kPack) {
        const Pack<float, kPack> pack = load_pack<kPack>(weights + first);
#pragma unroll
        for (int i = 0; i < kPack; ++i) w.value[first + i] = pack.value[i];
    }
    return w;
}

// sum_k weights[k, o] x[k]; x are rows of shared memory that a barrier has published.
template <int kOutputs>
MIPNERF_DEVICE TileSums<kOutputs> layer_sums(const float* weights, const float* x, int depth) {
    constexpr int R = kOutputs / 8;
    TileSums<kOutputs> sums{};
    weights += tile_x() * R;
    x += 8 * tile_y();
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
        const Floats<8> sample = load_eight(x + k * kRowStride);
        const Floats<R> w = load_weights<kOutputs>(weights + k * kOutputs);
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sums.of[i].value[j] += w.value[i] * sample.value[j];
    }
    return sums;
}

enum class LayerEnd { kNone, kRelu, kReluGradient };

// The sums to rows y; with kReluGradient the rows hold the outputs of the ReLU before, which the gradient replaces
// where it stands. Compared so that a NaN passes: swallowed here, it would leave the loss finite.
template <LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE void store_layer(const TileSums<kOutputs>& sums, float* y) {
#pragma unroll
    for (int i = 0; i < kOutputs / 8; ++i) {
        float* const row = y + (tile_x() + 8 * i) * kRowStride + 8 * tile_y();
        Floats<8> value = sums.of[i];
        if constexpr (kEnd == LayerEnd::kRelu) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = value.value[j] < 0.0f ? 0.0f : value.value[j];
        }
        if constexpr (kEnd == LayerEnd::kReluGradient) {
            const Floats<8> gate = load_eight(row);
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = gate.value[j] <= 0.0f ? 0.0f : value.value[j];
        }
        store_eight(row, value);
    }
}

// A whole layer from rows x to rows y, which may overlap. Barriers: before the rows are written and after.
template <LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE void layer(const float* weights, const float* x, int depth, float* y) {
    const TileSums<kOutputs> sums = layer_sums<kOutputs>(weights, x, depth);
    block_sync();
    store_layer<kEnd>(sums, y);
    block_sync();
}

// The tile's share of a weight gradient, sum over the samples of dy[o] x[k], for outputs ty + 8 i and inputs
// first + tx + 8 j, added to `gradient` [rows, depth] (stored, where it is the first).
template <int kI, int kJ>
MIPNERF_DEVICE void add_outer_product(const float* dy, const float* x, int rows, int depth, int first,
                                      bool is_first, float* gradient) {
    float sum[kI][kJ] = {};
    dy += tile_y() * kRowStride;
    x += (first + tile_x()) * kRowStride;
#pragma unroll 1
    for (int n = 0; n < kTileSamples; n += 4) {
        Pack<float, 4> left[kI], right[kJ];
#pragma unroll
        for (int i = 0; i < kI; ++i) left[i] = load_pack_shared<4>(dy + 8 * i * kRowStride + n);
#pragma unroll
        for (int j = 0; j < kJ; ++j) right[j] = load_pack_shared<4>(x + 8 * j * kRowStride + n);
#pragma unroll
        for (int i = 0; i < kI; ++i)
#pragma unroll
            for (int j = 0; j < kJ; ++j)
#pragma unroll
                for (int m = 0; m < 4; ++m) sum[i][j] += left[i].value[m] * right[j].value[m];
    }
#pragma unroll
    for (int i = 0; i < kI; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const int o = tile_y() + 8 * i, k = first + tile_x() + 8 * j;
            if (o >= rows || k >= depth) continue;
            float* const at = gradient + o * depth + k;
            *at = is_first ? sum[i][j] : *at + sum[i][j];
        }
}

// Rows of dy: 8 kI, of x: depth rounded up to 8; the padding is zero.
template <int kI>
MIPNERF_DEVICE void add_weight_gradient(const float* dy, const float* x, int rows, int depth, bool is_first,
                                        float* gradient) {
    int first = 0;
#pragma unroll 1
    for (; first + 24 < depth; first += 32)
        add_outer_product<kI, 4>(dy, x, rows, depth, first, is_first, gradient);
#pragma unroll 1
    for (; first < depth; first += 8)
        add_outer_product<kI, 1>(dy, x, rows, depth, first, is_first, gradient);
}

}  // namespace mipnerf
