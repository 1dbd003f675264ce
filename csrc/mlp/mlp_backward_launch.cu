// The instances of dgrad and wgrad of the mma.sync generation, free of torch.
#include "mlp_backward_kernels.cuh"

namespace mipnerf {
namespace mlp_mma {

#define MIPNERF_INSTANTIATE(W, T)                                              \
    template void launch_mlp_dgrad<W, T>(const MlpDgradArguments<T>&, Stream); \
    template void launch_mlp_wgrad<W, T>(const MlpWgradArguments<T>&, Stream);
#define MIPNERF_INSTANTIATE_WIDTHS(T) \
    MIPNERF_INSTANTIATE(64, T)        \
    MIPNERF_INSTANTIATE(128, T)       \
    MIPNERF_INSTANTIATE(256, T)

MIPNERF_INSTANTIATE_WIDTHS(Bfloat16)
MIPNERF_INSTANTIATE_WIDTHS(Half)

}  // namespace mlp_mma
}  // namespace mipnerf
