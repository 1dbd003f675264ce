// The instances of the fast model's launches, free of torch: the extension and `make cuda-check` compile the
// same.
#include "fast_render.cuh"
#include "fast_step_kernels.cuh"

namespace mipnerf {

#define MIPNERF_INSTANTIATE(S, F)                                                                           \
    template void launch_train_step<S, F>(const DeviceModel<S>&, const MarchArguments&, const StepTargets&, \
                                          const StepScratch&, float*, std::int64_t*,                        \
                                          const FastWeights<float>&, double*, Stream);                      \
    template void launch_fast_render<S, F>(const DeviceModel<S>&, const MarchArguments&,                    \
                                           const RenderArrays&, int, Stream);

MIPNERF_INSTANTIATE(float, 2)
MIPNERF_INSTANTIATE(float, 4)
MIPNERF_INSTANTIATE(Half, 2)
MIPNERF_INSTANTIATE(Half, 4)

}  // namespace mipnerf
