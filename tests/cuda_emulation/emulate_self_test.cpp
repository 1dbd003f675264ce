// Kernels that exercise the emulation itself; driven by tests/test_cuda_emulation.py.
#include "program.h"

using namespace mipnerf;

// Every shuffle of one warp with a compile-time segment width.
template <int Width>
__global__ void shuffle_kernel(const int* x, int* y, int argument) {
    const int lane = lane_index();
    y[lane] = warp_shuffle<Width>(x[lane], argument);
    y[32 + lane] = warp_shuffle_up<Width>(x[lane], static_cast<unsigned>(argument));
    y[64 + lane] = warp_shuffle_down<Width>(x[lane], static_cast<unsigned>(argument));
    y[96 + lane] = warp_shuffle_xor<Width>(x[lane], argument);
}

template <int Width, typename T>
__global__ void scan_kernel(const T* x, T* y) {
    const int i = thread_rank(), n = static_cast<int>(blockDim.x);
    T* row = y + i;
    *row = warp_sum<Width>(x[i]);
    *(row += n) = warp_max<Width>(x[i]);
    *(row += n) = warp_min<Width>(x[i]);
    *(row += n) = warp_inclusive_sum<Width>(x[i]);
    *(row += n) = warp_exclusive_sum<Width>(x[i]);
    *(row += n) = warp_reverse_inclusive_sum<Width>(x[i]);
    *(row += n) = warp_reverse_exclusive_sum<Width>(x[i]);
    *(row += n) = warp_inclusive_max<Width>(x[i]);
    *(row += n) = warp_exclusive_max<Width>(x[i], T(-1e30));
    *(row += n) = warp_reverse_inclusive_max<Width>(x[i]);
    *(row += n) = warp_reverse_exclusive_max<Width>(x[i], T(-1e30));
}

__global__ void vote_kernel(const int* x, int* y) {
    const int lane = lane_index();
    const bool set = x[lane] != 0;
    y[lane] = static_cast<int>(warp_ballot(set));
    y[32 + lane] = warp_any(set);
    y[64 + lane] = warp_all(set);
    // The two halves of a warp may go separate ways as long as each names itself only.
    if (lane < 16)
        y[96 + lane] = static_cast<int>(warp_ballot(set, 0x0000ffffu));
    else
        y[96 + lane] = static_cast<int>(warp_ballot(set, 0xffff0000u));
    const unsigned mask = warp_ballot(set);
    y[128 + lane] = mask ? count_bits(mask) * 10000 + lowest_bit(mask) * 100 + highest_bit(mask) : -1;
}

// The block's numbers reversed through shared memory, `rounds` times: two barriers a round.
__global__ void reverse_kernel(const float* x, float* y, int n, int rounds) {
    float* row = shared_memory<float>();
    float value = thread_rank() < n ? x[blockIdx.x * n + thread_rank()] : 0.0f;
    for (int round = 0; round < rounds; ++round) {
        if (thread_rank() < n) row[thread_rank()] = value;
        block_sync();
        if (thread_rank() < n) value = row[n - 1 - thread_rank()] + 1.0f;
        block_sync();
    }
    if (thread_rank() < n) y[blockIdx.x * n + thread_rank()] = value;
}

// Threads above n leave at once; the others keep meeting at barriers.
__global__ void leave_early_kernel(const float* x, float* y, int n) {
    if (thread_rank() >= n) return;
    float* row = shared_memory<float>();
    row[thread_rank()] = x[thread_rank()];
    block_sync();
    y[thread_rank()] = row[(thread_rank() + 1) % n];
}

__global__ void histogram_kernel(const int* x, int* counts, float* sum, double* total, std::int64_t* whole,
                                 unsigned* most, int n) {
    int* local = shared_memory<int>();
    if (thread_rank() < 4) local[thread_rank()] = 0;
    block_sync();
    for (int i = static_cast<int>(blockIdx.x * blockDim.x) + thread_rank(); i < n;
         i += static_cast<int>(gridDim.x * blockDim.x)) {
        atomic_add(local + x[i], 1);
        atomic_add(sum, static_cast<float>(x[i]));
        atomic_add(total, static_cast<double>(x[i]));
        atomic_add(whole, (std::int64_t{x[i]} << 40) - 1);
        atomic_max(most, static_cast<unsigned>(i) * 2654435761u);
    }
    block_sync();
    if (thread_rank() < 4) atomic_add(counts + thread_rank(), local[thread_rank()]);
}

// Writes every thread's linear index at its place of a three-dimensional grid of three-dimensional blocks.
__global__ void coordinates_kernel(int* y) {
    const unsigned x = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y,
                   plane = blockIdx.z * blockDim.z + threadIdx.z;
    int* rank = shared_memory<int>();
    rank[thread_rank()] = thread_rank();
    block_sync();
    const std::int64_t at = (std::int64_t{plane} * gridDim.y * blockDim.y + row) * gridDim.x * blockDim.x + x;
    y[at] = rank[thread_rank()] + 1000 * warp_sum(1);
}

// Moves n (a multiple of eight) floats to T and back with 16-byte accesses.
template <typename T>
__global__ void convert_kernel(const float* x, T* narrow, float* wide, int n) {
    const int i = 8 * (static_cast<int>(blockIdx.x * blockDim.x) + thread_rank());
    if (i >= n) return;
    const Pack<float, 4> low = ldg128(x + i), high = ldg128(x + i + 4);
    Floats<8> eight;
    for (int k = 0; k < 4; ++k) {
        eight.value[k] = low.value[k];
        eight.value[4 + k] = high.value[k];
    }
    const Pack<T, 8> packed = pack_from_float<T>(eight);
    stg128(narrow + i, packed);
    const Floats<8> back = pack_to_float(packed);
    Pack<float, 4> out;
    for (int k = 0; k < 4; ++k) out.value[k] = back.value[k];
    store_pack_streaming(wide + i, out);
    for (int k = 0; k < 4; ++k) out.value[k] = back.value[4 + k];
    store_pack_streaming(wide + i + 4, out);
}

// The order in which the threads of the blocks came by.
__global__ void order_kernel(int* y, int* next) {
    const int at = atomic_add(next, 1);
    y[at] = static_cast<int>(blockIdx.x * blockDim.x) + thread_rank();
}

// Two things that no kernel may do.
__global__ void write_input_kernel(const float* x) {
    const_cast<float*>(x)[thread_rank()] = 1.0f;
}
__global__ void read_only_load_of_output_kernel(float* y) {
    const Pack<float, 2> pair = load_pack<2>(y + 2 * thread_rank());
    y[2 * thread_rank()] = pair.value[1];
}

int main(int argc, char** argv) {
    emulation::Program program(argc, argv);
    const std::string kernel = program.text("kernel");
    if (kernel == "shuffle") {
        const int argument = static_cast<int>(program.integer("argument"));
        const auto launch = [&](auto instance) {
            MIPNERF_LAUNCH(instance, dim3(1), dim3(32), 0, nullptr, program.input<int>("x"),
                           program.output<int>("y"), argument);
        };
        program.integer("width") == 32 ? launch(shuffle_kernel<32>) : launch(shuffle_kernel<8>);
    } else if (kernel == "scan") {
        const dim3 block(static_cast<unsigned>(program.size("x", 0)));
        const bool whole = program.integer("width") == 32;
        if (program.type("x") == "<f4") {
            auto instance = whole ? scan_kernel<32, float> : scan_kernel<4, float>;
            MIPNERF_LAUNCH(instance, dim3(1), block, 0, nullptr, program.input<float>("x"),
                           program.output<float>("y"));
        } else {
            auto instance = whole ? scan_kernel<32, double> : scan_kernel<4, double>;
            MIPNERF_LAUNCH(instance, dim3(1), block, 0, nullptr, program.input<double>("x"),
                           program.output<double>("y"));
        }
    } else if (kernel == "vote") {
        MIPNERF_LAUNCH(vote_kernel, dim3(1), dim3(32), 0, nullptr, program.input<int>("x"),
                       program.output<int>("y"));
    } else if (kernel == "reverse") {
        const int n = static_cast<int>(program.size("x", 1));
        MIPNERF_LAUNCH(reverse_kernel, grid_size(program.size("x", 0)), dim3(ceil_div(n, 32) * 32),
                       n * sizeof(float), nullptr, program.input<float>("x"), program.output<float>("y"), n,
                       static_cast<int>(program.integer("rounds")));
    } else if (kernel == "leave_early") {
        const int n = static_cast<int>(program.size("x", 0));
        MIPNERF_LAUNCH(leave_early_kernel, dim3(1), dim3(128), n * sizeof(float), nullptr,
                       program.input<float>("x"), program.output<float>("y"), n);
    } else if (kernel == "histogram") {
        MIPNERF_LAUNCH(histogram_kernel, dim3(3), dim3(64), 4 * sizeof(int), nullptr, program.input<int>("x"),
                       program.output<int>("counts"), program.output<float>("sum"),
                       program.output<double>("total"), program.output<std::int64_t>("whole"),
                       program.output<std::uint32_t>("most"), static_cast<int>(program.size("x", 0)));
    } else if (kernel == "coordinates") {
        MIPNERF_LAUNCH(coordinates_kernel, dim3(2, 3, 2), dim3(8, 4, 2), 64 * sizeof(int), nullptr,
                       program.output<int>("y"));
    } else if (kernel == "convert") {
        const int n = static_cast<int>(program.size("x", 0));
        const auto launch = [&](auto instance, auto* narrow) {
            MIPNERF_LAUNCH(instance, grid_size(ceil_div(n, 8 * 64)), dim3(64), 0, nullptr,
                           program.input<float>("x"), narrow, program.output<float>("wide"), n);
        };
        if (program.type("narrow") == "<f2")
            launch(convert_kernel<Half>, program.output<Half>("narrow"));
        else
            launch(convert_kernel<Bfloat16>, program.output<Bfloat16>("narrow"));
    } else if (kernel == "order") {
        MIPNERF_LAUNCH(order_kernel, dim3(3), dim3(64), 0, nullptr, program.output<int>("y"),
                       program.output<int>("next"));
    } else if (kernel == "write_input") {
        MIPNERF_LAUNCH(write_input_kernel, dim3(1), dim3(32), 0, nullptr, program.input<float>("x"));
    } else if (kernel == "read_only_load_of_output") {
        MIPNERF_LAUNCH(read_only_load_of_output_kernel, dim3(1), dim3(32), 0, nullptr,
                       program.output<float>("y"));
    } else {
        emulation::fail("no kernel '%s'", kernel.c_str());
    }
}
