// CUDA on the CPU, for tests: what csrc/common/device.cuh takes from nvcc and the GPU, in plain C++17 for
// g++.
//
// Every CUDA thread is a fiber with a stack of its own. A fiber runs until it reaches a barrier or a
// warp-level operation; which one goes on is drawn from the seed, so the threads of a warp are NOT in
// lockstep and blocks come in random order. One block is alive at a time: blocks that wait for each other
// cannot run here.
//
// Caught, each ending the program with one sentence (exit status 70) and the places concerned:
//
// - a barrier that not every live thread of the block reaches, or that they reach at different places;
//
// - a warp-level operation that the threads of its mask do not execute together: another operation, another
//   mask, another place, a caller outside its own mask, a thread that waits at a block barrier instead;
//   reading from a lane outside the mask or gone;
//
// - misaligned vector accesses, impossible launches;
//
// - in the "memory" build (AddressSanitizer, UBSan): any access outside an array or the block's shared
// memory,
//   both of exact size between poisoned guards. Shared memory and outputs start as 0xff bytes (NaN);
//
// - in the "races" build: two accesses to one address, one of them writing, with no barrier between (inside a
//   warp warp_sync is one; shuffles and votes order no memory); a read of shared memory that this block has
//   not written; a write to an input; a read-only load of something that the launch also writes. These
//   verdicts do not depend on the order that was drawn, only on what the kernel did with these inputs.
//
// Clusters, bulk copies, barriers and warpgroup products: hopper_emulation.h.
//
// Not shown: memory fences between blocks, speed, and the GPU's rounding of *_approx.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// What comes after device.cuh is not inlined by force: without optimization every copy of a function costs
// g++ seconds under the sanitizers, together half of what compiling takes.
#undef MIPNERF_DEVICE
#undef MIPNERF_HOST_DEVICE
#define MIPNERF_DEVICE inline
#define MIPNERF_HOST_DEVICE inline

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace mipnerf {

using Stream = void*;

namespace emulation {

struct Site {
    const char* file;
    int line;
    static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

enum class WarpOperation : std::uint8_t {
    sync,
    shuffle,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    any,
    all
};

// What a thread hands to a warp-level operation and what it gets back.
struct Exchange {
    alignas(8) unsigned char give[8];
    alignas(8) unsigned char take[8];
    int source_lane;
};

struct Indices {
    dim3 thread, block, block_size, grid_size;
};
extern Indices indices;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void set_seed(std::uint64_t seed);
void block_barrier(Site site);
bool atomics_are_plain();  // a fault that tests ask for
Exchange& exchange();
// Waits until every live thread of `mask` is here, then does the operation for all of them.
void warp_rendezvous(WarpOperation operation, unsigned mask, Site site);
unsigned char* shared_bytes();
// cluster 0: one block at a time. From 1 on, as many blocks along x are alive together, and the asynchronous
// operations of asynchronous.h are there.
void run_grid(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(const void*),
              const void* context, int cluster = 0);

// An array in "device" memory: exactly `bytes` long, `misalignment` bytes past a 256-byte boundary, between
// poisoned guards, filled with 0xff. Lives until the program ends.
void* allocate(const char* name, std::size_t bytes, std::size_t misalignment);
// From now on no kernel may write it.
void make_read_only(const void* address);

#if defined(MIPNERF_EMULATION_RACES)
void note_atomic(const void* address, std::size_t bytes);
void note_read_only_load(const void* address, std::size_t bytes);
#else
inline void note_atomic(const void*, std::size_t) {}
inline void note_read_only_load(const void*, std::size_t) {}
#endif

inline void require_one_dimensional() {
    if (indices.block_size.y * indices.block_size.z != 1)
        fail("lane_index() and warp_index() need a one-dimensional block");
}

template <typename P>
void require_alignment(const void* address, const char* what) {
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(P) != 0)
        fail("misaligned %s of %zu bytes at %p", what, sizeof(P), address);
}

template <int Width>
int segment_start() {
    static_assert(Width > 0 && Width <= 32 && (Width & (Width - 1)) == 0, "Width is a power of two up to 32");
    const dim3 t = indices.thread, b = indices.block_size;
    return static_cast<int>(((t.z * b.y + t.y) * b.x + t.x) % 32) & ~(Width - 1);
}
template <int Width>
int lane_in_segment() {
    const dim3 t = indices.thread, b = indices.block_size;
    return static_cast<int>(((t.z * b.y + t.y) * b.x + t.x) % 32) & (Width - 1);
}

template <typename T>
T swap_values(WarpOperation operation, T value, int source_lane, unsigned mask, Site site) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles move 4 or 8 byte numbers");
    Exchange& mine = exchange();
    memcpy(mine.give, &value, sizeof(T));
    mine.source_lane = source_lane;
    warp_rendezvous(operation, mask, site);
    memcpy(&value, mine.take, sizeof(T));
    return value;
}

inline unsigned vote(WarpOperation operation, bool predicate, unsigned mask, Site site) {
    Exchange& mine = exchange();
    mine.give[0] = predicate;
    warp_rendezvous(operation, mask, site);
    unsigned result;
    memcpy(&result, mine.take, sizeof(result));
    return result;
}

template <typename T>
__attribute__((noinline, no_sanitize_thread)) T fetch_and_add(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <typename T>
__attribute__((noinline, no_sanitize_thread)) T fetch_and_max(T* address, T value) {
    const T old = *address;
    if (old < value) *address = value;
    return old;
}

}  // namespace emulation

namespace detail {

template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream,
            const A&... args) {
    const auto call = [&] { kernel(static_cast<P>(args)...); };
    using Call = decltype(call);
    emulation::run_grid(
        name, grid, block, shared_bytes, [](const void* c) { (*static_cast<const Call*>(c))(); }, &call);
}

}  // namespace detail
}  // namespace mipnerf

#define MIPNERF_LAUNCH(kernel, ...) ::mipnerf::detail::launch(#kernel, kernel, __VA_ARGS__)

namespace mipnerf {

// So few that a kernel whose blocks take one piece of work after the other does so here too.
template <typename... P>
int resident_blocks(void (*)(P...), int, std::size_t) {
    return 2;
}

}  // namespace mipnerf

inline const dim3& threadIdx = mipnerf::emulation::indices.thread;
inline const dim3& blockIdx = mipnerf::emulation::indices.block;
inline const dim3& blockDim = mipnerf::emulation::indices.block_size;
inline const dim3& gridDim = mipnerf::emulation::indices.grid_size;

namespace mipnerf {

MIPNERF_DEVICE int lane_index() {
    emulation::require_one_dimensional();
    return static_cast<int>(threadIdx.x & (kWarpSize - 1));
}
MIPNERF_DEVICE int warp_index() {
    emulation::require_one_dimensional();
    return static_cast<int>(threadIdx.x / kWarpSize);
}
MIPNERF_DEVICE int thread_rank() {
    return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

inline void block_sync(emulation::Site site = emulation::Site::here()) {
    emulation::block_barrier(site);
}
inline void warp_sync(unsigned mask = kFullMask MIPNERF_SITE) {
    emulation::warp_rendezvous(emulation::WarpOperation::sync, mask, site);
}

template <int Width = kWarpSize, typename T>
T warp_shuffle(T value, int lane, unsigned mask = kFullMask MIPNERF_SITE) {
    const int source = emulation::segment_start<Width>() + (lane & (Width - 1));
    return emulation::swap_values(emulation::WarpOperation::shuffle, value, source, mask, site);
}
template <int Width = kWarpSize, typename T>
T warp_shuffle_up(T value, unsigned delta, unsigned mask = kFullMask MIPNERF_SITE) {
    const int lane = emulation::lane_in_segment<Width>(), from = lane - static_cast<int>(delta);
    const int source = emulation::segment_start<Width>() + (from < 0 ? lane : from);
    return emulation::swap_values(emulation::WarpOperation::shuffle_up, value, source, mask, site);
}
template <int Width = kWarpSize, typename T>
T warp_shuffle_down(T value, unsigned delta, unsigned mask = kFullMask MIPNERF_SITE) {
    const int lane = emulation::lane_in_segment<Width>(), from = lane + static_cast<int>(delta);
    const int source = emulation::segment_start<Width>() + (from >= Width ? lane : from);
    return emulation::swap_values(emulation::WarpOperation::shuffle_down, value, source, mask, site);
}
template <int Width = kWarpSize, typename T>
T warp_shuffle_xor(T value, int lane_mask, unsigned mask = kFullMask MIPNERF_SITE) {
    const int lane = emulation::lane_in_segment<Width>(), from = lane ^ lane_mask;
    const int source = emulation::segment_start<Width>() + (from >= Width ? lane : from);
    return emulation::swap_values(emulation::WarpOperation::shuffle_xor, value, source, mask, site);
}

inline unsigned warp_ballot(bool predicate, unsigned mask = kFullMask MIPNERF_SITE) {
    return emulation::vote(emulation::WarpOperation::ballot, predicate, mask, site);
}
inline bool warp_any(bool predicate, unsigned mask = kFullMask MIPNERF_SITE) {
    return emulation::vote(emulation::WarpOperation::any, predicate, mask, site) != 0;
}
inline bool warp_all(bool predicate, unsigned mask = kFullMask MIPNERF_SITE) {
    return emulation::vote(emulation::WarpOperation::all, predicate, mask, site) != 0;
}

template <typename T>
T atomic_add(T* address, T value) {
    emulation::require_alignment<T>(address, "atomic");
    if (emulation::atomics_are_plain()) {
        const T old = *address;
        *address = old + value;
        return old;
    }
    emulation::note_atomic(address, sizeof(T));
    return emulation::fetch_and_add(address, value);
}
template <typename T>
T atomic_max(T* address, T value) {
    emulation::require_alignment<T>(address, "atomic");
    if (emulation::atomics_are_plain()) {
        const T old = *address;
        if (old < value) *address = value;
        return old;
    }
    emulation::note_atomic(address, sizeof(T));
    return emulation::fetch_and_max(address, value);
}

template <int N>
void atomic_add_pack(float* address, const Pack<float, N>& pack) {
    emulation::require_alignment<Pack<float, N>>(address, "atomic");
    for (int i = 0; i < N; ++i) atomic_add(address + i, pack.value[i]);
}

template <typename T>
T* shared_memory(std::size_t byte_offset = 0) {
    unsigned char* start = emulation::shared_bytes() + byte_offset;
    emulation::require_alignment<T>(start, "shared array");
    return reinterpret_cast<T*>(start);
}

template <int N, typename T>
Pack<T, N> load_pack_shared(const T* address) {
    emulation::require_alignment<Pack<T, N>>(address, "load");
    Pack<T, N> pack;
    for (int i = 0; i < N; ++i) pack.value[i] = address[i];
    return pack;
}
template <int N, typename T>
Pack<T, N> load_pack_written(const T* address) {
    return load_pack_shared<N>(address);
}
template <int N, typename T>
Pack<T, N> load_pack(const T* address) {
    emulation::note_read_only_load(address, sizeof(T) * N);
    return load_pack_shared<N>(address);
}
template <typename T, int N>
void store_pack(T* address, const Pack<T, N>& pack) {
    emulation::require_alignment<Pack<T, N>>(address, "store");
    for (int i = 0; i < N; ++i) address[i] = pack.value[i];
}
template <typename T, int N>
void store_pack_shared(T* address, const Pack<T, N>& pack) {
    store_pack(address, pack);
}
template <typename T, int N>
void store_pack_streaming(T* address, const Pack<T, N>& pack) {
    store_pack(address, pack);
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
    return from_bfloat16_bits(x.bits);
}
MIPNERF_DEVICE float to_float(Half x) {
    return from_half_bits(x.bits);
}

template <typename T>
MIPNERF_DEVICE T from_float(float x) {
    return static_cast<T>(x);
}
template <>
MIPNERF_DEVICE Bfloat16 from_float<Bfloat16>(float x) {
    return Bfloat16{to_bfloat16_bits(x)};
}
template <>
MIPNERF_DEVICE Half from_float<Half>(float x) {
    return Half{to_half_bits(x)};
}

namespace detail {

template <typename T>
unsigned pair_bits(float low, float high, T) {
    return from_float<T>(low).bits | (static_cast<unsigned>(from_float<T>(high).bits) << 16);
}

}  // namespace detail

MIPNERF_DEVICE float exp2_approx(float x) {
    return std::exp2(x);
}
MIPNERF_DEVICE float log2_approx(float x) {
    return std::log2(x);
}
MIPNERF_DEVICE float reciprocal_approx(float x) {
    return 1.0f / x;
}
MIPNERF_DEVICE float rsqrt_approx(float x) {
    return 1.0f / std::sqrt(x);
}
MIPNERF_DEVICE float sin_approx(float x) {
    return std::sin(x);
}
MIPNERF_DEVICE float cos_approx(float x) {
    return std::cos(x);
}

MIPNERF_DEVICE int count_bits(unsigned mask) {
    return __builtin_popcount(mask);
}
MIPNERF_DEVICE int lowest_bit(unsigned mask) {
    return __builtin_ctz(mask);
}
MIPNERF_DEVICE int highest_bit(unsigned mask) {
    return 31 - __builtin_clz(mask);
}

}  // namespace mipnerf
