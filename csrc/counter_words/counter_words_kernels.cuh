// CUDA kernel of counter_words: the random 32-bit words of every row, as philox.h has them.
#pragma once

#include "../common/philox.h"
#include "counter_words_launch.h"

namespace mipnerf {

// Thread i computes block i % blocks of row i / blocks: four words, of which the row's last block may need
// fewer. The step is read on the device, so a recorded launch follows it.
__global__ void counter_words_kernel(std::int64_t rows, std::int64_t columns, std::uint64_t seed,
                                     const std::int64_t* step, std::uint32_t stream_of_numbers,
                                     const std::int64_t* row_numbers, std::int64_t* words) {
    const std::int64_t blocks = ceil_div(columns, std::int64_t{4});
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * blocks) return;
    const std::int64_t row = i / blocks, block = i % blocks;
    const Words4 found =
        counter_words(seed, static_cast<std::uint64_t>(*step), stream_of_numbers,
                      static_cast<std::uint32_t>(row_numbers[row]), static_cast<std::uint32_t>(block));
    std::int64_t* out = words + row * columns + 4 * block;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (4 * block + k < columns) out[k] = found.word[k];
}

void launch_counter_words(std::int64_t rows, std::int64_t columns, std::uint64_t seed,
                          const std::int64_t* step, std::uint32_t stream_of_numbers,
                          const std::int64_t* row_numbers, std::int64_t* words, Stream stream) {
    constexpr int kThreads = 256;
    const std::int64_t threads = rows * ceil_div(columns, std::int64_t{4});
    MIPNERF_LAUNCH(counter_words_kernel, grid_size(ceil_div(threads, std::int64_t{kThreads})), dim3(kThreads),
                   0, stream, rows, columns, seed, step, stream_of_numbers, row_numbers, words);
}

}  // namespace mipnerf
