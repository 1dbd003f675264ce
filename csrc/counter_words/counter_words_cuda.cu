// The operator counter_words on CUDA: checks, allocation, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "counter_words_arguments.h"
#include "counter_words_launch.h"

namespace mipnerf {
namespace {

using torch::stable::Tensor;

Tensor counter_words_cuda(int64_t seed, Tensor step, int64_t stream_of_numbers, Tensor rows,
                          int64_t columns) {
    check_counter_words(step, rows, columns);
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
    rows = torch::stable::contiguous(rows);
    const Tensor words = torch::stable::new_empty(rows, {rows.numel(), columns});
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(rows.get_device_index(), &stream));
    launch_counter_words(rows.numel(), columns, static_cast<uint64_t>(seed),
                         static_cast<const int64_t*>(step.const_data_ptr()),
                         static_cast<uint32_t>(stream_of_numbers),
                         static_cast<const int64_t*>(rows.const_data_ptr()),
                         static_cast<int64_t*>(words.mutable_data_ptr()), static_cast<Stream>(stream));
    return words;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("counter_words", TORCH_BOX(&mipnerf::counter_words_cuda));
}
