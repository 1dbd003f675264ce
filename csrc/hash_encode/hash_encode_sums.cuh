// How the gradients of the tables are summed over samples: as floats, fast and in no particular order, or in
// fixed point (hash_encode_sums_math.h), the same bits in every run. A kernel that scatters takes one of the
// two as `Sums`.
#pragma once

#include <algorithm>

#include "hash_encode_device.cuh"
#include "hash_encode_sums_math.h"

namespace mipnerf {

struct FloatSums {
    float* tables;  // [entries, F], added to

    MIPNERF_DEVICE bool takes(unsigned) const { return true; }
    MIPNERF_DEVICE FloatSums of_level(unsigned) const { return *this; }
    template <int F>
    MIPNERF_DEVICE void add(std::int64_t entry, const Pack<float, F>& share) const {
        atomic_add_pack(tables + F * entry, share);
    }
};

// Three kernels in this order: one that hands the gradients of every sample to `raise_largest`, one that
// scatters, and add_sums_kernel. sums are zero before the first and after the last, largest before the first.
struct FixedSums {
    std::int64_t* sums;           // [entries, F]
    std::uint32_t* largest;       // [levels]: size_bits of the largest gradient, attenuated
    std::int64_t samples;         // whose shares are summed
    const std::int32_t* counted;  // the same on the device, where only it knows; else null

    struct Level {
        std::int64_t* sums;
        PowerOfTwo scale;
        template <int F>
        MIPNERF_DEVICE void add(std::int64_t entry, const Pack<float, F>& share) const {
#pragma unroll
            for (int f = 0; f < F; ++f) {
                const std::int64_t fixed = to_fixed(share.value[f], scale);
                if (fixed != 0) atomic_add(sums + F * entry + f, fixed);
            }
        }
    };

    // Not where a gradient is not finite.
    MIPNERF_DEVICE bool takes(unsigned level) const { return are_bits_finite(largest[level]); }
    MIPNERF_DEVICE int exponent(unsigned level) const {
        return scale_exponent(largest[level], counted == nullptr ? samples : *counted);
    }
    MIPNERF_DEVICE Level of_level(unsigned level) const { return {sums, power_of_two(exponent(level))}; }
};

// Adds the gradient of a level's features to its eight entries.
template <int F, typename LevelSums>
MIPNERF_DEVICE_LARGE void scatter_level(const HashLevel& level, float kept, const Cell<float>& cell,
                                        const Floats<F>& gradient, const LevelSums& sums) {
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
        const float weight = kept * corner_weight(cell, corner);
        Pack<float, F> share;
#pragma unroll
        for (int f = 0; f < F; ++f) share.value[f] = weight * gradient.value[f];
        sums.add(corner_entry(level, cell, corner), share);
    }
}

// size_bits of the largest that a sample can add to an entry, or of something not finite.
template <int F>
MIPNERF_DEVICE std::uint32_t largest_bits(float kept, const Cell<float>& cell, const Floats<F>& gradient) {
    std::uint32_t largest = 0;
#pragma unroll
    for (int f = 0; f < F; ++f) {
        const std::uint32_t bits = size_bits(kept * gradient.value[f]);
        largest = largest < bits ? bits : largest;
    }
    const std::uint32_t place = size_bits(cell.fraction[0] + cell.fraction[1] + cell.fraction[2]);
    return are_bits_finite(place) ? largest : place;
}

// By all lanes of a warp, for one level.
MIPNERF_DEVICE void raise_largest(std::uint32_t* largest, std::uint32_t bits) {
    bits = warp_max(bits);
    if (lane_index() == 0 && bits != 0) atomic_max(largest, bits);
}

constexpr int kAddSumsThreads = 256;

// Thread i of block (b, l) owns entry b * kAddSumsThreads + i of level l: adds its sum to its gradient and
// zeroes the sum, where it is not zero. Does nothing where not_finite (null: 0) is not 0; the gradients of a
// level that took no shares become NaN.
template <int F>
__global__ void __launch_bounds__(kAddSumsThreads)
    add_sums_kernel(const __grid_constant__ HashGrid grid, FixedSums sums, const std::int32_t* not_finite,
                    float* grad_tables) {
    const unsigned l = blockIdx.y;
    const std::int64_t entry = static_cast<std::int64_t>(grid.level[l].offset) +
                               static_cast<std::int64_t>(blockIdx.x) * kAddSumsThreads + threadIdx.x;
    if (entry >= level_end(grid, static_cast<int>(l)) || (not_finite != nullptr && *not_finite != 0)) return;
    const bool is_taken = sums.takes(l);
    std::int64_t* const total_at = sums.sums + F * entry;
    Pack<std::int64_t, 2> total[F / 2];
    std::int64_t any = is_taken ? 0 : 1;
#pragma unroll
    for (int i = 0; i < F / 2; ++i) {
        total[i] = load_pack_written<2>(total_at + 2 * i);
        any |= total[i].value[0] | total[i].value[1];
    }
    if (any == 0) return;
    const PowerOfTwo inverse = power_of_two(-sums.exponent(l));
    Pack<float, F> gradient = load_pack_written<F>(grad_tables + F * entry);
#pragma unroll
    for (int f = 0; f < F; ++f)
        gradient.value[f] +=
            is_taken ? from_fixed(total[f / 2].value[f % 2], inverse) : bits_float(0x7fc00000u);
    store_pack(grad_tables + F * entry, gradient);
#pragma unroll
    for (int i = 0; i < F / 2; ++i) store_pack(total_at + 2 * i, Pack<std::int64_t, 2>{{0, 0}});
}

template <int F>
void launch_add_sums(const HashGrid& grid, const FixedSums& sums, const std::int32_t* not_finite,
                     float* grad_tables, Stream stream) {
    std::int64_t most = 0;
    for (int l = 0; l < grid.levels; ++l)
        most = std::max(most, level_end(grid, l) - static_cast<std::int64_t>(grid.level[l].offset));
    dim3 blocks = grid_size(ceil_div(most, std::int64_t{kAddSumsThreads}));
    blocks.y = static_cast<unsigned>(grid.levels);
    MIPNERF_LAUNCH(add_sums_kernel<F>, blocks, dim3(kAddSumsThreads), 0, stream, grid, sums, not_finite,
                   grad_tables);
}

}  // namespace mipnerf
