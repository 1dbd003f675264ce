// The instance of the resampling launch, free of torch: the extension and `make cuda-check` compile the same.
#include "resample_kernels.cuh"

namespace mipnerf {

template void launch_resample<float>(std::int64_t, int, int, float, const float*, const float*, const float*,
                                     float*, Stream);

}  // namespace mipnerf
