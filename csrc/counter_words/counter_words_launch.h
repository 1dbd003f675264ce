// What the CUDA launch of counter_words takes. counter_words_kernels.cuh defines it, counter_words_launch.cu
// compiles it.
#pragma once

#include "../common/device.cuh"

namespace mipnerf {

// step: one number on the device; rows [R]; words [R, columns].
void launch_counter_words(std::int64_t rows, std::int64_t columns, std::uint64_t seed,
                          const std::int64_t* step, std::uint32_t stream_of_numbers,
                          const std::int64_t* row_numbers, std::int64_t* words, Stream stream);

}  // namespace mipnerf
