// The instances of the compositing launches, free of torch: the extension and `make cuda-check` compile the
// same.
#include "composite_kernels.cuh"

namespace mipnerf {

#define MIPNERF_INSTANTIATE(S)                                                                              \
    template void launch_composite_forward<S>(const CompositeArguments<S>&, const CompositeResults&,        \
                                              Stream);                                                      \
    template void launch_composite_backward<S>(const CompositeArguments<S>&, const CompositeCotangents<S>&, \
                                               Stream);                                                     \
    template void launch_composite_resample<S>(const CompositeArguments<S>&, const CompositeResults&, int,  \
                                               float, const float*, float*, Stream);

MIPNERF_INSTANTIATE(float)
MIPNERF_INSTANTIATE(Bfloat16)
MIPNERF_INSTANTIATE(Half)

}  // namespace mipnerf
