// Numbers of the CPU's loops in memory: as they are computed with, or in 16 bits. Which is known at run time
// alone: a copy of the loops for each would multiply the time that they take to compile. No torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "portable_math.h"

#ifndef MIPNERF_INLINE
#define MIPNERF_INLINE inline __attribute__((always_inline))
#endif

namespace mipnerf {

enum class Storage { kSame, kBfloat16, kHalf };

// Of a tensor's dtype (torch's ScalarType).
template <typename ScalarType>
Storage storage_of(ScalarType dtype) {
    if (dtype == ScalarType::BFloat16) return Storage::kBfloat16;
    return dtype == ScalarType::Half ? Storage::kHalf : Storage::kSame;
}

// A number's, `same` being those of one that is computed with.
MIPNERF_INLINE int64_t bytes_of(Storage storage, size_t same) {
    return storage == Storage::kSame ? static_cast<int64_t>(same) : 2;
}

template <typename T>
MIPNERF_INLINE void store_numbers(void* to, Storage storage, const T* from, int64_t count) {
    if (storage == Storage::kSame) {
        T* const same = static_cast<T*>(to);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) same[i] = from[i];
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        uint16_t* const bits = static_cast<uint16_t*>(to);
        if (storage == Storage::kBfloat16) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) bits[i] = to_bfloat16_bits(from[i]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) bits[i] = to_half_bits(from[i]);
        }
    }
}

template <typename T>
MIPNERF_INLINE void load_numbers(const void* from, Storage storage, T* to, int64_t count) {
    if (storage == Storage::kSame) {
        const T* const same = static_cast<const T*>(from);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) to[i] = same[i];
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        const uint16_t* const bits = static_cast<const uint16_t*>(from);
        if (storage == Storage::kBfloat16) {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16_bits(bits[i]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) to[i] = from_half_bits(bits[i]);
        }
    }
}

}  // namespace mipnerf
