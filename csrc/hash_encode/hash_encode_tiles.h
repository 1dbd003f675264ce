// The hash encoding over tiles of samples on the CPU: indices and weights of the corners are vectorised over
// samples, the gathers and scatters move the F features of an entry as one vector, to and from a row of
// features for every sample. No torch.
#pragma once

#include <cstdint>

#include "../common/vector_tasks.h"
#include "../tiny_mlp/tiny_mlp_rows.h"
#include "hash_encode_math.h"

namespace mipnerf {

constexpr int kTile = 128;

// Where the samples of a tile are, in the unit box, and how wide.
struct TilePlaces {
    const float *x, *y, *z, *scale;

    MIPNERF_INLINE TilePlaces from(int64_t sample) const {
        return {x + sample, y + sample, z + sample, scale + sample};
    }
};

struct CornerTile {
    alignas(64) uint32_t index[8][kTile];
    alignas(64) float weight[8][kTile];
};

// a[n] of one level for n < columns; whether any is not zero.
MIPNERF_INLINE bool attenuate_tile(const EncodeOptions& options, int32_t resolution, const float* scale,
                                   float* a, int columns) {
    const float n = static_cast<float>(resolution);
    if (options.attenuation == Attenuation::kGaussian) {
#pragma omp simd
        for (int i = 0; i < columns; ++i)
            a[i] = attenuation(Attenuation::kGaussian, scale[i], n, options.cutoff);
    } else if (options.attenuation == Attenuation::kErf) {
        for (int i = 0; i < columns; ++i) a[i] = attenuation(Attenuation::kErf, scale[i], n, options.cutoff);
    } else {
        for (int i = 0; i < columns; ++i) a[i] = 1.0f;
        return columns > 0;
    }
    float largest = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < columns; ++i) largest = a[i] > largest ? a[i] : largest;
    return largest > 0.0f;
}

template <bool kDense>
MIPNERF_INLINE void corners_of_tile(const HashLevel& level, const TilePlaces& places, const float* a,
                                    int columns, CornerTile& corners) {
    const int32_t n = level.resolution, highest = n - 1;
    const float scale = static_cast<float>(n);
    const uint32_t m = static_cast<uint32_t>(n) + 1u, offset = level.offset, mask = level.mask;
    const float *px = places.x, *py = places.y, *pz = places.z;
    uint32_t (*const index)[kTile] = corners.index;
    float (*const weight)[kTile] = corners.weight;
#pragma omp simd
    for (int i = 0; i < columns; ++i) {
        const float x = px[i] * scale, y = py[i] * scale, z = pz[i] * scale;
        int32_t cx = static_cast<int32_t>(x), cy = static_cast<int32_t>(y), cz = static_cast<int32_t>(z);
        cx = cx < highest ? cx : highest;
        cy = cy < highest ? cy : highest;
        cz = cz < highest ? cz : highest;
        const float fx = x - static_cast<float>(cx), fy = y - static_cast<float>(cy),
                    fz = z - static_cast<float>(cz);
        const float gx = 1.0f - fx, gy = 1.0f - fy, hz = fz * a[i], gz = (1.0f - fz) * a[i];
        const float yz00 = gy * gz, yz10 = fy * gz, yz01 = gy * hz, yz11 = fy * hz;
        weight[0][i] = gx * yz00;
        weight[1][i] = fx * yz00;
        weight[2][i] = gx * yz10;
        weight[3][i] = fx * yz10;
        weight[4][i] = gx * yz01;
        weight[5][i] = fx * yz01;
        weight[6][i] = gx * yz11;
        weight[7][i] = fx * yz11;
        const uint32_t ux = static_cast<uint32_t>(cx), uy = static_cast<uint32_t>(cy),
                       uz = static_cast<uint32_t>(cz);
        if constexpr (kDense) {
            const uint32_t first = offset + ux + m * (uy + m * uz);
            index[0][i] = first;
            index[1][i] = first + 1u;
            index[2][i] = first + m;
            index[3][i] = first + m + 1u;
            index[4][i] = first + m * m;
            index[5][i] = first + m * m + 1u;
            index[6][i] = first + m * m + m;
            index[7][i] = first + m * m + m + 1u;
        } else {
            const uint32_t y0 = uy * kHashY, y1 = y0 + kHashY, z0 = uz * kHashZ, z1 = z0 + kHashZ;
            index[0][i] = offset + ((ux ^ y0 ^ z0) & mask);
            index[1][i] = offset + (((ux + 1u) ^ y0 ^ z0) & mask);
            index[2][i] = offset + ((ux ^ y1 ^ z0) & mask);
            index[3][i] = offset + (((ux + 1u) ^ y1 ^ z0) & mask);
            index[4][i] = offset + ((ux ^ y0 ^ z1) & mask);
            index[5][i] = offset + (((ux + 1u) ^ y0 ^ z1) & mask);
            index[6][i] = offset + ((ux ^ y1 ^ z1) & mask);
            index[7][i] = offset + (((ux + 1u) ^ y1 ^ z1) & mask);
        }
    }
}

// Indices and attenuated weights of the corners.
MIPNERF_INLINE void corners_of_tile(const HashLevel& level, const TilePlaces& places, const float* a,
                                    int columns, CornerTile& corners) {
    if (level.is_dense)
        corners_of_tile<true>(level, places, a, columns, corners);
    else
        corners_of_tile<false>(level, places, a, columns, corners);
}

// How many samples ahead the entries are asked for: about the latency of the second-level cache.
constexpr int kPrefetchAhead = 6;

template <int F>
MIPNERF_INLINE void prefetch_corners(const float* table, const CornerTile& corners, int i) {
    MIPNERF_UNROLL for (int c = 0; c < 8; ++c)
        __builtin_prefetch(table + static_cast<int64_t>(F) * corners.index[c][i]);
}

// Features of `columns` samples, at most kTile: levels * F, then 1, q, 0.3 q^2 and zeros to the end of the
// row.
template <int F>
MIPNERF_INLINE void encode_tile(const HashGrid& grid, const EncodeOptions& options, const float* table,
                                const TilePlaces& places, int columns, Rows features) {
    CornerTile corners;
    alignas(64) float a[kTile];
    for (int l = 0; l < grid.levels; ++l) {
        const HashLevel& level = grid.level[l];
        const bool any = attenuate_tile(options, level.resolution, places.scale, a, columns);
        if (any) corners_of_tile(level, places, a, columns, corners);
        for (int i = 0; i < columns; ++i) {
            Vector<F> even = splat<F>(0.0f), odd = even;
            if (any && i + kPrefetchAhead < columns) prefetch_corners<F>(table, corners, i + kPrefetchAhead);
            if (any && a[i] > 0.0f) {
                MIPNERF_UNROLL for (int c = 0; c < 8; c += 2) {
                    const float* first = table + static_cast<int64_t>(F) * corners.index[c][i];
                    const float* second = table + static_cast<int64_t>(F) * corners.index[c + 1][i];
                    even += splat<F>(corners.weight[c][i]) * load_vector<F>(first);
                    odd += splat<F>(corners.weight[c + 1][i]) * load_vector<F>(second);
                }
            }
            store_vector<F>(features[i] + l * F, even + odd);
        }
    }
    for (int i = 0; i < columns; ++i) {
        const ScaleInputs<float> inputs =
            scale_inputs(places.scale[i], options.scale_input, options.scale_low, options.scale_high);
        float* const extra = features[i] + grid.levels * F;
        extra[0] = inputs.one;
        extra[1] = inputs.q;
        extra[2] = inputs.q2;
        for (int64_t k = grid.levels * F + 3; k < features.stride; ++k) features[i][k] = 0.0f;
    }
}

// Where the gradients of entries go: of those with first <= index < last, or of `all`. `data` begins with
// that of the entry `origin`.
template <int F>
struct TableGradient {
    float* data;
    uint32_t origin, first, last;
    bool all;

    MIPNERF_INLINE bool has(uint32_t index) const { return all || (index >= first && index < last); }
    MIPNERF_INLINE float* at(uint32_t index) const {
        return data + static_cast<int64_t>(F) * (index - origin);
    }
};

// Adds a tile's gradients of one level, the F features that begin at a row.
template <int F>
MIPNERF_INLINE void scatter_tile(const HashLevel& level, const EncodeOptions& options,
                                 const TilePlaces& places, ConstRows grad_features, int columns,
                                 const TableGradient<F>& to) {
    CornerTile corners;
    alignas(64) float a[kTile];
    if (!attenuate_tile(options, level.resolution, places.scale, a, columns)) return;
    corners_of_tile(level, places, a, columns, corners);
    for (int i = 0; i < columns; ++i) {
        if (const int ahead = i + kPrefetchAhead; ahead < columns) {
            MIPNERF_UNROLL for (int c = 0; c < 8; ++c) if (to.has(corners.index[c][ahead]))
                __builtin_prefetch(to.at(corners.index[c][ahead]), 1);
        }
        if (!(a[i] > 0.0f)) continue;
        const Vector<F> gradient = load_vector<F>(grad_features[i]);
        for (int c = 0; c < 8; ++c) {
            const uint32_t index = corners.index[c][i];
            if (!to.has(index)) continue;
            float* const entry = to.at(index);
            store_vector<F>(entry, load_vector<F>(entry) + splat<F>(corners.weight[c][i]) * gradient);
        }
    }
}

}  // namespace mipnerf
