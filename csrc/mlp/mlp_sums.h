// How the CPU's dense kernels of the network fill the vector registers: so many sums of two vectors each at a
// time, and fewer for what is left over.
#pragma once

#include "../common/vector_tasks.h"

namespace mipnerf {

// 24 of the 32 registers of AVX-512 are sums, 12 of 16 elsewhere.
template <int W>
constexpr int kSumsAtATime = W == 16 ? 12 : 6;

// The next smaller number to try where fewer are left over.
constexpr int fewer_sums(int sums) {
    return sums > 6 ? 6 : sums > 4 ? 4 : sums / 2;
}

// Floats in a vector of the copy that runs.
inline int vector_lanes() {
    const VectorUnit unit = vector_unit();
    return unit == VectorUnit::kAvx512 ? 16 : unit == VectorUnit::kAvx2 ? 8 : 4;
}

}  // namespace mipnerf
