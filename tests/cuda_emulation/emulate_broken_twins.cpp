// Pairs of kernels that differ in one fault; tests/test_cuda_emulation.py demands that every fault is found
// for every seed and that its sound twin never is. `Fault` false is the sound one.
#include "program.h"

using namespace mipnerf;

// Sums of a block's numbers by a tree in shared memory. Fault: no barrier between the levels of the tree.
template <bool Fault>
__global__ void missing_barrier_kernel(const float* x, float* y) {
    float* sums = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    sums[i] = x[static_cast<std::int64_t>(blockIdx.x) * n + i];
    block_sync();
    for (int half = n / 2; half > 0; half /= 2) {
        if (i < half) sums[i] += sums[i + half];
        if (!Fault) block_sync();
    }
    if (i == 0) y[blockIdx.x] = sums[0];
}

// A warp's numbers rotated by one lane through shared memory. Fault: no warp_sync, as if lanes ran in
// lockstep.
template <bool Fault>
__global__ void missing_warp_sync_kernel(const float* x, float* y) {
    float* row = shared_memory<float>() + 32 * warp_index();
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    row[lane_index()] = x[i];
    if (!Fault) warp_sync();
    y[i] = row[(lane_index() + 1) % 32];
}

// The same through a loop that uses one buffer again and again. Fault: the barrier that protects the buffer
// from the next round's writes is missing; in lockstep nothing would go wrong.
template <bool Fault>
__global__ void missing_second_barrier_kernel(const float* x, float* y) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    float value = x[static_cast<std::int64_t>(blockIdx.x) * n + i];
    for (int round = 0; round < 4; ++round) {
        row[i] = value;
        block_sync();
        value = row[(i + 33) % n];
        if (!Fault) block_sync();
    }
    y[static_cast<std::int64_t>(blockIdx.x) * n + i] = value;
}

// Differences of neighbours. Fault: the last thread reads one element past the row in shared memory.
template <bool Fault>
__global__ void off_by_one_shared_kernel(const float* x, float* y) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    row[i] = x[static_cast<std::int64_t>(blockIdx.x) * n + i];
    block_sync();
    const bool inside = Fault ? i + 1 <= n : i + 1 < n;
    y[static_cast<std::int64_t>(blockIdx.x) * n + i] = inside ? row[i + 1] - row[i] : 0.0f;
}

// A copy of n numbers. Fault: the bound lets one thread past the end.
template <bool Fault>
__global__ void off_by_one_global_kernel(const float* x, float* y, std::int64_t n) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    if (Fault ? i <= n : i < n) y[i] = x[i];
}

// The first n fenceposts of intervals that share one row: writes stay inside the array, but one block writes
// its neighbour's first element too. Fault: n + 1 numbers a block instead of n.
template <bool Fault>
__global__ void off_by_one_between_blocks_kernel(const float* x, float* y) {
    const int n = static_cast<int>(blockDim.x) - 1;
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * n;
    const int count = Fault && blockIdx.x + 1 < gridDim.x ? n + 1 : n;
    if (thread_rank() < count) y[start + thread_rank()] = x[start + thread_rank()];
}

// Sums over the first half of each warp. Fault: the mask names lanes that do not come.
template <bool Fault>
__global__ void mask_too_wide_kernel(const float* x, float* y) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    float sum = x[i];
    if (lane_index() < 16)
        for (int offset = 8; offset > 0; offset /= 2)
            sum += warp_shuffle_xor(sum, offset, Fault ? kFullMask : 0x0000ffffu);
    y[i] = warp_shuffle(sum, 0);
}

// Sums over the whole warp. Fault: the mask leaves out half of the lanes that call.
template <bool Fault>
__global__ void mask_too_narrow_kernel(const float* x, float* y) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    float sum = x[i];
    for (int offset = 16; offset > 0; offset /= 2)
        sum += warp_shuffle_xor(sum, offset, Fault ? 0x0000ffffu : kFullMask);
    y[i] = sum;
}

// Rows of different lengths staged in shared memory. Fault: reads up to the longest row, so what an earlier
// round (or nobody) left behind counts as data.
template <bool Fault>
__global__ void stale_read_kernel(const float* x, float* y, int n) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), most = static_cast<int>(blockDim.x);
    const int length = n - static_cast<int>(blockIdx.x);
    if (i < length) row[i] = x[static_cast<std::int64_t>(blockIdx.x) * n + i];
    block_sync();
    float sum = 0.0f;
    if (i == 0)
        for (int k = 0; k < (Fault ? most : length); ++k) sum += row[k];
    if (i == 0) y[blockIdx.x] = sum;
}

// Two rounds through one buffer. Fault: the second round's values are read before the barrier that publishes
// them, so the reader gets the first round's.
template <bool Fault>
__global__ void stale_round_kernel(const float* x, float* y) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * n;
    row[i] = x[start + i];
    block_sync();
    const float first = row[n - 1 - i];
    block_sync();
    row[i] = first * 2.0f;
    float second = 0.0f;
    if (Fault) second = row[(i + 32) % n];
    block_sync();
    if (!Fault) second = row[(i + 32) % n];
    y[start + i] = second;
}

// A barrier. Fault: only the first warp comes to it.
template <bool Fault>
__global__ void divergent_barrier_kernel(const float* x, float* y) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * n;
    row[i] = x[start + i];
    if (!Fault || warp_index() == 0) block_sync();
    if (Fault && warp_index() != 0) warp_sync();
    const float value = row[(i + 1) % n];
    block_sync();
    y[start + i] = value;
}

// Two roles that exchange data. Fault: each role has a barrier of its own in the source.
template <bool Fault>
__global__ void two_barriers_kernel(const float* x, float* y) {
    float* row = shared_memory<float>();
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    const std::int64_t start = static_cast<std::int64_t>(blockIdx.x) * n;
    row[i] = x[start + i];
    if (Fault) {
        if (warp_index() == 0)
            block_sync();
        else
            block_sync();
    } else {
        block_sync();
    }
    y[start + i] = row[(i + 1) % n];
}

// A barrier and a shuffle. Fault: half of each warp waits at the barrier while the other half shuffles with a
// full mask.
template <bool Fault>
__global__ void barrier_against_shuffle_kernel(const float* x, float* y) {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    float value = x[i];
    if (Fault && lane_index() < 16) block_sync();
    value = warp_shuffle_xor(value, 1);
    if (!Fault || lane_index() >= 16) block_sync();
    y[i] = value;
}

// A count of the block's positive numbers. Fault: added without an atomic.
template <bool Fault>
__global__ void lost_update_kernel(const float* x, float* y) {
    float* count = shared_memory<float>();
    if (thread_rank() == 0) *count = 0.0f;
    block_sync();
    if (x[static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank()] > 0.0f) {
        if (Fault)
            *count += 1.0f;
        else
            atomic_add(count, 1.0f);
    }
    block_sync();
    if (thread_rank() == 0) y[blockIdx.x] = *count;
}

// Sums of two neighbours' numbers, of 16 bits each: each writes half a word that both read. Fault: no barrier
// between, so that either finds its own half written and the other's perhaps.
template <bool Fault>
__global__ void halves_of_a_word_kernel(const float* x, float* y) {
    std::uint16_t* row = shared_memory<std::uint16_t>();
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + thread_rank();
    row[thread_rank()] = to_bfloat16_bits(x[i]);
    if (!Fault) block_sync();
    std::uint32_t word;
    memcpy(&word, row + (thread_rank() & ~1), sizeof word);
    y[i] = from_bfloat16_bits(static_cast<std::uint16_t>(word)) +
           from_bfloat16_bits(static_cast<std::uint16_t>(word >> 16));
}

int main(int argc, char** argv) {
    emulation::Program program(argc, argv);
    const float* x = program.input<float>("x");
    float* y = program.output<float>("y");
    const std::string kernel = program.text("kernel");
    const bool fault = program.integer("fault") != 0;
    const auto blocks = static_cast<unsigned>(program.integer("blocks")),
               threads = static_cast<unsigned>(program.integer("threads"));
    const std::int64_t n = program.integer("n");
    const auto launch = [&](auto sound, auto broken, auto... more) {
        MIPNERF_LAUNCH((fault ? broken : sound), dim3(blocks), dim3(threads), threads * sizeof(float),
                       nullptr, x, y, more...);
    };
#define MIPNERF_TWIN(name) \
    if (kernel == #name) return launch(name##_kernel<false>, name##_kernel<true>), 0
#define MIPNERF_TWIN_WITH(name, argument) \
    if (kernel == #name) return launch(name##_kernel<false>, name##_kernel<true>, argument), 0
    MIPNERF_TWIN(missing_barrier);
    MIPNERF_TWIN(missing_warp_sync);
    MIPNERF_TWIN(missing_second_barrier);
    MIPNERF_TWIN(off_by_one_shared);
    MIPNERF_TWIN_WITH(off_by_one_global, n);
    MIPNERF_TWIN(off_by_one_between_blocks);
    MIPNERF_TWIN(mask_too_wide);
    MIPNERF_TWIN(mask_too_narrow);
    MIPNERF_TWIN_WITH(stale_read, static_cast<int>(n));
    MIPNERF_TWIN(stale_round);
    MIPNERF_TWIN(divergent_barrier);
    MIPNERF_TWIN(two_barriers);
    MIPNERF_TWIN(barrier_against_shuffle);
    MIPNERF_TWIN(lost_update);
    MIPNERF_TWIN(halves_of_a_word);
    emulation::fail("no kernel '%s'", kernel.c_str());
}
