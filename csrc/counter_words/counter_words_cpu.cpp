// The operator counter_words on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "../common/philox.h"
#include "counter_words_arguments.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

// Rows of a task: about as many words as are worth another thread.
constexpr int64_t kWordsPerTask = 16384;

Tensor counter_words_cpu(int64_t seed, Tensor step, int64_t stream, Tensor rows, int64_t columns) {
    check_counter_words(step, rows, columns);
    rows = torch::stable::contiguous(rows);
    const int64_t count = rows.numel();
    const Tensor words = torch::stable::new_empty(rows, {count, columns});
    const int64_t* row = static_cast<const int64_t*>(rows.const_data_ptr());
    const uint64_t number = static_cast<uint64_t>(*static_cast<const int64_t*>(step.const_data_ptr()));
    int64_t* out = static_cast<int64_t*>(words.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kWordsPerTask / std::max<int64_t>(columns, 1));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t column = 0; column < columns; column += 4) {
                const Words4 block =
                    counter_words(static_cast<uint64_t>(seed), number, static_cast<uint32_t>(stream),
                                  static_cast<uint32_t>(row[i]), static_cast<uint32_t>(column / 4));
                const int64_t left = std::min<int64_t>(4, columns - column);
                for (int64_t k = 0; k < left; ++k) out[i * columns + column + k] = block.word[k];
            }
    });
    return words;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("counter_words", TORCH_BOX(&mipnerf::counter_words_cpu));
}
