// Runs a loop over rays on torch's threads, compiled for the vector units that this processor turns out to
// have.
//
//   for_rays<T>(rays, samples, body);      body(begin, end) handles the rays begin <= ray < end
//
// T is what the body computes in: float64, which is there for checking, is compiled once and plainly.
//
// The body and everything it calls are inlined into one function per instruction set, so that its loops
// are vectorised three times; which copy runs is decided once per process. (target_clones does the same for
// plain functions but takes no templates, and its "avx2" is without the fused multiply-add, which would leave
// fma() a call into libm.) Tuned for haswell since g++ otherwise takes gathers apart into single loads.
//
// MIPNERF_ONLY_VECTOR_UNIT, a value of VectorUnit, compiles one copy alone: a third of the time, for a
// library that stays on the machine where it was built.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#define MIPNERF_INLINE inline __attribute__((always_inline))

namespace mipnerf {

enum class VectorUnit { kBaseline, kAvx2, kAvx512 };

// Whether this library has the copies for a unit.
constexpr bool is_compiled(VectorUnit unit) {
#if defined(MIPNERF_ONLY_VECTOR_UNIT)
    return unit == static_cast<VectorUnit>(MIPNERF_ONLY_VECTOR_UNIT);
#else
    return true;
#endif
}

inline bool processor_has(VectorUnit unit) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (unit == VectorUnit::kAvx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (unit == VectorUnit::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return unit == VectorUnit::kBaseline;
}

inline VectorUnit vector_unit() {
    static const VectorUnit unit = [] {
#if defined(MIPNERF_ONLY_VECTOR_UNIT)
        constexpr VectorUnit kOnly = static_cast<VectorUnit>(MIPNERF_ONLY_VECTOR_UNIT);
        if (!processor_has(kOnly))
            throw std::runtime_error(
                "the native library was built for another processor's vector unit alone");
        return kOnly;
#else
        // torch's own variable, which limits torch's own kernels in the same way: default, avx2 or avx512.
        const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
        const std::string at_most = limit == nullptr ? "" : limit;
        if (at_most == "default") return VectorUnit::kBaseline;
        if (at_most != "avx2" && processor_has(VectorUnit::kAvx512)) return VectorUnit::kAvx512;
        return processor_has(VectorUnit::kAvx2) ? VectorUnit::kAvx2 : VectorUnit::kBaseline;
#endif
    }();
    return unit;
}

namespace detail {

#if defined(__GNUC__) && !defined(__clang__)
#define MIPNERF_COMPILES_SOON __attribute__((optimize("O1")))
#else
#define MIPNERF_COMPILES_SOON
#endif

template <typename Body>
MIPNERF_COMPILES_SOON void run_plain(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}

template <typename Body>
void run_baseline(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}

#if defined(__x86_64__)
template <typename Body>
__attribute__((target("avx2,fma,tune=haswell"))) void run_avx2(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}

template <typename Body>
__attribute__((
    target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,tune=haswell,prefer-vector-width=512"))) void
run_avx512(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}
#endif

}  // namespace detail

template <typename T, typename Body>
void for_rays(int64_t rays, int64_t samples, const Body& body) {
    // Below this many samples a second thread costs more than it saves.
    constexpr int64_t kSamplesPerTask = 8192;
    const int64_t grain = std::max<int64_t>(1, kSamplesPerTask / std::max<int64_t>(1, samples));
    void (*run)(const Body&, int64_t, int64_t) = nullptr;
    if constexpr (std::is_same_v<T, double>) {
        run = detail::run_plain<Body>;
    } else {
        const VectorUnit unit = vector_unit();
        if constexpr (is_compiled(VectorUnit::kBaseline)) run = detail::run_baseline<Body>;
#if defined(__x86_64__)
        if constexpr (is_compiled(VectorUnit::kAvx2))
            if (unit == VectorUnit::kAvx2) run = detail::run_avx2<Body>;
        if constexpr (is_compiled(VectorUnit::kAvx512))
            if (unit == VectorUnit::kAvx512) run = detail::run_avx512<Body>;
#endif
    }
    if (rays <= grain) return run(body, 0, rays);
    torch::stable::parallel_for(0, rays, grain, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

}  // namespace mipnerf
