// The emulation's side of csrc/common/hopper.cuh: the same functions, from the PTX documentation. Included by
// it.
//
// Nothing asynchronous happens when it is asked for:
//
// - A bulk copy lands, one block of its multicast after the other, at moments drawn from the seed between its
//   issue and the completion of its barrier; until then its destination holds 0xff bytes (NaN).
//
// - A matrix product reads shared memory at a moment drawn between its issue and the wait that covers it,
//   products with different accumulators in any order. Until that wait its accumulators hold NaN; a thread
//   that writes them, or the registers of operand A, is found at the wait.
//
// Caught besides (always, whatever was drawn): a product that reads what no completed copy has brought, or
// what a copy may be replacing; a copy to where a product, a thread or another copy may still be at work; in
// the "races" build, an ordinary access to such memory, and ordinary writes that a product reads without a
// proxy_fence. The order of events comes from vector clocks over threads, warpgroups and barriers, never from
// the order that was drawn. Further: a warpgroup that does not execute its operations together; products
// without wgmma_fence; more arrivals at a barrier than it was made for, arrivals at and copies to a block
// that has ended, a block that ends with copies or products under way, misaligned copies and descriptors,
// descriptors that leave shared memory.
//
// Not shown: whether the documented layouts are what the silicon reads (the same hand wrote both sides),
// swizzled operands (refused), the order of the tensor cores' additions, registers, and speed.
#pragma once

namespace mipnerf {
namespace emulation {

struct Product {
    int n = 0;  // m64 n k16
    bool is_half = false, a_in_registers = false, a_is_mn_major = false, b_is_mn_major = false;
    bool accumulate = false;
    std::uint64_t a = 0, b = 0;
    float* accumulator = nullptr;         // of this thread: n / 2
    const unsigned* registers = nullptr;  // of this thread: 4
};

void wgmma_product(const Product& product, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups, Site site);
void warpgroup_registers(int registers, Site site);

void barrier_init(void* barrier, unsigned arrivals);
void barrier_arrive(void* barrier, int block, unsigned expected_bytes, Site site);  // block -1: its own
void barrier_wait(void* barrier, unsigned parity, Site site);
void copy_bulk(void* to, const void* from, unsigned bytes, void* barrier, unsigned blocks, Site site);
void cluster_sync(Site site);
int cluster_rank();
void proxy_fence();
unsigned shared_address(const void* pointer);
int multiprocessors();
// How many multiprocessors launches see; a test's, so that a block gets several tiles.
void set_multiprocessors(int count);

}  // namespace emulation

namespace detail {

template <typename... P, typename... A>
void launch_clusters(const char* name, void (*kernel)(P...), int cluster, dim3 grid, dim3 block,
                     std::size_t shared_bytes, Stream, const A&... args) {
    const auto call = [&] { kernel(static_cast<P>(args)...); };
    using Call = decltype(call);
    emulation::run_grid(
        name, grid, block, shared_bytes, [](const void* c) { (*static_cast<const Call*>(c))(); }, &call,
        cluster);
}

}  // namespace detail

inline int multiprocessors() {
    return emulation::multiprocessors();
}

namespace hopper {

inline void barrier_init(Barrier* barrier, unsigned arrivals) {
    emulation::barrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(Barrier* barrier MIPNERF_SITE) {
    emulation::barrier_arrive(barrier, -1, 0, site);
}
inline void barrier_arrive_at(Barrier* barrier, int block MIPNERF_SITE) {
    emulation::barrier_arrive(barrier, block, 0, site);
}
inline void barrier_arrive_expect(Barrier* barrier, unsigned bytes MIPNERF_SITE) {
    emulation::barrier_arrive(barrier, -1, bytes, site);
}
inline void barrier_wait(Barrier* barrier, unsigned parity MIPNERF_SITE) {
    emulation::barrier_wait(barrier, parity, site);
}
inline void copy_bulk(void* to, const void* from, unsigned bytes, Barrier* barrier MIPNERF_SITE) {
    emulation::copy_bulk(to, from, bytes, barrier, 0, site);
}
inline void copy_bulk_multicast(void* to, const void* from, unsigned bytes, Barrier* barrier,
                                unsigned blocks MIPNERF_SITE) {
    emulation::copy_bulk(to, from, bytes, barrier, blocks, site);
}
inline int cluster_rank() {
    return emulation::cluster_rank();
}
inline void cluster_sync(emulation::Site site = emulation::Site::here()) {
    emulation::cluster_sync(site);
}
inline void proxy_fence() {
    emulation::proxy_fence();
}
template <int Registers>
void raise_registers(emulation::Site site = emulation::Site::here()) {
    emulation::warpgroup_registers(Registers, site);
}
template <int Registers>
void lower_registers(emulation::Site site = emulation::Site::here()) {
    emulation::warpgroup_registers(Registers, site);
}
inline unsigned shared_address(const void* pointer) {
    return emulation::shared_address(pointer);
}

template <int Half>
unsigned spread_signs(unsigned word) {
    const unsigned low = word >> (16 * Half + 7) & 1u, high = word >> (16 * Half + 15) & 1u;
    return (low ? 0x0000ffffu : 0u) | (high ? 0xffff0000u : 0u);
}

template <typename T, int N>
void wgmma_hold(T (&)[N]) {}
inline void wgmma_fence(emulation::Site site = emulation::Site::here()) {
    emulation::wgmma_fence(site);
}
inline void wgmma_commit(emulation::Site site = emulation::Site::here()) {
    emulation::wgmma_commit(site);
}
template <int Groups>
void wgmma_wait(emulation::Site site = emulation::Site::here()) {
    emulation::wgmma_wait(Groups, site);
}

template <typename T, int N>
void wgmma_registers(float (&d)[N / 2], const unsigned* a, std::uint64_t b, bool accumulate MIPNERF_SITE) {
    emulation::Product product;
    product.n = N;
    product.is_half = std::is_same<T, Half>::value;
    product.a_in_registers = true;
    product.accumulate = accumulate;
    product.b = b;
    product.accumulator = d;
    product.registers = a;
    emulation::wgmma_product(product, site);
}
template <typename T, int N, Major A, Major B>
void wgmma_shared(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate MIPNERF_SITE) {
    emulation::Product product;
    product.n = N;
    product.is_half = std::is_same<T, Half>::value;
    product.a_is_mn_major = A == Major::mn;
    product.b_is_mn_major = B == Major::mn;
    product.accumulate = accumulate;
    product.a = a;
    product.b = b;
    product.accumulator = d;
    emulation::wgmma_product(product, site);
}

}  // namespace hopper
}  // namespace mipnerf
