// Runs a loop over rays on torch's threads, compiled for the vector units that this processor turns out to
// have.
//
//   for_rays(rays, samples, body);      body(begin, end) handles the rays begin <= ray < end
//
// The body and everything it calls are inlined into one function per instruction set, so that its loops are
// vectorised three times; which copy runs is decided once per process. (target_clones does the same for plain
// functions but takes no templates, and its "avx2" is without the fused multiply-add, which would leave fma()
// a call into libm.) Tuned for haswell since g++ otherwise takes gathers apart into single loads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#define MIPNERF_INLINE inline __attribute__((always_inline))

namespace mipnerf {

enum class VectorUnit { kBaseline, kAvx2, kAvx512 };

inline VectorUnit vector_unit() {
#if defined(__x86_64__)
    static const VectorUnit unit = [] {
        __builtin_cpu_init();
        // torch's own variable, which limits torch's own kernels in the same way: default, avx2 or avx512.
        const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
        const std::string at_most = limit == nullptr ? "" : limit;
        if (at_most == "default") return VectorUnit::kBaseline;
        if (at_most != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
            return VectorUnit::kAvx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return VectorUnit::kAvx2;
        return VectorUnit::kBaseline;
    }();
    return unit;
#else
    return VectorUnit::kBaseline;
#endif
}

namespace detail {

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

template <typename Body>
void for_rays(int64_t rays, int64_t samples, const Body& body) {
    // Below this many samples a second thread costs more than it saves.
    constexpr int64_t kSamplesPerTask = 8192;
    const int64_t grain = std::max<int64_t>(1, kSamplesPerTask / std::max<int64_t>(1, samples));
    void (*run)(const Body&, int64_t, int64_t) = detail::run_baseline<Body>;
#if defined(__x86_64__)
    if (vector_unit() == VectorUnit::kAvx2) run = detail::run_avx2<Body>;
    if (vector_unit() == VectorUnit::kAvx512) run = detail::run_avx512<Body>;
#endif
    if (rays <= grain) return run(body, 0, rays);
    torch::stable::parallel_for(0, rays, grain, [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

}  // namespace mipnerf
