// Dense layers over tiles of samples on the CPU: every row of a tile is one feature of kTile samples, so that
// a vector holds one feature of W samples and a weight is broadcast. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/vector_tasks.h"

namespace mipnerf {

constexpr int kTile = 128;

// Rows of a layer that share the loads of an input, by the number of registers there are.
template <int W>
constexpr int kRowBlock = W == 16 ? 8 : 4;

// That of the width which run-time dispatch chooses: see vector_tasks.h.
inline int dispatched_row_block() {
    return vector_unit() == VectorUnit::kAvx512 ? kRowBlock<16> : kRowBlock<8>;
}

// Columns are computed in pairs of vectors.
template <int W>
MIPNERF_INLINE int padded_columns(int count) {
    return (count + 2 * W - 1) / (2 * W) * (2 * W);
}

// The weights [rows, depth] (or their transpose) in blocks of `block` rows, depth-major within a block, rows
// padded with zeros: what dense_tile reads from front to back.
inline int packed_rows(int rows) {
    return (rows + 7) / 8 * 8;
}
inline void pack_weights(const float* weights, int rows, int depth, int row_stride, int depth_stride,
                         int block, float* packed) {
    for (int first = 0; first < packed_rows(rows); first += block)
        for (int k = 0; k < depth; ++k)
            for (int i = 0; i < block; ++i) {
                const int row = first + i;
                *packed++ = row < rows ? weights[row * row_stride + k * depth_stride] : 0.0f;
            }
}

enum class Epilogue { kNone, kRelu, kReluGradient };

// y[o] = sum_k weights[o, k] x[k] over `columns` samples, `rows` (a multiple of 4) of them; then ReLU, or the
// gradient of a ReLU whose output was `gate`.
template <int W, Epilogue kEpilogue>
MIPNERF_INLINE void dense_tile(const float* packed, int rows, int depth, const float* x, float* y,
                               int columns, const float* gate = nullptr) {
    constexpr int R = kRowBlock<W>;
    for (int n = 0; n < columns; n += 2 * W) {
        const float* weight = packed;
        for (int row = 0; row < rows; row += R) {
            Vector<W> sum[R][2];
            MIPNERF_UNROLL for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = splat<W>(0.0f);
            for (int k = 0; k < depth; ++k) {
                const Vector<W> x0 = load_vector<W>(x + k * kTile + n);
                const Vector<W> x1 = load_vector<W>(x + k * kTile + n + W);
                MIPNERF_UNROLL for (int i = 0; i < R; ++i) {
                    const Vector<W> w = splat<W>(weight[i]);
                    sum[i][0] = fused<W>(w, x0, sum[i][0]);
                    sum[i][1] = fused<W>(w, x1, sum[i][1]);
                }
                weight += R;
            }
            MIPNERF_UNROLL for (int i = 0; i < R; ++i) {
                if (row + i >= rows) break;
                MIPNERF_UNROLL for (int j = 0; j < 2; ++j) {
                    Vector<W> value = sum[i][j];
                    const int at = (row + i) * kTile + n + j * W;
                    const Vector<W> zero = splat<W>(0.0f);
                    // Compared so that a NaN passes: swallowed here, it would leave the loss finite.
                    if constexpr (kEpilogue == Epilogue::kRelu) value = value < zero ? zero : value;
                    if constexpr (kEpilogue == Epilogue::kReluGradient)
                        value = load_vector<W>(gate + at) <= zero ? zero : value;
                    store_vector<W>(y + at, value);
                }
            }
        }
    }
}

// One tile's share of a weight gradient: dy and x point to rows of kTile, columns is padded and the padding
// of dy is zero.
struct TilePair {
    const float* dy;
    const float* x;
    int columns;
};

// gradient[o, k] += sum over all tiles and samples of dy[o] x[k]; rows and depth are multiples of 4, rows
// from `kept` on are dropped.
template <int W>
MIPNERF_INLINE void weight_gradient(const TilePair* tiles, int64_t count, int rows, int kept, int depth,
                                    float* gradient) {
    for (int row = 0; row < rows; row += 4)
        for (int k = 0; k < depth; k += 4) {
            Vector<W> sum[4][4];
            MIPNERF_UNROLL for (int i = 0; i < 4; ++i) MIPNERF_UNROLL for (int j = 0; j < 4; ++j) sum[i][j] =
                splat<W>(0.0f);
            for (int64_t t = 0; t < count; ++t) {
                const float* dy = tiles[t].dy + row * kTile;
                const float* x = tiles[t].x + k * kTile;
                for (int n = 0; n < tiles[t].columns; n += W) {
                    Vector<W> y[4];
                    MIPNERF_UNROLL for (int i = 0; i < 4; ++i) y[i] = load_vector<W>(dy + i * kTile + n);
                    MIPNERF_UNROLL for (int j = 0; j < 4; ++j) {
                        const Vector<W> v = load_vector<W>(x + j * kTile + n);
                        MIPNERF_UNROLL for (int i = 0; i < 4; ++i) sum[i][j] = fused<W>(y[i], v, sum[i][j]);
                    }
                }
            }
            MIPNERF_UNROLL for (int i = 0; i < 4; ++i) {
                if (row + i >= kept) break;
                MIPNERF_UNROLL for (int j = 0; j < 4; ++j) gradient[(row + i) * depth + k + j] +=
                    sum_lanes<W>(sum[i][j]);
            }
        }
}

}  // namespace mipnerf
