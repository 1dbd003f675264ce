// One source, compiled for several x86-64 instruction sets, the best one chosen at run time.
//
//   struct Body { ...; MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const; };
//   run_vectorized(body, begin, end);      on this thread, with the widest vectors the processor has
//
// The body and everything it calls are inlined into one copy per instruction set, whatever processor the build machine
// has. ATEN_CPU_CAPABILITY=default|avx2|avx512 limits the choice, as it does for torch's own kernels. Elsewhere than on
// x86-64 the compiler's baseline is the only copy.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define MIPNERF_INLINE inline __attribute__((always_inline))

namespace mipnerf {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

#if defined(__x86_64__)

inline CpuCapability cpu_capability() {
  static const CpuCapability capability = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const bool at_most_default = limit != nullptr && std::strcmp(limit, "default") == 0;
    const bool at_most_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
    if (!avx2 || at_most_default) return CpuCapability::kDefault;
    return avx512 && !at_most_avx2 ? CpuCapability::kAvx512 : CpuCapability::kAvx2;
  }();
  return capability;
}

namespace detail {

template <typename Body>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512"), noinline)) void
run_avx512(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <typename Body>
__attribute__((target("avx2,fma,f16c"), noinline)) void run_avx2(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

template <typename Body>
__attribute__((noinline)) void run_default(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

}  // namespace detail

template <typename Body>
inline void run_vectorized(const Body& body, int64_t begin, int64_t end) {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return detail::run_avx512(body, begin, end);
    case CpuCapability::kAvx2:
      return detail::run_avx2(body, begin, end);
    case CpuCapability::kDefault:
      return detail::run_default(body, begin, end);
  }
}

#else

inline CpuCapability cpu_capability() { return CpuCapability::kDefault; }

template <typename Body>
inline void run_vectorized(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#endif

}  // namespace mipnerf
