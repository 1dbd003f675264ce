// Tensor-core products of a warp, and copies to shared memory that go on beside the program: compute
// capability 8.0 and higher. Beside device.cuh the only file with assembly; the emulation has the same
// functions in tests/cuda_emulation/tensor_core.h.
//
// clang-format off
//
//   mma_m16n8k16<T>(d, a, b0, b1)        d += a b for T = Bfloat16 or Half, sums in float. Of lane i, with g = i / 4
//                                        and q = i % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//                                          a[0]: row g,   columns 2q, 2q+1      a[2]: row g,   columns 2q+8, 2q+9
//                                          a[1]: row g+8, columns 2q, 2q+1      a[3]: row g+8, columns 2q+8, 2q+9
//                                          b0: rows 2q, 2q+1, column g          b1: rows 2q+8, 2q+9, column g
//                                          d[0], d[1]: row g, columns 2q, 2q+1  d[2], d[3]: row g+8, the same
//   mma_m16n8k8_tf32(d, a, b0, b1)       d += a b of floats that round_to_tf32 has rounded, sums in float. Of lane i
//                                        (PTX ISA, "Matrix fragments for mma.m16n8k8"):
//                                          a[0]: row g,   column q              a[2]: row g,   column q+4
//                                          a[1]: row g+8, column q              a[3]: row g+8, column q+4
//                                          b0: row q, column g                  b1: row q+4, column g
//                                          d as above
//   round_to_tf32(x)                     to the nearest number of 10 fraction bits, ties away from zero; infinities and
//                                        NaN stay. Its last 13 bits, which products do not read, mean nothing
//   pair_relu<T>(low, high)              max(x, 0) of two floats rounded to T, in one register; NaN stays NaN
//   passes_relu(x)                       whether a gradient goes through the ReLU: where x > 0 or x is NaN
//   ldmatrix_x4(r, row)                  four 8 x 8 matrices of 16-bit numbers from shared memory: lane i gives
//                                        the address of row i % 8 of matrix i / 8 (16 bytes, aligned) and gets in
//                                        r[j] of matrix j row g, columns 2q and 2q+1
//   ldmatrix_x4_transposed(r, row)       the same of the transposed matrices: rows 2q and 2q+1, column g
//   async_copy16(shared, global, valid)  16 bytes to shared memory, zeros where not valid; lands some time before
//                                        the async_wait that waits for its group returns, and is then seen by the
//                                        thread that waited; by the others after a barrier
//   async_commit()                       the copies since the last commit are a group, which may be empty
//   async_wait<N>()                      until all but the N latest groups of this thread have landed
//
// clang-format on
//
// mma_m16n8k8_tf32 compiles for 7.5 too, where a kernel that calls it stops.
//
// mma and ldmatrix are executed by all 32 lanes of a warp together.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)

namespace mipnerf {
namespace detail {

MIPNERF_DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

MIPNERF_DEVICE void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MIPNERF_DEVICE void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace detail

template <typename T>
MIPNERF_DEVICE void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    detail::mma_m16n8k16(d, a, b0, b1, T{});
}

// What cvt.rna.tf32.f32 does, but for clearing the 13 bits, which costs an instruction. (A NaN has to be told
// apart: 0x7fffffff would become a zero.)
MIPNERF_DEVICE float round_to_tf32(float x) {
    return fabsf(x) < __int_as_float(0x7f800000) ? __uint_as_float(__float_as_uint(x) + 0x1000u) : x;
}

MIPNERF_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const Pack<float, 4>& a, float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a.value[0])), "r"(__float_as_uint(a.value[1])),
          "r"(__float_as_uint(a.value[2])), "r"(__float_as_uint(a.value[3])), "r"(__float_as_uint(b0)),
          "r"(__float_as_uint(b1)));
#else
    __trap();  // kernels for several architectures contain it; launches are by capability
#endif
}

template <typename T>
MIPNERF_DEVICE unsigned pair_relu(float low, float high);
template <>
MIPNERF_DEVICE unsigned pair_relu<Bfloat16>(float low, float high) {
    unsigned y;
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
MIPNERF_DEVICE unsigned pair_relu<Half>(float low, float high) {
    unsigned y;
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

MIPNERF_DEVICE void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
}
MIPNERF_DEVICE void ldmatrix_x4_transposed(unsigned (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(detail::shared_address(row))
                 : "memory");
}

MIPNERF_DEVICE void async_copy16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(detail::shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
MIPNERF_DEVICE void async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
MIPNERF_DEVICE void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace mipnerf

#else

#include "tensor_core.h"

#endif

namespace mipnerf {

// Not `x > 0`: behind a NaN no gradient is zero.
MIPNERF_DEVICE bool passes_relu(float x) {
    return !(x <= 0.0f);
}

}  // namespace mipnerf
