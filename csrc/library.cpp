// Every operator schema of the native library, in one block: the table of contents of the native code. The
// kernels register themselves where they stand, with STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU or CUDA, m).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mipnerf_fast, m) {}
