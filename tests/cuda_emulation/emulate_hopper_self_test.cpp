// Kernels that exercise the emulation of csrc/common/hopper.cuh, and twins of a small pipeline that differ in
// one fault each; driven by tests/test_hopper_emulation.py.
#include "common/hopper.cuh"
#include "program.h"

using namespace mipnerf;
using namespace mipnerf::hopper;

namespace {

constexpr int kSteps = 3;  // of 16 k

// Where element (row, k) of an operand lies, in elements: core matrices one octet of rows after the other,
// then the next 8 k.
int element(bool is_mn_major, int rows, int row, int k) {
    const int matrix = (k / 8 * (rows / 8) + row / 8) * 64;
    return matrix + (is_mn_major ? k % 8 * 8 + row % 8 : row % 8 * 8 + k % 8);
}

// d[64, N] = c + a[64, 48] b[N, 48]^T by one warpgroup, the operands written by its own threads.
template <typename T, int N, bool Registers, bool MnMajor>
__global__ void product_kernel(const T* a, const T* b, const float* c, float* d) {
    T* shared_a = shared_memory<T>();
    T* shared_b = shared_memory<T>(64 * 16 * kSteps * sizeof(T));
    const int t = thread_rank();
    for (int i = t; i < 64 * 16 * kSteps; i += kWarpgroup)
        shared_a[element(MnMajor, 64, i / (16 * kSteps), i % (16 * kSteps))] = a[i];
    for (int i = t; i < N * 16 * kSteps; i += kWarpgroup)
        shared_b[element(MnMajor, N, i / (16 * kSteps), i % (16 * kSteps))] = b[i];
    proxy_fence();
    block_sync();
    const int row = 16 * (t / 32) + t % 32 / 4, column = 2 * (t % 4);
    float sums[N / 2];
    for (int i = 0; i < N / 2; ++i)
        sums[i] = c != nullptr ? c[(row + 8 * (i / 2 % 2)) * N + column + 8 * (i / 4) + i % 2] : 0.0f;
    unsigned registers[4 * kSteps];
    for (int i = 0; i < 4 * kSteps; ++i) {
        const T* pair = a + (row + 8 * (i % 2)) * 16 * kSteps + 16 * (i / 4) + column + 8 * (i % 4 / 2);
        registers[i] = pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
    }
    constexpr Major major = MnMajor ? Major::mn : Major::k;
    const std::uint64_t of_a = operand_descriptor(shared_a, 64 / 8 * 128, 128);
    const std::uint64_t of_b = operand_descriptor(shared_b, N / 8 * 128, 128);
    wgmma_fence();
    for (int step = 0; step < kSteps; ++step) {
        const std::uint64_t here = advance(of_b, static_cast<unsigned>(step * 2 * N / 8 * 128));
        const bool accumulate = c != nullptr || step > 0;
        if constexpr (Registers)
            wgmma_registers<T, N>(sums, registers + 4 * step, here, accumulate);
        else
            wgmma_shared<T, N, major, major>(
                sums, advance(of_a, static_cast<unsigned>(step * 2 * 64 / 8 * 128)), here, accumulate);
    }
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) d[(row + 8 * (i / 2 % 2)) * N + column + 8 * (i / 4) + i % 2] = sums[i];
}

template <typename T, int N>
void run_product(const emulation::Program& program) {
    const T* a = program.input<T>("a");
    const T* b = program.input<T>("b");
    const float* c = program.input<float>("c");
    float* d = program.output<float>("d");
    const std::size_t bytes = (64 + N) * 16 * kSteps * sizeof(T);
    if (program.text("mode") == "registers")
        MIPNERF_LAUNCH_CLUSTERS((product_kernel<T, N, true, false>), 1, dim3(1), dim3(128), bytes, nullptr, a,
                                b, c, d);
    else if (program.text("mode") == "k")
        MIPNERF_LAUNCH_CLUSTERS((product_kernel<T, N, false, false>), 1, dim3(1), dim3(128), bytes, nullptr,
                                a, b, c, d);
    else
        MIPNERF_LAUNCH_CLUSTERS((product_kernel<T, N, false, true>), 1, dim3(1), dim3(128), bytes, nullptr, a,
                                b, c, d);
}

template <typename T>
void run_product_of_width(const emulation::Program& program) {
    switch (program.size("b", 0)) {
        case 8:
            return run_product<T, 8>(program);
        case 32:
            return run_product<T, 32>(program);
        case 40:
            return run_product<T, 40>(program);
        case 48:
            return run_product<T, 48>(program);
        case 64:
            return run_product<T, 64>(program);
        case 72:
            return run_product<T, 72>(program);
        case 96:
            return run_product<T, 96>(program);
        case 128:
            return run_product<T, 128>(program);
        case 136:
            return run_product<T, 136>(program);
        case 256:
            return run_product<T, 256>(program);
        default:
            emulation::fail("no product of this width");
    }
}

// Fields of descriptors there and back.
void run_descriptors(const emulation::Program& program) {
    const std::uint32_t* fields = program.input<std::uint32_t>("fields");
    std::uint64_t* words = program.output<std::uint64_t>("words");
    std::uint32_t* back = program.output<std::uint32_t>("back");
    for (std::int64_t i = 0; i < program.size("fields", 0); ++i) {
        words[i] =
            encode_descriptor({fields[4 * i], fields[4 * i + 1], fields[4 * i + 2], fields[4 * i + 3]});
        const OperandLayout layout = decode_descriptor(advance(words[i], 32));
        back[4 * i] = layout.address - 32;
        back[4 * i + 1] = layout.leading;
        back[4 * i + 2] = layout.stride;
        back[4 * i + 3] = layout.swizzle;
    }
}

// ---- a pipeline in small, and its faults --------------------------------------------------------

enum Fault {
    kNone,
    kReadsBeforeWait,
    kReleasesBeforeWait,
    kWrongParity,
    kNoWaitForEmpty,
    kWrongStride,
    kStaleStage,
    kNoProxyFence,
    kNoFence,
    kDiverges,
    kWritesAccumulators,
    kWritesOperand,
    kEndsEarly,
    kForgetsPeer,
    kUsesBarrierEarly,
    kForgetsBytes,
    kNoBarrierBeforeProduct,
    kFaults
};

constexpr int kStages = 2, kChunk = 64 * 16 * 2;  // bytes: 16 k of 64 columns

// y[block][64, 64] = sum of x w_c over the chunks, which come in core-matrix order. Threads 0 .. 127
// multiply, x once from registers and once from shared memory; thread 128 loads half of each chunk for both
// blocks.
template <int F>
__global__ void MIPNERF_CLUSTER(2)
    pipeline_kernel(const Bfloat16* x, const unsigned char* w, int chunks, float* y) {
    Barrier* full = shared_memory<Barrier>();
    Barrier* empty = full + kStages;
    Barrier* loaded = empty + kStages;
    unsigned char* stages = shared_memory<unsigned char>(1024);
    Bfloat16* tile = shared_memory<Bfloat16>(1024 + kStages * kChunk);
    const int t = thread_rank(), rank = cluster_rank();
    if (t == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 2);
        }
        barrier_init(loaded, kWarpgroup);
        barrier_init_fence();
    }
    if (F != kUsesBarrierEarly) cluster_sync();
    if (t >= kWarpgroup) {
        lower_registers<40>();
        if (t == kWarpgroup) {
            for (int c = 0; c < chunks; ++c) {
                const int stage = c % kStages;
                const unsigned lap = static_cast<unsigned>(c / kStages);
                if (F != kNoWaitForEmpty) barrier_wait(empty + stage, (lap & 1u) ^ 1u);
                barrier_arrive_expect(full + stage, F == kForgetsBytes ? kChunk / 2 : kChunk);
                const int mine = rank * (kChunk / 2);
                copy_bulk_multicast(stages + stage * kChunk + mine, w + c * kChunk + mine, kChunk / 2,
                                    full + stage, 3);
            }
        }
    } else {
        raise_registers<232>();
        for (int i = t; i < 64 * 16; i += kWarpgroup) tile[element(false, 64, i / 16, i % 16)] = x[i];
        if (F != kNoProxyFence) proxy_fence();
        barrier_arrive(loaded);
        if (F != kNoBarrierBeforeProduct) barrier_wait(loaded, 0);
        const int row = 16 * (t / 32) + t % 32 / 4, column = 2 * (t % 4);
        unsigned a[4];
        for (int i = 0; i < 4; ++i) {
            const Bfloat16* pair = x + (row + 8 * (i % 2)) * 16 + column + 8 * (i / 2);
            a[i] = pair[0].bits | static_cast<unsigned>(pair[1].bits) << 16;
        }
        float d[32];
        for (int i = 0; i < 32; ++i) d[i] = 0;
        const auto release = [&](int c) {
            barrier_arrive(empty + c % kStages);
            barrier_arrive_at(empty + c % kStages, 1 - rank);
        };
        for (int c = 0; c < chunks; ++c) {
            const int stage = (F == kStaleStage && c > 0 ? c - 1 : c) % kStages;
            const unsigned lap = static_cast<unsigned>(c / kStages);
            barrier_wait(full + c % kStages, F == kWrongParity ? (lap & 1u) ^ 1u : lap & 1u);
            if (F != kNoFence) wgmma_fence();
            const std::uint64_t b =
                operand_descriptor(stages + stage * kChunk, 64 / 8 * 128, F == kWrongStride ? 64 : 128);
            if (c % 2 == 0)
                wgmma_registers<Bfloat16, 64>(d, a, b, true);
            else
                wgmma_shared<Bfloat16, 64, Major::k, Major::k>(d, operand_descriptor(tile, 64 / 8 * 128, 128),
                                                               b, true);
            if (F != kDiverges || t != 5 || c != 2) wgmma_commit();
            if (F == kReleasesBeforeWait && t == 0) release(c);
            if (F == kWritesAccumulators && c == 1) d[3] += 1.0f;
            if (F == kWritesOperand && c == 2) a[1] ^= 1u;
            wgmma_wait<1>();
            if (F != kReleasesBeforeWait && t == 0 && c > 0) {
                if (F == kForgetsPeer) {
                    barrier_arrive(empty + (c - 1) % kStages);
                    barrier_arrive(empty + (c - 1) % kStages);
                } else {
                    release(c - 1);
                }
            }
        }
        if (F != kReadsBeforeWait) wgmma_wait<0>();
        for (int i = 0; i < 32; ++i)
            y[blockIdx.x * 4096 + (row + 8 * (i / 2 % 2)) * 64 + column + 8 * (i / 4) + i % 2] = d[i];
        wgmma_wait<0>();
        if (F != kReleasesBeforeWait && t == 0) release(chunks - 1);
    }
    if (F != kEndsEarly) cluster_sync();
}

template <int F>
void run_pipeline(const emulation::Program& program) {
    if (program.integer("fault") != F) {
        if constexpr (F + 1 < kFaults) run_pipeline<F + 1>(program);
        return;
    }
    MIPNERF_LAUNCH_CLUSTERS(pipeline_kernel<F>, 2, dim3(static_cast<unsigned>(program.size("y", 0))),
                            dim3(2 * kWarpgroup), 1024 + (kStages + 1) * kChunk, nullptr,
                            program.input<Bfloat16>("x"), program.input<std::uint8_t>("w"),
                            static_cast<int>(program.size("w", 0)), program.output<float>("y"));
}

}  // namespace

int main(int argc, char** argv) {
    const emulation::Program program(argc, argv);
    const std::string what = program.text("what");
    if (what == "descriptors")
        run_descriptors(program);
    else if (what == "pipeline")
        run_pipeline<0>(program);
    else if (program.type("a") == "<f2")
        run_product_of_width<Half>(program);
    else
        run_product_of_width<Bfloat16>(program);
}
