// The marching kernels and their launches, free of torch: the extension and `make cuda-check` compile the
// same.
#include "march_kernels.cuh"
