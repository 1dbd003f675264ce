// Adam's kernel and its launch, free of torch: the extension and `make cuda-check` compile the same.
#include "sparse_adam_kernels.cuh"
