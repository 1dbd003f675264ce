// The launch of ray_batch, free of torch: the extension and `make cuda-check` compile the same.
#include "ray_batch_kernels.cuh"
