// Kernels that exercise the emulation of tensor_core.cuh, sound and broken; driven by
// tests/test_tensor_core.py.
#include "common/tensor_core.cuh"
#include "program.h"

using namespace mipnerf;

// d = c + a b for row-major a [16, 16], b [16, 8], c and d [16, 8]: the operands by ldmatrix from shared
// memory. Fault 1: one lane stays away from the product. Fault 2: the two halves are at different places.
template <typename T>
__global__ void product_kernel(const T* a, const T* b, const float* c, float* d, int fault) {
    T* shared = shared_memory<T>();
    const int lane = lane_index(), g = lane / 4, q = lane % 4;
    for (int i = lane; i < 256; i += 32) shared[i] = a[i];
    for (int i = lane; i < 128; i += 32) shared[256 + i] = b[i];
    warp_sync();
    unsigned of_a[4], of_b[4];
    ldmatrix_x4(of_a, shared + lane % 16 * 16 + lane / 16 * 8);
    // Both 8 x 8 halves of b, twice.
    ldmatrix_x4_transposed(of_b, shared + 256 + lane % 16 * 8);
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
    if (fault == 1 && lane == 13) return;
    if (fault == 2 && lane < 16)
        mma_m16n8k16<T>(sum, of_a, of_b[0], of_b[1]);
    else
        mma_m16n8k16<T>(sum, of_a, of_b[0], of_b[1]);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = sum[i];
}

// The same for TF32 and 8 columns of a; each operand by the lane that the ISA names. Fault 1: one lane stays
// away. Fault 3: an operand is not rounded.
__global__ void tf32_product_kernel(const float* a, const float* b, const float* c, float* d, int fault) {
    const int g = lane_index() / 4, q = lane_index() % 4;
    Pack<float, 4> of_a;
    float of_b[2], sum[4];
    for (int r = 0; r < 4; ++r) of_a.value[r] = round_to_tf32(a[(g + r % 2 * 8) * 8 + q + r / 2 * 4]);
    for (int r = 0; r < 2; ++r) of_b[r] = round_to_tf32(b[(q + 4 * r) * 8 + g]);
    for (int r = 0; r < 4; ++r) sum[r] = c[(g + r / 2 * 8) * 8 + 2 * q + r % 2];
    if (fault == 1 && lane_index() == 13) return;
    if (fault == 3 && lane_index() == 13) of_b[1] = b[(q + 4) * 8 + g];
    mma_m16n8k8_tf32(sum, of_a, of_b[0], of_b[1]);
    for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * q + r % 2] = sum[r];
}

__global__ void rounded_kernel(const float* x, float* y, int n) {
    for (int i = thread_rank(); i < n; i += kWarpSize) y[i] = round_to_tf32(x[i]);
}

// What each lane gets of four 8 x 8 matrices, straight and transposed.
__global__ void matrices_kernel(const std::uint16_t* x, unsigned* y) {
    std::uint16_t* shared = shared_memory<std::uint16_t>();
    const int lane = lane_index();
    for (int i = lane; i < 256; i += 32) shared[i] = x[i];
    warp_sync();
    unsigned r[4];
    ldmatrix_x4(r, shared + lane * 8);
    for (int j = 0; j < 4; ++j) y[lane * 4 + j] = r[j];
    ldmatrix_x4_transposed(r, shared + lane * 8);
    for (int j = 0; j < 4; ++j) y[128 + lane * 4 + j] = r[j];
}

// Sums over the rounds of the neighbour's numbers, 16 bytes a thread and round, through a ring of three
// stages; past the end of x come zeros.
enum Fault { kSound, kWaitTooShort, kNoBarrier, kStageTooEarly, kNoWait, kPastTheEnd };
__global__ void ring_kernel(const float* x, float* y, int n, int rounds, int fault) {
    constexpr int kStages = 3;
    float* stages = shared_memory<float>();
    const int thread = thread_rank(), threads = static_cast<int>(blockDim.x);
    const auto issue = [&](int round) {
        const int at = (round * threads + thread) * 4;
        const bool valid = fault == kPastTheEnd || at < n;
        if (round < rounds)
            async_copy16(stages + (round % kStages * threads + thread) * 4, x + (valid ? at : 0), valid);
        async_commit();
    };
    float sum[4] = {};
    for (int round = 0; round < kStages - 1; ++round) issue(round);
    for (int round = 0; round < rounds; ++round) {
        if (fault == kWaitTooShort)
            async_wait<kStages - 1>();
        else if (fault != kNoWait)
            async_wait<kStages - 2>();
        if (fault == kStageTooEarly) issue(round + kStages - 1);
        if (fault != kNoBarrier) block_sync();
        if (fault != kStageTooEarly) issue(round + kStages - 1);
        const auto four =
            load_pack_shared<4>(stages + (round % kStages * threads + (thread + 33) % threads) * 4);
        for (int i = 0; i < 4; ++i) sum[i] += four.value[i];
    }
    if (fault != kNoWait) async_wait<0>();
    for (int i = 0; i < 4; ++i) y[thread * 4 + i] = sum[i];
}

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    const std::string kernel = program.text("kernel");
    if (kernel == "product") {
        const auto launch = [&](auto type) {
            using T = decltype(type);
            MIPNERF_LAUNCH(product_kernel<T>, dim3(1), dim3(32), 384 * sizeof(T), nullptr,
                           program.input<T>("a"), program.input<T>("b"), program.input<float>("c"),
                           program.output<float>("d"), static_cast<int>(program.integer("fault")));
        };
        if (program.type("a") == "<f2")
            launch(Half{});
        else
            launch(Bfloat16{});
    } else if (kernel == "tf32_product") {
        MIPNERF_LAUNCH(tf32_product_kernel, dim3(1), dim3(32), 0, nullptr, program.input<float>("a"),
                       program.input<float>("b"), program.input<float>("c"), program.output<float>("d"),
                       static_cast<int>(program.integer("fault")));
    } else if (kernel == "rounded") {
        MIPNERF_LAUNCH(rounded_kernel, dim3(1), dim3(32), 0, nullptr, program.input<float>("x"),
                       program.output<float>("y"), static_cast<int>(program.size("x", 0)));
    } else if (kernel == "matrices") {
        MIPNERF_LAUNCH(matrices_kernel, dim3(1), dim3(32), 512, nullptr,
                       reinterpret_cast<const std::uint16_t*>(program.input<Half>("x")),
                       program.output<unsigned>("y"));
    } else if (kernel == "ring") {
        const auto threads = static_cast<unsigned>(program.size("y", 0) / 4);
        MIPNERF_LAUNCH(ring_kernel, dim3(1), dim3(threads), threads * 48, nullptr, program.input<float>("x"),
                       program.output<float>("y"), static_cast<int>(program.size("x", 0)),
                       static_cast<int>(program.integer("rounds")),
                       static_cast<int>(program.integer("fault")));
    } else {
        emulation::fail("no kernel '%s'", kernel.c_str());
    }
}
