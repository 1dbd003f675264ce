// Blocks of numbers turned in the vector registers: rows become columns.
#pragma once

#include <utility>

#include "vector_tasks.h"

namespace mipnerf {

// a0 b0 a1 b1 and so on, of the first halves or the second.
template <int N, bool kSecond>
MIPNERF_INLINE Vector<N> interleaved(Vector<N> a, Vector<N> b) {
    constexpr int kFirst = kSecond ? N / 2 : 0;
#if defined(__clang__)
    return [&]<int... I>(std::integer_sequence<int, I...>) {
        return __builtin_shufflevector(a, b, (kFirst + I / 2 + I % 2 * N)...);
    }(std::make_integer_sequence<int, N>{});
#else
    IntVector<N> places;
    MIPNERF_UNROLL for (int i = 0; i < N; ++i) places[i] = kFirst + i / 2 + i % 2 * N;
    return __builtin_shuffle(a, b, places);
#endif
}

// Rows become columns: each of log2 N rounds doubles how many of a column's numbers are next to each other.
template <int N>
MIPNERF_INLINE void transpose(Vector<N> (&row)[N]) {
    MIPNERF_UNROLL for (int done = 1; done < N; done *= 2) {
        Vector<N> next[N];
        MIPNERF_UNROLL for (int i = 0; i < N / 2; ++i) {
            next[2 * i] = interleaved<N, false>(row[i], row[i + N / 2]);
            next[2 * i + 1] = interleaved<N, true>(row[i], row[i + N / 2]);
        }
        MIPNERF_UNROLL for (int i = 0; i < N; ++i) row[i] = next[i];
    }
}

// to[i, j] = from[j, i] of N x N numbers.
template <int N>
MIPNERF_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Vector<N> row[N];
    MIPNERF_UNROLL for (int i = 0; i < N; ++i) row[i] = load_vector<N>(from + i * from_stride);
    transpose<N>(row);
    MIPNERF_UNROLL for (int i = 0; i < N; ++i) store_vector<N>(to + i * to_stride, row[i]);
}

// So many at a time: all 32 registers of AVX-512 hold 16 rows twice, 16 narrower ones two fours.
template <int W>
constexpr int kTransposed = W == 16 ? 16 : 4;

}  // namespace mipnerf
