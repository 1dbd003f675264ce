// The kernels of packed compositing and their launches, free of torch: the extension and `make cuda-check`
// compile the same.
#include "packed_composite_kernels.cuh"
