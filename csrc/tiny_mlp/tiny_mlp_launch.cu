// The kernels of the two small networks and their launches, free of torch: the extension and `make
// cuda-check` compile the same.
#include "tiny_mlp_kernels.cuh"
