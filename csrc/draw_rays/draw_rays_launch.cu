// The kernel that draws rays and its launch, free of torch: the extension and `make cuda-check` compile the
// same.
#include "draw_rays_kernels.cuh"
