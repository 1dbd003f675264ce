// Vectors of W floats, and tasks that run on torch's threads in a copy compiled for this processor's vector
// unit. Where for_rays.h leaves the vectorisation of plain loops to the compiler, the dense kernels of small
// networks need their accumulators in registers; the compilers' portable vector types say so without
// intrinsics, and a task is told how wide they are:
//
//   struct Body { template <int W> void operator()(int64_t task, int64_t thread) const; };
//   for_tasks(tasks, body);
//
// Tasks are handed out one by one, so that a slow or busy core takes fewer. Which thread runs a task is left
// open: results must not depend on it. `thread` counts from 0 and is below task_threads(tasks).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "for_rays.h"
#include "portable_math.h"

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed by value to functions that are always inlined: there is no ABI to change.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__clang__)
#define MIPNERF_UNROLL _Pragma("unroll")
#else
#define MIPNERF_UNROLL _Pragma("GCC unroll 32")
#endif

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace mipnerf {

template <int W>
struct VectorOf {
    typedef float type __attribute__((vector_size(4 * W)));
};
template <int W>
using Vector = typename VectorOf<W>::type;

// What a comparison of Vector<W> gives: all bits of a lane, or none.
template <int W>
struct IntVectorOf {
    typedef int32_t type __attribute__((vector_size(4 * W)));
};
template <int W>
using IntVector = typename IntVectorOf<W>::type;

template <int W>
MIPNERF_INLINE Vector<W> load_vector(const float* p) {
    Vector<W> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <int W>
MIPNERF_INLINE void store_vector(float* p, Vector<W> v) {
    std::memcpy(p, &v, sizeof(v));
}

template <int W>
MIPNERF_INLINE Vector<W> splat(float x) {
    Vector<W> v;
    MIPNERF_UNROLL for (int i = 0; i < W; ++i) v[i] = x;
    return v;
}

// a b + c, rounded once where the processor can.
template <int W>
MIPNERF_INLINE Vector<W> fused(Vector<W> a, Vector<W> b, Vector<W> c) {
#if defined(__FMA__) || defined(__aarch64__)
    constexpr bool kInstruction = true;
#else
    constexpr bool kInstruction = W > 4;  // the copies for AVX2 and AVX-512 are wider than the baseline's
#endif
    if constexpr (!kInstruction) return a * b + c;
    Vector<W> v;
    MIPNERF_UNROLL for (int i = 0; i < W; ++i) v[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return v;
}

template <int W>
MIPNERF_INLINE float sum_lanes(Vector<W> v) {
    if constexpr (W == 2) {
        return v[0] + v[1];
    } else {
        Vector<W / 2> low, high;
        std::memcpy(&low, &v, sizeof(low));
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
        return sum_lanes<W / 2>(low + high);
    }
}

// Results below the smallest normal number become zero within the scope: gradients fade through that range,
// where every operation would cost a hundred times as much.
class FlushSubnormals {
  public:
#if defined(__x86_64__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#else
    FlushSubnormals() {}
#endif
  public:
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

inline int64_t task_threads(int64_t tasks) {
    return std::max<int64_t>(1, std::min<int64_t>(tasks, torch::stable::get_num_threads()));
}

namespace detail {

template <typename Body>
struct Tasks {
    const Body& body;
    int64_t count;
    std::atomic<int64_t>& next;

    template <int W>
    MIPNERF_INLINE void run(int64_t thread) const {
        for (int64_t task = next++; task < count; task = next++) body.template operator()<W>(task, thread);
    }
};

template <typename Body>
void run_tasks_baseline(const Tasks<Body>& tasks, int64_t thread) {
    tasks.template run<4>(thread);
}
#if defined(__x86_64__)
template <typename Body>
__attribute__((target("avx2,fma"))) void run_tasks_avx2(const Tasks<Body>& tasks, int64_t thread) {
    tasks.template run<8>(thread);
}
template <typename Body>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512"))) void
run_tasks_avx512(const Tasks<Body>& tasks, int64_t thread) {
    tasks.template run<16>(thread);
}
#endif

}  // namespace detail

template <typename Body>
void for_tasks(int64_t count, const Body& body) {
    std::atomic<int64_t> next{0};
    const detail::Tasks<Body> tasks{body, count, next};
    const VectorUnit unit = vector_unit();
    void (*run)(const detail::Tasks<Body>&, int64_t) = nullptr;
    if constexpr (is_compiled(VectorUnit::kBaseline)) run = detail::run_tasks_baseline<Body>;
#if defined(__x86_64__)
    if constexpr (is_compiled(VectorUnit::kAvx2))
        if (unit == VectorUnit::kAvx2) run = detail::run_tasks_avx2<Body>;
    if constexpr (is_compiled(VectorUnit::kAvx512))
        if (unit == VectorUnit::kAvx512) run = detail::run_tasks_avx512<Body>;
#endif
    torch::stable::parallel_for(0, task_threads(count), 1, [&](int64_t begin, int64_t end) {
        const FlushSubnormals scope;
        for (int64_t thread = begin; thread < end; ++thread) run(tasks, thread);
    });
}

}  // namespace mipnerf
