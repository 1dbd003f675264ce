// The hash encoding on the device: one level of one point, to be put together by kernels
// (hash_encode_kernels.cuh and those of the fused step).
#pragma once

#include "../common/device.cuh"
#include "hash_encode_math.h"

namespace mipnerf {

MIPNERF_DEVICE std::int64_t corner_entry(const HashLevel& level, const Cell<float>& cell, int corner) {
    return corner_index(level, static_cast<std::uint32_t>(cell.corner[0] + (corner & 1)),
                        static_cast<std::uint32_t>(cell.corner[1] + (corner >> 1 & 1)),
                        static_cast<std::uint32_t>(cell.corner[2] + (corner >> 2 & 1)));
}

// The F features of a level: eight gathers of one entry each, all on their way before the first is used.
template <int F, typename S>
MIPNERF_DEVICE_LARGE Floats<F> gather_level(const HashLevel& level, float kept, const Cell<float>& cell,
                                            const S* tables) {
    Pack<S, F> entry[8];
#pragma unroll
    for (int corner = 0; corner < 8; ++corner)
        entry[corner] = load_pack<F>(tables + F * corner_entry(level, cell, corner));
    Floats<F> sum{};
#pragma unroll
    for (int corner = 0; corner < 8; ++corner) {
        const float weight = kept * corner_weight(cell, corner);
#pragma unroll
        for (int f = 0; f < F; ++f) sum.value[f] += weight * to_float(entry[corner].value[f]);
    }
    return sum;
}

}  // namespace mipnerf
