// What only compute capability 9.0a has: warpgroup matrix products, barriers that count bytes, bulk copies
// with multicast, clusters. The second and last file with inline assembly; its twin on the CPU is
// tests/cuda_emulation/hopper_emulation.h.
//
// clang-format off
//
// Contents (namespace mipnerf::hopper unless said)
//
//   mipnerf::MIPNERF_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, args...)
//   MIPNERF_CLUSTER(n)                   attribute of such a kernel: n blocks of a cluster
//   mipnerf::multiprocessors()           of the current device
//   cluster_rank(), cluster_sync()       every thread of every block of the cluster; orders memory
//   raise_registers<R>(), lower_registers<R>()           setmaxnreg, by a whole warpgroup
//
//   Barrier                              an mbarrier, 8 bytes of shared memory. A phase completes when all
//                                        arrivals and all expected bytes have come
//   barrier_init(b, arrivals), barrier_init_fence()      by one thread, then block_sync or cluster_sync
//   barrier_arrive(b)                    at this block's
//   barrier_arrive_at(b, block)          at the barrier in the same place of a block of the cluster
//   barrier_arrive_expect(b, bytes)      arrives and announces bytes of copies
//   barrier_wait(b, parity)              until the phase of that parity (0, 1, 0, ...) has completed; parity 1
//                                        passes a new barrier
//   copy_bulk(to, from, bytes, b)        global to shared memory, 16-byte aligned, by the copy engine
//   copy_bulk_multicast(to, from, bytes, b, blocks)      to the same place of every block in the bit mask,
//                                        counted by the barrier in the same place there
//   proxy_fence()                        between ordinary writes to shared memory and products that read them;
//                                        by each writing thread, before its arrival
//
//   Major::k, Major::mn                  whether 8 consecutive k, or 8 consecutive rows (of A; columns of B), lie
//                                        together
//   operand_descriptor(p, leading, stride), decode_descriptor(d)       unswizzled; both strides in bytes.
//                                        An operand consists of core matrices, 8 x 16 bytes in a row.
//                                        stride: to the next 8 rows of A (columns of B); leading: to the next 8 k
//   wgmma_registers<T, N>(d, a, B, accumulate)           d[64, N] (+)= a[64, 16] B[16, N], B with Major::k
//   wgmma_shared<T, N, MajorA, MajorB>(d, A, B, accumulate)            both operands in shared memory
//   wgmma_hold(registers)                 an array of sums or of a, before the fence and after the wait: keeps the
//                                        compiler from moving them between
//   wgmma_fence()                        before products whose registers were touched since the last wait
//   wgmma_commit(), wgmma_wait<G>()      closes a group; until at most G groups are under way
//
//   spread_signs<Half>(word)             the signs of bytes 2 Half and 2 Half + 1 as 16 bits each
//
// clang-format on
//
// A product belongs to the 128 threads of a warpgroup. Thread t = 32 w + 4 g + q holds of d, for every
// j < N / 8: rows 16 w + g and 16 w + g + 8, columns 8 j + 2 q and the next, as d[4 j], d[4 j + 1] and d[4 j
// + 2], d[4 j + 3]; of a: the same rows, columns 2 q and the next in a[0] and a[1], 8 further in a[2] and
// a[3]. So d of one product, packed in pairs, is a of the next: a[i] = pair(d[2 i], d[2 i + 1]), 4 words for
// 16 columns.
#pragma once

#include "device.cuh"

namespace mipnerf {
namespace hopper {

constexpr int kWarpgroup = 128;

struct alignas(8) Barrier {
    std::uint64_t state;
};

enum class Major { k = 0, mn = 1 };

// Fields of 14 bits in units of 16 bytes: start at bit 0, leading at 16, stride at 32. Bits 62 and 63 would
// choose a swizzle, bits 49 to 51 the place inside of one.
struct OperandLayout {
    unsigned address, leading, stride, swizzle;
};

MIPNERF_HOST_DEVICE std::uint64_t encode_descriptor(const OperandLayout& layout) {
    return (std::uint64_t{layout.address} & 0x3ffffu) >> 4 |
           (std::uint64_t{layout.leading} & 0x3ffffu) >> 4 << 16 |
           (std::uint64_t{layout.stride} & 0x3ffffu) >> 4 << 32 | std::uint64_t{layout.swizzle} << 62;
}
MIPNERF_HOST_DEVICE OperandLayout decode_descriptor(std::uint64_t descriptor) {
    return {static_cast<unsigned>(descriptor & 0x3fffu) << 4,
            static_cast<unsigned>(descriptor >> 16 & 0x3fffu) << 4,
            static_cast<unsigned>(descriptor >> 32 & 0x3fffu) << 4, static_cast<unsigned>(descriptor >> 62)};
}
// The operand `bytes` further on.
MIPNERF_HOST_DEVICE std::uint64_t advance(std::uint64_t descriptor, unsigned bytes) {
    return descriptor + (bytes >> 4);
}

}  // namespace hopper
}  // namespace mipnerf

#if defined(__CUDACC__)

#define MIPNERF_CLUSTER(n) __cluster_dims__(n, 1, 1)
#define MIPNERF_LAUNCH_CLUSTERS(kernel, cluster, ...) \
    ::mipnerf::detail::launch_clusters(#kernel, kernel, cluster, __VA_ARGS__)

namespace mipnerf {

namespace detail {

// The cluster's size is an attribute of the kernel.
template <typename... P, typename... A>
void launch_clusters(const char* name, void (*kernel)(P...), int cluster, dim3 grid, const A&... rest) {
    if (grid.x % static_cast<unsigned>(cluster) != 0)
        throw std::runtime_error(std::string(name) + ": the grid is not a multiple of the cluster");
    launch(name, kernel, grid, rest...);
}

}  // namespace detail

inline int multiprocessors() {
    int device = 0, count = 0;
    detail::check_cuda(cudaGetDevice(&device), "multiprocessors");
    detail::check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
                       "multiprocessors");
    return count;
}

namespace hopper {

MIPNERF_DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// ---- clusters and registers ---------------------------------------------------------------------

MIPNERF_DEVICE int cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
MIPNERF_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <int Registers>
MIPNERF_DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
MIPNERF_DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- barriers and copies ------------------------------------------------------------------------

MIPNERF_DEVICE void barrier_init(Barrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
MIPNERF_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
MIPNERF_DEVICE void barrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
MIPNERF_DEVICE void barrier_arrive_at(Barrier* barrier, int block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}
MIPNERF_DEVICE void barrier_arrive_expect(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
MIPNERF_DEVICE void barrier_wait(Barrier* barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
MIPNERF_DEVICE void copy_bulk(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
MIPNERF_DEVICE void copy_bulk_multicast(void* to, const void* from, unsigned bytes, Barrier* barrier,
                                        unsigned blocks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], "
        "%2, "
        "[%3], %4;" ::"r"(shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)),
        "h"(static_cast<std::uint16_t>(blocks))
        : "memory");
}
MIPNERF_DEVICE void proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- matrix products ----------------------------------------------------------------------------

template <int N>
MIPNERF_DEVICE void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
MIPNERF_DEVICE void wgmma_hold(unsigned (&a)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
MIPNERF_DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
MIPNERF_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Groups>
MIPNERF_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}

template <int Half>
MIPNERF_DEVICE unsigned spread_signs(unsigned word) {
    unsigned y;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(word), "n"(Half == 0 ? 0x9988 : 0xbbaa));
    return y;
}

template <typename T, int N>
struct Wgmma;  // registers(d, a, b, accumulate) and shared<MajorA, MajorB>(d, a, b, accumulate)

// Operand lists of the accumulators, four at a time: their places in the assembly and the registers.
// clang-format off
#define MIPNERF_P0 "%0, %1, %2, %3"
#define MIPNERF_P1 "%4, %5, %6, %7"
#define MIPNERF_P2 "%8, %9, %10, %11"
#define MIPNERF_P3 "%12, %13, %14, %15"
#define MIPNERF_P4 "%16, %17, %18, %19"
#define MIPNERF_P5 "%20, %21, %22, %23"
#define MIPNERF_P6 "%24, %25, %26, %27"
#define MIPNERF_P7 "%28, %29, %30, %31"
#define MIPNERF_P8 "%32, %33, %34, %35"
#define MIPNERF_P9 "%36, %37, %38, %39"
#define MIPNERF_P10 "%40, %41, %42, %43"
#define MIPNERF_P11 "%44, %45, %46, %47"
#define MIPNERF_P12 "%48, %49, %50, %51"
#define MIPNERF_P13 "%52, %53, %54, %55"
#define MIPNERF_P14 "%56, %57, %58, %59"
#define MIPNERF_P15 "%60, %61, %62, %63"
#define MIPNERF_P16 "%64, %65, %66, %67"
#define MIPNERF_P17 "%68, %69, %70, %71"
#define MIPNERF_P18 "%72, %73, %74, %75"
#define MIPNERF_P19 "%76, %77, %78, %79"
#define MIPNERF_P20 "%80, %81, %82, %83"
#define MIPNERF_P21 "%84, %85, %86, %87"
#define MIPNERF_P22 "%88, %89, %90, %91"
#define MIPNERF_P23 "%92, %93, %94, %95"
#define MIPNERF_P24 "%96, %97, %98, %99"
#define MIPNERF_P25 "%100, %101, %102, %103"
#define MIPNERF_P26 "%104, %105, %106, %107"
#define MIPNERF_P27 "%108, %109, %110, %111"
#define MIPNERF_P28 "%112, %113, %114, %115"
#define MIPNERF_P29 "%116, %117, %118, %119"
#define MIPNERF_P30 "%120, %121, %122, %123"
#define MIPNERF_P31 "%124, %125, %126, %127"
#define MIPNERF_R(i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define MIPNERF_PLACES_4 \
    MIPNERF_P0
#define MIPNERF_REGISTERS_4 \
    MIPNERF_R(0)
#define MIPNERF_PLACES_16 \
    MIPNERF_PLACES_4 ", " MIPNERF_P1 ", " MIPNERF_P2 ", " MIPNERF_P3
#define MIPNERF_REGISTERS_16 \
    MIPNERF_REGISTERS_4, MIPNERF_R(1), MIPNERF_R(2), MIPNERF_R(3)
#define MIPNERF_PLACES_20 \
    MIPNERF_PLACES_16 ", " MIPNERF_P4
#define MIPNERF_REGISTERS_20 \
    MIPNERF_REGISTERS_16, MIPNERF_R(4)
#define MIPNERF_PLACES_24 \
    MIPNERF_PLACES_20 ", " MIPNERF_P5
#define MIPNERF_REGISTERS_24 \
    MIPNERF_REGISTERS_20, MIPNERF_R(5)
#define MIPNERF_PLACES_32 \
    MIPNERF_PLACES_24 ", " MIPNERF_P6 ", " MIPNERF_P7
#define MIPNERF_REGISTERS_32 \
    MIPNERF_REGISTERS_24, MIPNERF_R(6), MIPNERF_R(7)
#define MIPNERF_PLACES_36 \
    MIPNERF_PLACES_32 ", " MIPNERF_P8
#define MIPNERF_REGISTERS_36 \
    MIPNERF_REGISTERS_32, MIPNERF_R(8)
#define MIPNERF_PLACES_48 \
    MIPNERF_PLACES_36 ", " MIPNERF_P9 ", " MIPNERF_P10 ", " MIPNERF_P11
#define MIPNERF_REGISTERS_48 \
    MIPNERF_REGISTERS_36, MIPNERF_R(9), MIPNERF_R(10), MIPNERF_R(11)
#define MIPNERF_PLACES_64 \
    MIPNERF_PLACES_48 ", " MIPNERF_P12 ", " MIPNERF_P13 ", " MIPNERF_P14 ", " MIPNERF_P15
#define MIPNERF_REGISTERS_64 \
    MIPNERF_REGISTERS_48, MIPNERF_R(12), MIPNERF_R(13), MIPNERF_R(14), MIPNERF_R(15)
#define MIPNERF_PLACES_68 \
    MIPNERF_PLACES_64 ", " MIPNERF_P16
#define MIPNERF_REGISTERS_68 \
    MIPNERF_REGISTERS_64, MIPNERF_R(16)
#define MIPNERF_PLACES_128 \
    MIPNERF_PLACES_68 ", " MIPNERF_P17 ", " MIPNERF_P18 ", " MIPNERF_P19 ", " MIPNERF_P20 ", " \
    MIPNERF_P21 ", " MIPNERF_P22 ", " MIPNERF_P23 ", " MIPNERF_P24 ", " MIPNERF_P25 ", " \
    MIPNERF_P26 ", " MIPNERF_P27 ", " MIPNERF_P28 ", " MIPNERF_P29 ", " MIPNERF_P30 ", " MIPNERF_P31
#define MIPNERF_REGISTERS_128 \
    MIPNERF_REGISTERS_68, MIPNERF_R(17), MIPNERF_R(18), MIPNERF_R(19), MIPNERF_R(20), MIPNERF_R(21), \
    MIPNERF_R(22), MIPNERF_R(23), MIPNERF_R(24), MIPNERF_R(25), MIPNERF_R(26), MIPNERF_R(27), \
    MIPNERF_R(28), MIPNERF_R(29), MIPNERF_R(30), MIPNERF_R(31)

// p0 .. p6: the numbers of the operands after the accumulators.
#define MIPNERF_WGMMA(T, type, N, half, p0, p1, p2, p3, p4, p5)                                            \
    template <>                                                                                            \
    struct Wgmma<T, N> {                                                                                   \
        static MIPNERF_DEVICE void registers(float (&d)[half], const unsigned* a, std::uint64_t b,         \
                                             int accumulate) {                                             \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {"               \
                         MIPNERF_PLACES_##half "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4         \
                         ", p, 1, 1, 0;\n}"                                                                \
                         : MIPNERF_REGISTERS_##half                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));            \
        }                                                                                                  \
        template <Major A, Major B>                                                                        \
        static MIPNERF_DEVICE void shared(float (&d)[half], std::uint64_t a, std::uint64_t b,              \
                                          int accumulate) {                                                \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                                 \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {"               \
                         MIPNERF_PLACES_##half "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";\n}"     \
                         : MIPNERF_REGISTERS_##half                                                        \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(A)),                       \
                           "n"(static_cast<int>(B)));                                                      \
        }                                                                                                  \
    };
#define MIPNERF_WGMMA_TYPES(N, half, ...)                   \
    MIPNERF_WGMMA(Bfloat16, "bf16", N, half, __VA_ARGS__)   \
    MIPNERF_WGMMA(Half, "f16", N, half, __VA_ARGS__)
MIPNERF_WGMMA_TYPES(8, 4, 4, 5, 6, 7, 8, 9)
MIPNERF_WGMMA_TYPES(32, 16, 16, 17, 18, 19, 20, 21)
MIPNERF_WGMMA_TYPES(40, 20, 20, 21, 22, 23, 24, 25)
MIPNERF_WGMMA_TYPES(48, 24, 24, 25, 26, 27, 28, 29)
MIPNERF_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37)
MIPNERF_WGMMA_TYPES(72, 36, 36, 37, 38, 39, 40, 41)
MIPNERF_WGMMA_TYPES(96, 48, 48, 49, 50, 51, 52, 53)
MIPNERF_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69)
MIPNERF_WGMMA_TYPES(136, 68, 68, 69, 70, 71, 72, 73)
MIPNERF_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133)
// clang-format on

#undef MIPNERF_WGMMA_TYPES
#undef MIPNERF_WGMMA
#undef MIPNERF_R
#undef MIPNERF_PLACES_4
#undef MIPNERF_REGISTERS_4
#undef MIPNERF_PLACES_16
#undef MIPNERF_REGISTERS_16
#undef MIPNERF_PLACES_20
#undef MIPNERF_REGISTERS_20
#undef MIPNERF_PLACES_24
#undef MIPNERF_REGISTERS_24
#undef MIPNERF_PLACES_32
#undef MIPNERF_REGISTERS_32
#undef MIPNERF_PLACES_36
#undef MIPNERF_REGISTERS_36
#undef MIPNERF_PLACES_48
#undef MIPNERF_REGISTERS_48
#undef MIPNERF_PLACES_64
#undef MIPNERF_REGISTERS_64
#undef MIPNERF_PLACES_68
#undef MIPNERF_REGISTERS_68
#undef MIPNERF_PLACES_128
#undef MIPNERF_REGISTERS_128
#undef MIPNERF_P0
#undef MIPNERF_P1
#undef MIPNERF_P2
#undef MIPNERF_P3
#undef MIPNERF_P4
#undef MIPNERF_P5
#undef MIPNERF_P6
#undef MIPNERF_P7
#undef MIPNERF_P8
#undef MIPNERF_P9
#undef MIPNERF_P10
#undef MIPNERF_P11
#undef MIPNERF_P12
#undef MIPNERF_P13
#undef MIPNERF_P14
#undef MIPNERF_P15
#undef MIPNERF_P16
#undef MIPNERF_P17
#undef MIPNERF_P18
#undef MIPNERF_P19
#undef MIPNERF_P20
#undef MIPNERF_P21
#undef MIPNERF_P22
#undef MIPNERF_P23
#undef MIPNERF_P24
#undef MIPNERF_P25
#undef MIPNERF_P26
#undef MIPNERF_P27
#undef MIPNERF_P28
#undef MIPNERF_P29
#undef MIPNERF_P30
#undef MIPNERF_P31

template <typename T, int N>
MIPNERF_DEVICE void wgmma_registers(float (&d)[N / 2], const unsigned* a, std::uint64_t b, bool accumulate) {
    Wgmma<T, N>::registers(d, a, b, accumulate);
}
template <typename T, int N, Major A, Major B>
MIPNERF_DEVICE void wgmma_shared(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
    Wgmma<T, N>::template shared<A, B>(d, a, b, accumulate);
}

}  // namespace hopper
}  // namespace mipnerf

#else

#define MIPNERF_CLUSTER(n)
#define MIPNERF_LAUNCH_CLUSTERS(kernel, cluster, ...) \
    ::mipnerf::detail::launch_clusters(#kernel, kernel, cluster, __VA_ARGS__)

#include "hopper_emulation.h"

#endif

namespace mipnerf {
namespace hopper {

MIPNERF_DEVICE std::uint64_t operand_descriptor(const void* operand, unsigned leading, unsigned stride) {
    return encode_descriptor({shared_address(operand), leading, stride, 0});
}

}  // namespace hopper
}  // namespace mipnerf
