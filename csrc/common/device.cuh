// The device-side vocabulary of the kernels: the only file that knows intrinsics, inline assembly and <<<>>>.
//
// A kernel (csrc/<op>/<op>_kernels.cuh) includes this file and <op>_math.h, so that nvcc and g++ compile the
// same source: nvcc for the GPU, g++ (with tests/cuda_emulation/ on the include path and
// MIPNERF_CUDA_EMULATION defined) for the tests that run every kernel on the CPU under sanitizers. What makes
// this work:
//
// - <op>_kernels.cuh holds kernels and launchers with raw pointers. The torch-free <op>_launch.cu
//   instantiates what <op>_cuda.cu calls; `make cuda-check` compiles it for every architecture.
//
// - Kernels are `__global__ void`, use threadIdx, blockIdx, blockDim and gridDim; MIPNERF_LAUNCH starts them.
//
// - All shared memory comes from shared_memory<T>(byte_offset); there are no __shared__ variables.
//
// - Lanes talk through the functions below, never through intrinsics; no assembly outside this file and
//   tensor_core.cuh.
//
// - An address that two threads touch, one of them writing, needs a barrier between (warp_sync inside a warp,
//   block_sync across warps) or atomics: warps run in lockstep neither here nor on the GPU.
//
// clang-format off
//
// Contents (namespace mipnerf; W is a power of two up to 32, normally 32: lanes talk within segments of W)
//
//   MIPNERF_DEVICE, MIPNERF_HOST_DEVICE  function prefixes (inlined)
//   MIPNERF_DEVICE_LARGE                 of a function template that many kernels use: inlined on the device only,
//                                        since every copy costs g++ seconds under the sanitizers
//   MIPNERF_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//                                        launches, checks, throws; an empty grid is no launch. A kernel with
//                                        commas in its template arguments goes in parentheses
//   resident_blocks(kernel, threads, shared_bytes)       as many blocks as run on the device at once
//   Stream, dim3, grid_size(blocks)      cudaStream_t; grid_size turns a checked 64-bit count into a dim3
//   ceil_div(a, b), is_aligned(p, bytes)
//   Bfloat16, Half                       16-bit storage types, bit-compatible with torch's and CUDA's
//   to_float(x), from_float<T>(x)        to and from float, double, Bfloat16, Half; to nearest, ties to even
//   Pack<T, N> .value[N]                 N values moved by one instruction: 1, 2, 4, 8 or 16 bytes
//   Floats<N> .value[N]                  N floats in registers
//   load_pack<N>(p), store_pack(p, pack) aligned global load through the read-only path (nothing may write
//                                        there during the launch), aligned global store
//   store_pack_streaming(p, pack)        for results that nobody reads again soon
//   load_pack_shared<N>(p), store_pack_shared(p, pack)   the same in shared memory
//   load_pack_written<N>(p)              aligned load, by value, of global or shared memory that the launch also writes
//   ldg128(p), stg128(p, pack)           the 16-byte ones: 4 floats, 8 Bfloat16 or 8 Half
//   pack_to_float(pack), pack_from_float<T>(floats)
//   lane_index(), warp_index()           of a one-dimensional block
//   thread_rank()                        of any block
//   block_sync(), warp_sync(mask)        __syncthreads, __syncwarp: both order memory between their threads
//   warp_shuffle<W>(v, lane), warp_shuffle_up<W>(v, d), warp_shuffle_down<W>(v, d), warp_shuffle_xor<W>(v, m)
//   warp_ballot(p), warp_any(p), warp_all(p)             of the whole warp
//   warp_sum<W>(v), warp_max<W>(v), warp_min<W>(v)       the result in every lane
//   warp_inclusive_sum<W>(v), warp_exclusive_sum<W>(v)   prefix sums (exclusive by a shift: an inf stays apart)
//   warp_inclusive_max<W>(v), warp_exclusive_max<W>(v, identity)
//   warp_reverse_inclusive_sum, warp_reverse_exclusive_sum, warp_reverse_inclusive_max,
//   warp_reverse_exclusive_max           the same over the lanes from this one to the last
//   atomic_add(p, v)                     float, double, int, unsigned, int64; global or shared memory; orders nothing
//   atomic_max(p, v)                     the same for unsigned
//   atomic_add_pack(p, pack)             2 or 4 floats of global memory, each atomically, in one instruction
//                                        from 9.0 on; aligned like the pack, nothing returned
//   shared_memory<T>(byte_offset = 0)    the block's dynamic shared memory, uninitialised
//   exp2_approx, log2_approx, reciprocal_approx, rsqrt_approx, sin_approx, cos_approx
//                                        float, one special-function instruction each; sine and cosine for
//                                        |x| <= pi only (absolute error 2^-20.5)
//   count_bits(m), lowest_bit(m), highest_bit(m)         of a nonzero mask; bits count from 0
//
// clang-format on
//
// Shuffles, votes, reductions and scans are executed by all 32 lanes of a warp together (by the lanes of
// `mask` where one is given); a lane that left the kernel early takes no part, and reading from it is an
// error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define MIPNERF_DEVICE __device__ __forceinline__
#define MIPNERF_DEVICE_LARGE __device__ __forceinline__
#ifndef MIPNERF_HOST_DEVICE
#define MIPNERF_HOST_DEVICE __host__ __device__ __forceinline__
#endif
// Where a barrier or shuffle was called from: reported by the emulation, nothing here.
#define MIPNERF_SITE
#define MIPNERF_PASS_SITE
#elif defined(MIPNERF_CUDA_EMULATION)
#define MIPNERF_DEVICE inline __attribute__((always_inline))
#define MIPNERF_DEVICE_LARGE __attribute__((noinline))
#ifndef MIPNERF_HOST_DEVICE
#define MIPNERF_HOST_DEVICE inline __attribute__((always_inline))
#endif
#define MIPNERF_SITE , ::mipnerf::emulation::Site site = ::mipnerf::emulation::Site::here()
#define MIPNERF_PASS_SITE , site
#else
#error "device.cuh is compiled by nvcc, or by g++ with -DMIPNERF_CUDA_EMULATION -I tests/cuda_emulation"
#endif

#include "portable_math.h"

namespace mipnerf {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

template <typename A, typename B>
MIPNERF_HOST_DEVICE constexpr auto ceil_div(A numerator, B denominator) {
    return (numerator + denominator - 1) / denominator;
}

MIPNERF_HOST_DEVICE bool is_aligned(const void* address, std::size_t bytes) {
    return (reinterpret_cast<std::uintptr_t>(address) & (bytes - 1)) == 0;
}

struct alignas(2) Bfloat16 {
    std::uint16_t bits;
};
struct alignas(2) Half {
    std::uint16_t bits;
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    static_assert(sizeof(T) * N <= 16, "one instruction moves at most 16 bytes");
    T value[N];
};

namespace detail {

template <typename To, typename From>
MIPNERF_HOST_DEVICE To bit_copy(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_copy keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace detail
}  // namespace mipnerf

#if defined(__CUDACC__)

namespace mipnerf {

using Stream = cudaStream_t;

// ----------------------------------------------------------------------------------------------------------
// launching

namespace detail {

inline void check_cuda(cudaError_t status, const char* name) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

inline void allow_shared_bytes(const char* name, const void* kernel, std::size_t shared_bytes) {
    constexpr std::size_t kWithoutAsking = 48 * 1024;
    if (shared_bytes > kWithoutAsking)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   name);
}

template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Stream stream, const A&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    allow_shared_bytes(name, reinterpret_cast<const void*>(kernel), shared_bytes);
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<P>(args)...);
    check_cuda(cudaGetLastError(), name);
}

}  // namespace detail

#define MIPNERF_LAUNCH(kernel, ...) ::mipnerf::detail::launch(#kernel, kernel, __VA_ARGS__)

template <typename... P>
int resident_blocks(void (*kernel)(P...), int threads, std::size_t shared_bytes) {
    const char* name = "resident_blocks";
    const void* function = reinterpret_cast<const void*>(kernel);
    detail::allow_shared_bytes(name, function, shared_bytes);
    int device = 0, multiprocessors = 0, blocks = 0;
    detail::check_cuda(cudaGetDevice(&device), name);
    detail::check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
                       name);
    detail::check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes), name);
    return multiprocessors * blocks;
}

// ------------------------------------------------------------------------------------------------- indices
// and barriers

MIPNERF_DEVICE int lane_index() {
    return static_cast<int>(threadIdx.x & (kWarpSize - 1));
}
MIPNERF_DEVICE int warp_index() {
    return static_cast<int>(threadIdx.x / kWarpSize);
}
MIPNERF_DEVICE int thread_rank() {
    return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

MIPNERF_DEVICE void block_sync() {
    __syncthreads();
}
MIPNERF_DEVICE void warp_sync(unsigned mask = kFullMask) {
    __syncwarp(mask);
}

template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_shuffle(T value, int lane, unsigned mask = kFullMask) {
    return __shfl_sync(mask, value, lane, Width);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_shuffle_up(T value, unsigned delta, unsigned mask = kFullMask) {
    return __shfl_up_sync(mask, value, delta, Width);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_shuffle_down(T value, unsigned delta, unsigned mask = kFullMask) {
    return __shfl_down_sync(mask, value, delta, Width);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask) {
    return __shfl_xor_sync(mask, value, lane_mask, Width);
}

MIPNERF_DEVICE unsigned warp_ballot(bool predicate, unsigned mask = kFullMask) {
    return __ballot_sync(mask, predicate);
}
MIPNERF_DEVICE bool warp_any(bool predicate, unsigned mask = kFullMask) {
    return __any_sync(mask, predicate) != 0;
}
MIPNERF_DEVICE bool warp_all(bool predicate, unsigned mask = kFullMask) {
    return __all_sync(mask, predicate) != 0;
}

template <typename T>
MIPNERF_DEVICE T atomic_add(T* address, T value) {
    return atomicAdd(address, value);
}
MIPNERF_DEVICE std::int64_t atomic_add(std::int64_t* address, std::int64_t value) {
    return static_cast<std::int64_t>(
        atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value)));
}
MIPNERF_DEVICE unsigned atomic_max(unsigned* address, unsigned value) {
    return atomicMax(address, value);
}

MIPNERF_DEVICE void atomic_add_pack(float* address, const Pack<float, 2>& pack) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "f"(pack.value[0]), "f"(pack.value[1])
                 : "memory");
#else
    for (int i = 0; i < 2; ++i) atomicAdd(address + i, pack.value[i]);
#endif
}
MIPNERF_DEVICE void atomic_add_pack(float* address, const Pack<float, 4>& pack) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(address)), "f"(pack.value[0]), "f"(pack.value[1]),
                   "f"(pack.value[2]), "f"(pack.value[3])
                 : "memory");
#else
    for (int i = 0; i < 4; ++i) atomicAdd(address + i, pack.value[i]);
#endif
}

// -------------------------------------------------------------------------------------------------------------
// memory

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

template <typename T>
MIPNERF_DEVICE T* shared_memory(std::size_t byte_offset = 0) {
    return reinterpret_cast<T*>(dynamic_shared_memory + byte_offset);
}

namespace detail {

template <int Bytes>
struct Word;
template <>
struct Word<1> {
    using type = unsigned char;
};
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};
template <typename T, int N>
using PackWord = typename Word<static_cast<int>(sizeof(T)) * N>::type;

}  // namespace detail

template <int N, typename T>
MIPNERF_DEVICE Pack<T, N> load_pack(const T* address) {
    return detail::bit_copy<Pack<T, N>>(__ldg(reinterpret_cast<const detail::PackWord<T, N>*>(address)));
}
template <int N, typename T>
MIPNERF_DEVICE Pack<T, N> load_pack_shared(const T* address) {
    return detail::bit_copy<Pack<T, N>>(*reinterpret_cast<const detail::PackWord<T, N>*>(address));
}
template <int N, typename T>
MIPNERF_DEVICE Pack<T, N> load_pack_written(const T* address) {
    // By value: a copy through a reference to global memory becomes one of single bytes. (Loads of shared
    // memory stay as they are: by value they make ptxas serialise the products of mlp_hopper.)
    const detail::PackWord<T, N> word = *reinterpret_cast<const detail::PackWord<T, N>*>(address);
    return detail::bit_copy<Pack<T, N>>(word);
}
template <typename T, int N>
MIPNERF_DEVICE void store_pack(T* address, const Pack<T, N>& pack) {
    using W = detail::PackWord<T, N>;
    *reinterpret_cast<W*>(address) = detail::bit_copy<W>(pack);
}
template <typename T, int N>
MIPNERF_DEVICE void store_pack_shared(T* address, const Pack<T, N>& pack) {
    store_pack(address, pack);
}
template <typename T, int N>
MIPNERF_DEVICE void store_pack_streaming(T* address, const Pack<T, N>& pack) {
    using W = detail::PackWord<T, N>;
    __stcs(reinterpret_cast<W*>(address), detail::bit_copy<W>(pack));
}

// ------------------------------------------------------------------------------------------------------------
// numbers

MIPNERF_DEVICE float to_float(float x) {
    return x;
}
MIPNERF_DEVICE double to_float(double x) {
    return x;
}
MIPNERF_DEVICE float to_float(Bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
MIPNERF_DEVICE float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

template <typename T>
MIPNERF_DEVICE T from_float(float x) {
    return static_cast<T>(x);
}
template <>
MIPNERF_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
#if __CUDA_ARCH__ >= 800
    Bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    return Bfloat16{to_bfloat16_bits(x)};
#endif
}
template <>
MIPNERF_DEVICE Half from_float<Half>(float x) {
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

namespace detail {

// Two numbers into one register, low word first.
MIPNERF_DEVICE unsigned pair_bits(float low, float high, Bfloat16) {
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return to_bfloat16_bits(low) | (static_cast<unsigned>(to_bfloat16_bits(high)) << 16);
#endif
}
MIPNERF_DEVICE unsigned pair_bits(float low, float high, Half) {
#if __CUDA_ARCH__ >= 800
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return from_float<Half>(low).bits | (static_cast<unsigned>(from_float<Half>(high).bits) << 16);
#endif
}

}  // namespace detail

MIPNERF_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MIPNERF_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MIPNERF_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MIPNERF_DEVICE float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MIPNERF_DEVICE float sin_approx(float x) {
    float y;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MIPNERF_DEVICE float cos_approx(float x) {
    float y;
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

MIPNERF_DEVICE int count_bits(unsigned mask) {
    return __popc(mask);
}
MIPNERF_DEVICE int lowest_bit(unsigned mask) {
    return __ffs(static_cast<int>(mask)) - 1;
}
MIPNERF_DEVICE int highest_bit(unsigned mask) {
    return 31 - __clz(static_cast<int>(mask));
}

}  // namespace mipnerf

#else

#include "cuda_emulation.h"

#endif

namespace mipnerf {

// ------------------------------------------------------------------- built from the above, the same on GPU
// and CPU

inline dim3 grid_size(std::int64_t blocks) {
    if (blocks < 0 || blocks > std::numeric_limits<std::int32_t>::max())
        throw std::runtime_error("a grid of " + std::to_string(blocks) + " blocks is outside 0..2^31-1");
    return dim3(static_cast<unsigned>(blocks));
}

template <typename T>
constexpr int kPerLoad128 = 16 / static_cast<int>(sizeof(T));

template <typename T>
MIPNERF_DEVICE Pack<T, kPerLoad128<T>> ldg128(const T* address) {
    return load_pack<kPerLoad128<T>>(address);
}
template <typename T>
MIPNERF_DEVICE void stg128(T* address, const Pack<T, kPerLoad128<T>>& pack) {
    store_pack(address, pack);
}

// N numbers of a 16-bit or 32-bit type as floats; unlike Pack this is an array in registers of any length.
template <int N>
struct Floats {
    float value[N];
};

template <typename T, int N>
MIPNERF_DEVICE Floats<N> pack_to_float(const Pack<T, N>& pack) {
    Floats<N> y;
#pragma unroll
    for (int i = 0; i < N; ++i) y.value[i] = to_float(pack.value[i]);
    return y;
}

namespace detail {

template <typename T>
struct Narrow {
    template <int N>
    static MIPNERF_DEVICE Pack<T, N> pack(const Floats<N>& x) {
        if constexpr (N % 2 == 0) {
            Pack<unsigned, N / 2> words;
#pragma unroll
            for (int i = 0; i < N / 2; ++i)
                words.value[i] = pair_bits(x.value[2 * i], x.value[2 * i + 1], T{});
            return bit_copy<Pack<T, N>>(words);
        } else {
            Pack<T, N> y;
#pragma unroll
            for (int i = 0; i < N; ++i) y.value[i] = from_float<T>(x.value[i]);
            return y;
        }
    }
};
template <>
struct Narrow<float> {
    template <int N>
    static MIPNERF_DEVICE Pack<float, N> pack(const Floats<N>& x) {
        return bit_copy<Pack<float, N>>(x);
    }
};

}  // namespace detail

template <typename T, int N>
MIPNERF_DEVICE Pack<T, N> pack_from_float(const Floats<N>& x) {
    return detail::Narrow<T>::template pack<N>(x);
}

namespace detail {

struct Add {
    template <typename T>
    MIPNERF_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};
struct Larger {
    template <typename T>
    MIPNERF_DEVICE T operator()(T a, T b) const {
        return a < b ? b : a;
    }
};
struct Smaller {
    template <typename T>
    MIPNERF_DEVICE T operator()(T a, T b) const {
        return b < a ? b : a;
    }
};

template <int Width, typename T, typename Op>
MIPNERF_DEVICE T reduce(T value, Op op MIPNERF_SITE) {
#pragma unroll
    for (int offset = Width / 2; offset > 0; offset /= 2)
        value = op(value, warp_shuffle_xor<Width>(value, offset, kFullMask MIPNERF_PASS_SITE));
    return value;
}

// Lane i of a segment: op over lanes 0..i (forward) or i..Width-1 (reverse).
template <int Width, bool Reverse, typename T, typename Op>
MIPNERF_DEVICE T scan(T value, Op op MIPNERF_SITE) {
    const int lane = lane_index() & (Width - 1);
#pragma unroll
    for (int offset = 1; offset < Width; offset *= 2) {
        if constexpr (Reverse) {
            const T other = warp_shuffle_down<Width>(value, offset, kFullMask MIPNERF_PASS_SITE);
            if (lane + offset < Width) value = op(value, other);
        } else {
            const T other = warp_shuffle_up<Width>(value, offset, kFullMask MIPNERF_PASS_SITE);
            if (lane >= offset) value = op(other, value);
        }
    }
    return value;
}

// An inclusive scan moved by one lane; the first (reverse: last) lane of a segment gets the identity.
template <int Width, bool Reverse, typename T>
MIPNERF_DEVICE T shift(T inclusive, T identity MIPNERF_SITE) {
    const int lane = lane_index() & (Width - 1);
    if constexpr (Reverse) {
        const T other = warp_shuffle_down<Width>(inclusive, 1, kFullMask MIPNERF_PASS_SITE);
        return lane == Width - 1 ? identity : other;
    } else {
        const T other = warp_shuffle_up<Width>(inclusive, 1, kFullMask MIPNERF_PASS_SITE);
        return lane == 0 ? identity : other;
    }
}

}  // namespace detail

template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_sum(T value MIPNERF_SITE) {
    return detail::reduce<Width>(value, detail::Add {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_max(T value MIPNERF_SITE) {
    return detail::reduce<Width>(value, detail::Larger {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_min(T value MIPNERF_SITE) {
    return detail::reduce<Width>(value, detail::Smaller {} MIPNERF_PASS_SITE);
}

template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_inclusive_sum(T value MIPNERF_SITE) {
    return detail::scan<Width, false>(value, detail::Add {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_exclusive_sum(T value MIPNERF_SITE) {
    return detail::shift<Width, false>(
        detail::scan<Width, false>(value, detail::Add {} MIPNERF_PASS_SITE), T(0) MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_inclusive_max(T value MIPNERF_SITE) {
    return detail::scan<Width, false>(value, detail::Larger {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_exclusive_max(T value, T identity MIPNERF_SITE) {
    return detail::shift<Width, false>(
        detail::scan<Width, false>(value, detail::Larger {} MIPNERF_PASS_SITE), identity MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_reverse_inclusive_sum(T value MIPNERF_SITE) {
    return detail::scan<Width, true>(value, detail::Add {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_reverse_exclusive_sum(T value MIPNERF_SITE) {
    return detail::shift<Width, true>(
        detail::scan<Width, true>(value, detail::Add {} MIPNERF_PASS_SITE), T(0) MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_reverse_inclusive_max(T value MIPNERF_SITE) {
    return detail::scan<Width, true>(value, detail::Larger {} MIPNERF_PASS_SITE);
}
template <int Width = kWarpSize, typename T>
MIPNERF_DEVICE T warp_reverse_exclusive_max(T value, T identity MIPNERF_SITE) {
    return detail::shift<Width, true>(
        detail::scan<Width, true>(value, detail::Larger {} MIPNERF_PASS_SITE), identity MIPNERF_PASS_SITE);
}

}  // namespace mipnerf
