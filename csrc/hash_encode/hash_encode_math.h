// The scale-aware hash encoding of one point, level by level: host and device, value and derivative. No
// torch, no CUDA header.
//
//   level l:  y = x n_l,  corner c of the cell floor(y), weight prod(1 - |y - c|) over the three axes
//   index     c_x + m (c_y + m c_z), m = n_l + 1, where all m^3 vertices fit into the table; else the hash
//             (c_x ^ 2654435761 c_y ^ 805459861 c_z) mod table size (Mueller et al. 2022, equation 4)
//   feature   a_l(s) sum over corners of weight x table[offset_l + index]
//   a_l(s)    exp(-2 s^2 n_l^2): what a Gaussian of standard deviation s (in units of the box's side) leaves
//   of
//             the level's features, as exp(-variance / 2) does of a frequency in IPE (mip-NeRF, equation 14);
//             or erf(1 / (sqrt(8) s n_l)); or 1. Below `cutoff` the level is skipped: feature and gradients
//             0.
#pragma once

#include <cstdint>

#include "../common/portable_math.h"

namespace mipnerf {

// By the numbers that the operators take.
enum class Attenuation : int32_t { kNone = 0, kGaussian = 1, kErf = 2 };

struct EncodeOptions {
    Attenuation attenuation;
    float cutoff;
    bool scale_input;
    float scale_low, scale_high;
};

constexpr int kMaxLevels = 16;

struct HashLevel {
    int32_t resolution;  // n_l
    uint32_t offset;     // of the first entry in the table of all levels
    uint32_t mask;       // table size - 1, of a hashed level
    bool is_dense;
};

struct HashGrid {
    int32_t levels;
    int64_t entries;  // of all levels
    HashLevel level[kMaxLevels];
};

// Dense levels take (n + 1)^3 entries rounded up to 8, hashed ones the whole table size (a power of two).
inline HashGrid hash_grid(const int64_t* resolutions, int levels, int64_t table_size) {
    HashGrid grid{};
    grid.levels = levels;
    for (int l = 0; l < levels; ++l) {
        const int64_t vertices = resolutions[l] + 1;
        const int64_t count = vertices * vertices * vertices;
        const bool is_dense = count <= table_size;
        grid.level[l] = {static_cast<int32_t>(resolutions[l]), static_cast<uint32_t>(grid.entries),
                         static_cast<uint32_t>(table_size - 1), is_dense};
        grid.entries += is_dense ? (count + 7) / 8 * 8 : table_size;
    }
    return grid;
}

// The entry behind a level's last.
MIPNERF_HOST_DEVICE int64_t level_end(const HashGrid& grid, int level) {
    return level + 1 < grid.levels ? static_cast<int64_t>(grid.level[level + 1].offset) : grid.entries;
}

// ---- attenuation

// erf(x) for x >= 0, absolute error 1.5e-7 (Abramowitz and Stegun 7.1.26).
MIPNERF_HOST_DEVICE float erf_nonnegative(float x) {
    const float t = 1.0f / fma_rn(0.3275911f, x, 1.0f);
    float p = 1.061405429f;
    p = fma_rn(p, t, -1.453152027f);
    p = fma_rn(p, t, 1.421413741f);
    p = fma_rn(p, t, -0.284496736f);
    p = fma_rn(p, t, 0.254829592f);
    return 1.0f - p * t * exp_nonpositive(-x * x);
}
MIPNERF_HOST_DEVICE double erf_nonnegative(double x) {
    return erf(x);
}

template <typename T>
MIPNERF_HOST_DEVICE T attenuation(Attenuation kind, T scale, T resolution, T cutoff) {
    const T x = scale * resolution;
    T a = T(1);
    if (kind == Attenuation::kGaussian) a = exp_nonpositive(T(-2) * x * x);
    if (kind == Attenuation::kErf) a = x > T(1e-6) ? erf_nonnegative(T(0.35355339059327376) / x) : T(1);
    return a < cutoff ? T(0) : a;
}

// d a / d s, given a.
template <typename T>
MIPNERF_HOST_DEVICE T attenuation_derivative(Attenuation kind, T scale, T resolution, T a) {
    const T x = scale * resolution;
    if (kind == Attenuation::kGaussian) return T(-4) * x * resolution * a;
    if (kind == Attenuation::kErf && a > T(0) && x > T(1e-6)) {
        const T z = T(0.35355339059327376) / x;
        // d erf(z) / dz = 2 / sqrt(pi) exp(-z^2), dz / ds = -z / s
        return T(-1.1283791670955126) * exp_nonpositive(-z * z) * z / scale;
    }
    return T(0);
}

// ---- the cell of a point

template <typename T>
struct Cell {
    int32_t corner[3];  // of the lowest corner
    T fraction[3];
};

// x in [0, 1]; a point on the upper face belongs to the last cell. One outside, or that is no number, gets a
// cell of the grid all the same: its fractions say so, and no entry beside the table is read.
template <typename T>
MIPNERF_HOST_DEVICE Cell<T> cell_of(T x, T y, T z, int32_t resolution) {
    const T n = static_cast<T>(resolution);
    const T scaled[3] = {x * n, y * n, z * n};
    Cell<T> cell;
    for (int k = 0; k < 3; ++k) {
        const int32_t floor = static_cast<int32_t>(scaled[k]);
        const int32_t inside = floor < resolution ? floor : resolution - 1;
        cell.corner[k] = inside < 0 ? 0 : inside;
        cell.fraction[k] = scaled[k] - static_cast<T>(cell.corner[k]);
    }
    return cell;
}

// Corner bits: 1 the next vertex along x, 2 along y, 4 along z.
template <typename T>
MIPNERF_HOST_DEVICE T corner_weight(const Cell<T>& cell, int corner) {
    T weight = T(1);
    for (int k = 0; k < 3; ++k) weight *= (corner >> k) & 1 ? cell.fraction[k] : T(1) - cell.fraction[k];
    return weight;
}

// d weight / d fraction of one axis.
template <typename T>
MIPNERF_HOST_DEVICE T corner_weight_derivative(const Cell<T>& cell, int corner, int axis) {
    T weight = (corner >> axis) & 1 ? T(1) : T(-1);
    for (int k = 0; k < 3; ++k)
        if (k != axis) weight *= (corner >> k) & 1 ? cell.fraction[k] : T(1) - cell.fraction[k];
    return weight;
}

constexpr uint32_t kHashY = 2654435761u;
constexpr uint32_t kHashZ = 805459861u;

// Into the table of all levels.
MIPNERF_HOST_DEVICE uint32_t corner_index(const HashLevel& level, uint32_t x, uint32_t y, uint32_t z) {
    if (level.is_dense) {
        const uint32_t m = static_cast<uint32_t>(level.resolution) + 1u;
        return level.offset + x + m * (y + m * z);
    }
    return level.offset + ((x ^ (y * kHashY) ^ (z * kHashZ)) & level.mask);
}

// ---- the scale as an input of the network

// [1, q, 0.3 q^2] with q = log2(512 s) / 2 and s clamped to the range seen in training: outside it the
// network would extrapolate. The 1 stands for a bias; 512 puts q near zero for images of 100 to 200 pixels.
template <typename T>
struct ScaleInputs {
    T one, q, q2;
};

MIPNERF_HOST_DEVICE float log2_positive(float x) {
    return log2f(x);
}
MIPNERF_HOST_DEVICE double log2_positive(double x) {
    return log2(x);
}

template <typename T>
MIPNERF_HOST_DEVICE ScaleInputs<T> scale_inputs(T scale, bool enabled, T low, T high) {
    if (!enabled) return {T(1), T(0), T(0)};
    const T clamped = scale < low ? low : scale > high ? high : scale;
    const T q = T(0.5) * log2_positive(T(512) * clamped);
    return {T(1), q, T(0.3) * q * q};
}

}  // namespace mipnerf
