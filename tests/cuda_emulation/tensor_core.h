// csrc/common/tensor_core.cuh on the CPU, from the lane and register maps of the PTX ISA.
//
// Caught beside what cuda_emulation.h lists:
//
// - mma or ldmatrix by less than a whole warp, or by lanes at different places;
//
// - an operand of mma_m16n8k8_tf32 that was not rounded: the tensor core would cut its last 13 bits off;
//
// - an access to bytes that an asynchronous copy may still be writing (in the "races" build whoever reads or
//   writes them, in the "memory" build they are 0xff, NaN, until the wait), and, after the wait, one by
//   another thread with no barrier between;
//
// - a thread that ends with copies that it has not waited for.
//
// Copies land at the last moment, the wait for their group, in an order drawn from the seed. Products are
// summed in double and rounded once; the GPU rounds differently, within the bounds that the tests state.
#pragma once

#include "common/device.cuh"

namespace mipnerf {
namespace emulation {

// Waits until all 32 lanes of the warp are here, then calls perform once with what each of them handed over.
void warp_collective(const char* name, void (*perform)(void* const lanes[32]), void* mine, Site site);

struct MmaLane {
    float* d;
    const unsigned* a;
    unsigned b[2];
};
void perform_mma_bfloat16(void* const lanes[32]);
void perform_mma_half(void* const lanes[32]);
inline void (*mma_of(Bfloat16))(void* const[32]) {
    return perform_mma_bfloat16;
}
inline void (*mma_of(Half))(void* const[32]) {
    return perform_mma_half;
}

struct Tf32Lane {
    float* d;
    float a[4], b[2];
};
void perform_mma_tf32(void* const lanes[32]);
void require_tf32(float operand);

struct MatrixLane {
    Pack<std::uint16_t, 8> row;
    unsigned* result;
};
void perform_ldmatrix(void* const lanes[32]);
void perform_ldmatrix_transposed(void* const lanes[32]);

void issue_copy(void* shared, const void* global, std::size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace emulation

template <typename T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1 MIPNERF_SITE) {
    emulation::MmaLane mine{d, a, {b0, b1}};
    emulation::warp_collective("mma_m16n8k16", emulation::mma_of(T{}), &mine, site);
}

inline float round_to_tf32(float x) {
    const std::uint32_t bits = detail::bit_copy<std::uint32_t>(x);
    const bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
    return detail::bit_copy<float>(is_number ? (bits + 0x1000u) & 0xffffe000u : 0x7fffe000u);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const Pack<float, 4>& a, float b0, float b1 MIPNERF_SITE) {
    emulation::Tf32Lane mine{d, {a.value[0], a.value[1], a.value[2], a.value[3]}, {b0, b1}};
    for (float operand : mine.a) emulation::require_tf32(operand);
    for (float operand : mine.b) emulation::require_tf32(operand);
    emulation::warp_collective("mma_m16n8k8_tf32", emulation::perform_mma_tf32, &mine, site);
}

template <typename T>
unsigned pair_relu(float low, float high) {
    // Not `low > 0 ? low : 0`: a NaN stays one.
    return detail::pair_bits(low <= 0.0f ? 0.0f : low, high <= 0.0f ? 0.0f : high, T{});
}

inline void ldmatrix_x4(unsigned (&r)[4], const void* row MIPNERF_SITE) {
    emulation::MatrixLane mine{load_pack_shared<8>(static_cast<const std::uint16_t*>(row)), r};
    emulation::warp_collective("ldmatrix_x4", emulation::perform_ldmatrix, &mine, site);
}
inline void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row MIPNERF_SITE) {
    emulation::MatrixLane mine{load_pack_shared<8>(static_cast<const std::uint16_t*>(row)), r};
    emulation::warp_collective("ldmatrix_x4_transposed", emulation::perform_ldmatrix_transposed, &mine, site);
}

MIPNERF_DEVICE void async_copy16(void* shared, const void* global, bool valid = true) {
    emulation::require_alignment<Pack<float, 4>>(shared, "asynchronous copy");
    if (valid) emulation::require_alignment<Pack<float, 4>>(global, "asynchronous copy");
    emulation::issue_copy(shared, global, 16, valid);
}
inline void async_commit() {
    emulation::commit_copies();
}
template <int N>
void async_wait() {
    emulation::wait_for_copies(N);
}

}  // namespace mipnerf
