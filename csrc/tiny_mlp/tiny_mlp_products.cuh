// The products of the two small networks on the device: 64 samples at a time by a block of 64 threads, in
// float32 or, with kTf32, on tensor cores: operands rounded to TF32 (10 fraction bits, float32's range),
// products and sums in float32. Compute capability 8.0 and higher has those.
//
// A tile lies in shared memory as rows, one feature of the 64 samples each, 72 floats apart. In a layer,
// thread (g, q) of warp w, g = lane / 4 and q = lane % 4, has outputs g, g + 8, ... of samples 32 w + 8 p + 2
// q and the next, p = 0 to 3, however they are computed: those are the registers of mma_m16n8k8_tf32's
// results.
//
//   float32  per input 4 loads of 8 bytes of its samples and up to 2 of 16 of its outputs' weights, 64 FMAs
//   TF32     fragments of 16 outputs, 8 inputs and 8 samples; per 8 inputs 8 loads of 4 bytes of samples and
//            up to 4 of 16 of weights, 16 products. In the weight gradients, whose sum is over samples, a
//            lane's two operands are neighbouring samples: the sum's order is free, and so they are one load.
//
// With rows 8 banks apart, all of these are free of conflicts. Weights are read through the first-level cache
// in the order of NetworkLayout. Hidden layers narrower than 64 are padded with zeros, which stay zero in
// every product.
//
// With kTf32 whatever a product reads from shared memory was stored through operand<kTf32>.
#pragma once

#include <type_traits>

#include "../common/tensor_core.cuh"
#include "tiny_mlp_launch.h"
#include "tiny_mlp_math.h"

namespace mipnerf {

constexpr int kRowStride = 72;

MIPNERF_HOST_DEVICE constexpr std::size_t tile_bytes(int rows) {
    return static_cast<std::size_t>(rows) * kRowStride * sizeof(float);
}

// A number as the products take it.
template <bool kTf32>
MIPNERF_DEVICE float operand(float x) {
    return kTf32 ? round_to_tf32(x) : x;
}

template <bool kTf32>
MIPNERF_DEVICE float packed_weight(const PackedMatrix& matrix, int element) {
    int k, o;
    if constexpr (kTf32) {
        const int register_index = element & 3, lane = element >> 2 & 31, fragment = element >> 7;
        const int fragments = fragment_rows(matrix.outputs);
        o = fragment % fragments * 16 + (register_index & 1) * 8 + lane / 4;
        k = fragment / fragments * 8 + (register_index >> 1) * 4 + lane % 4;
    } else {
        const int column = element % matrix.outputs, per_thread = matrix.outputs / 8;
        k = element / matrix.outputs;
        o = column / per_thread + 8 * (column % per_thread);
    }
    return o < matrix.rows && k < matrix.inputs
               ? operand<kTf32>(matrix.source[o * matrix.row_stride + k * matrix.input_stride])
               : 0.0f;
}

// The thread's first output.
MIPNERF_DEVICE int tile_x() {
    return lane_index() >> 2;
}
// The thread's sample j, 0 to 7, of the tile; with even j, the next is its neighbour.
MIPNERF_DEVICE int tile_sample(int j) {
    return 32 * warp_index() + 4 * (j & 6) + 2 * (lane_index() & 3) + (j & 1);
}

// The thread's samples in a row of the tile or of global memory.
MIPNERF_DEVICE Floats<8> load_samples(const float* row) {
    Floats<8> y;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const Pack<float, 2> pair = load_pack_written<2>(row + tile_sample(j));
        y.value[j] = pair.value[0], y.value[j + 1] = pair.value[1];
    }
    return y;
}
MIPNERF_DEVICE void store_samples(float* row, const Floats<8>& x) {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_pack(row + tile_sample(j), Pack<float, 2>{{x.value[j], x.value[j + 1]}});
}

// Output tile_x + 8 i of sample tile_sample(j).
template <int kOutputs>
struct TileSums {
    Floats<8> of[kOutputs / 8];
};

// ---- in float32 ---------------------------------------------------------------------------------

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

template <int kOutputs>
MIPNERF_DEVICE TileSums<kOutputs> layer_sums_float32(const float* weights, const float* x, int depth) {
    constexpr int R = kOutputs / 8;
    TileSums<kOutputs> sums{};
    weights += tile_x() * R;
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
        const Floats<8> sample = load_samples(x + k * kRowStride);
        const Floats<R> w = load_weights<kOutputs>(weights + k * kOutputs);
#pragma unroll
        for (int i = 0; i < R; ++i)
#pragma unroll
            for (int j = 0; j < 8; ++j) sums.of[i].value[j] += w.value[i] * sample.value[j];
    }
    return sums;
}

// The tile's share of a weight gradient for outputs y + 8 i and inputs first + tile_x + 8 j, y = 4 w + q.
template <int kI, int kJ>
MIPNERF_DEVICE_LARGE void add_outer_product_float32(const float* dy, const float* x, int rows, int depth,
                                                    int first, bool is_first, float* gradient) {
    float sum[kI][kJ] = {};
    const int y = 4 * warp_index() + (lane_index() & 3);
    dy += y * kRowStride;
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
            const int o = y + 8 * i, k = first + tile_x() + 8 * j;
            if (o >= rows || k >= depth) continue;
            float* const at = gradient + o * depth + k;
            *at = is_first ? sum[i][j] : *at + sum[i][j];
        }
}

template <int kI>
MIPNERF_DEVICE void add_weight_gradient_float32(const float* dy, const float* x, int rows, int depth,
                                                bool is_first, float* gradient) {
    int first = 0;
#pragma unroll 1
    for (; first + 24 < depth; first += 32)
        add_outer_product_float32<kI, 4>(dy, x, rows, depth, first, is_first, gradient);
#pragma unroll 1
    for (; first < depth; first += 8)
        add_outer_product_float32<kI, 1>(dy, x, rows, depth, first, is_first, gradient);
}

// ---- on tensor cores ----------------------------------------------------------------------------

template <int kOutputs>
MIPNERF_DEVICE TileSums<kOutputs> layer_sums_tf32(const float* weights, const float* x, int depth) {
    constexpr int kFragments = fragment_rows(kOutputs), kStep = 128 * kFragments;
    float d[kFragments][4][4] = {};
    weights += 4 * lane_index();
    x += (lane_index() & 3) * kRowStride + 32 * warp_index() + (lane_index() >> 2);
#pragma unroll 2
    for (int k = 0; k < depth; k += 8, weights += kStep, x += 8 * kRowStride) {
        float b[4][2];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j][0] = x[8 * j], b[j][1] = x[8 * j + 4 * kRowStride];
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            const Pack<float, 4> a = load_pack<4>(weights + 128 * i);
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_m16n8k8_tf32(d[i][j], a, b[j][0], b[j][1]);
        }
    }
    TileSums<kOutputs> sums;
#pragma unroll
    for (int i = 0; i < kOutputs / 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums.of[i].value[j] = d[i / 2][j / 2][i % 2 * 2 + j % 2];
    return sums;
}

// The tile's share of a weight gradient for 16 kI outputs, or the only 8 where kI is 0, and 8 kJ inputs; dy
// and x begin with the rows of the first, and so does `gradient`, of `rows` times `depth` that are there.
template <int kI, int kJ>
MIPNERF_DEVICE_LARGE void add_outer_product_tf32(const float* dy, const float* x, int rows, int depth,
                                                 int row_stride, bool is_first, float* gradient) {
    constexpr int kFragments = kI == 0 ? 1 : kI;
    const int g = lane_index() >> 2, q = lane_index() & 3;
    float d[kFragments][kJ][4] = {};
    dy += g * kRowStride + 2 * q;
    x += g * kRowStride + 2 * q;
#pragma unroll 2
    for (int n = 0; n < kTileSamples; n += 8) {
        Pack<float, 4> a[kFragments];
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            const Pack<float, 2> low = load_pack_written<2>(dy + 16 * i * kRowStride + n);
            Pack<float, 2> high{{0.0f, 0.0f}};
            if constexpr (kI != 0) high = load_pack_written<2>(dy + (16 * i + 8) * kRowStride + n);
            a[i] = {{low.value[0], high.value[0], low.value[1], high.value[1]}};
        }
#pragma unroll
        for (int j = 0; j < kJ; ++j) {
            const Pack<float, 2> b = load_pack_written<2>(x + 8 * j * kRowStride + n);
#pragma unroll
            for (int i = 0; i < kFragments; ++i) mma_m16n8k8_tf32(d[i][j], a[i], b.value[0], b.value[1]);
        }
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
#pragma unroll
        for (int j = 0; j < kJ; ++j)
#pragma unroll
            for (int h = 0; h < (kI == 0 ? 1 : 2); ++h) {
                const int o = 16 * i + 8 * h + g, k = 8 * j + 2 * q;
                if (o >= rows || k >= depth) continue;
                float* const at = gradient + o * row_stride + k;
                Pack<float, 2> sum{{d[i][j][2 * h], d[i][j][2 * h + 1]}};
                if (!is_first) {
                    const Pack<float, 2> before = load_pack_written<2>(at);
                    sum = {{before.value[0] + sum.value[0], before.value[1] + sum.value[1]}};
                }
                store_pack(at, sum);
            }
}

template <int kColumns>
using Columns = std::integral_constant<int, kColumns>;

// With 64 outputs a warp takes 32 of them and all inputs; else all outputs and half of the inputs. `depth` is
// a multiple of 4, the gradient aligned to 8 bytes.
template <int kI>
MIPNERF_DEVICE void add_weight_gradient_tf32(const float* dy, const float* x, int rows, int depth,
                                             bool is_first, float* gradient) {
    static_assert(kI == 1 || kI == 2 || kI == 8, "8, 16 or 64 outputs");
    constexpr int kRows = kI == 8 ? 2 : kI / 2;
    int next = 0, end = (depth + 7) / 8;
    if constexpr (kI == 8) {
        const int row = 32 * warp_index();
        dy += row * kRowStride, gradient += row * depth, rows -= row;
    } else {
        const int half = (end + 1) / 2;
        if (warp_index() == 0)
            end = half;
        else
            next = half;
    }
#pragma unroll 1
    while (next < end) {
        const int left = end - next;
        const auto add = [&](auto columns) {
            add_outer_product_tf32<kRows, decltype(columns)::value>(
                dy, x + 8 * next * kRowStride, rows, depth - 8 * next, depth, is_first, gradient + 8 * next);
            next += decltype(columns)::value;
        };
        if (kI == 8 && (left == 5 || left > 8))
            add(Columns<5>{});
        else if (left >= 4)
            add(Columns<4>{});
        else
            add(Columns<1>{});
    }
}

// ---- either -------------------------------------------------------------------------------------

// sum_k weights[k, o] x[k]; x are rows of shared memory that a barrier has published.
template <bool kTf32, int kOutputs>
MIPNERF_DEVICE_LARGE TileSums<kOutputs> layer_sums(const float* weights, const float* x, int depth) {
    if constexpr (kTf32)
        return layer_sums_tf32<kOutputs>(weights, x, depth);
    else
        return layer_sums_float32<kOutputs>(weights, x, depth);
}

// The tile's share of a weight gradient, sum over the samples of dy[o] x[k], added to `gradient` [rows,
// depth] (stored, where it is the first). Rows of dy: 8 kI, of x: depth rounded up to 8; the padding is zero.
template <bool kTf32, int kI>
MIPNERF_DEVICE_LARGE void add_weight_gradient(const float* dy, const float* x, int rows, int depth,
                                              bool is_first, float* gradient) {
    if constexpr (kTf32)
        add_weight_gradient_tf32<kI>(dy, x, rows, depth, is_first, gradient);
    else
        add_weight_gradient_float32<kI>(dy, x, rows, depth, is_first, gradient);
}

// What becomes of a layer's sums: as they are, operands of a further product, or those after a ReLU or its
// gradient.
enum class LayerEnd { kNone, kOperand, kRelu, kReluGradient };

// The sums to rows y; with kReluGradient the rows hold the outputs of the ReLU before, which the gradient
// replaces where it stands. Compared so that a NaN passes: swallowed here, it would leave the loss finite.
template <bool kTf32, LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE_LARGE void store_layer(const TileSums<kOutputs>& sums, float* y) {
#pragma unroll
    for (int i = 0; i < kOutputs / 8; ++i) {
        float* const row = y + (tile_x() + 8 * i) * kRowStride;
        Floats<8> value = sums.of[i];
        if constexpr (kEnd == LayerEnd::kRelu) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = value.value[j] < 0.0f ? 0.0f : value.value[j];
        }
        if constexpr (kEnd == LayerEnd::kReluGradient) {
            const Floats<8> gate = load_samples(row);
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = gate.value[j] <= 0.0f ? 0.0f : value.value[j];
        }
        if constexpr (kEnd != LayerEnd::kNone) {
#pragma unroll
            for (int j = 0; j < 8; ++j) value.value[j] = operand<kTf32>(value.value[j]);
        }
        store_samples(row, value);
    }
}

// A whole layer from rows x to rows y, which may overlap. Barriers: before the rows are written and after.
template <bool kTf32, LayerEnd kEnd, int kOutputs>
MIPNERF_DEVICE_LARGE void layer(const float* weights, const float* x, int depth, float* y) {
    const TileSums<kOutputs> sums = layer_sums<kTf32, kOutputs>(weights, x, depth);
    block_sync();
    store_layer<kTf32, kEnd>(sums, y);
    block_sync();
}

}  // namespace mipnerf
