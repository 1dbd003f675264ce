// The instances of packing and the forward of the mma.sync generation, free of torch.
#include "mlp_kernels.cuh"

namespace mipnerf {
namespace mlp_mma {

#define MIPNERF_INSTANTIATE(W, T)                                         \
    template void launch_mlp_pack<W, T>(const MlpPackArguments&, Stream); \
    template void launch_mlp_forward<W, T>(const MlpForwardArguments<T>&, Stream);
#define MIPNERF_INSTANTIATE_WIDTHS(T) \
    MIPNERF_INSTANTIATE(64, T)        \
    MIPNERF_INSTANTIATE(128, T)       \
    MIPNERF_INSTANTIATE(256, T)

MIPNERF_INSTANTIATE_WIDTHS(Bfloat16)
MIPNERF_INSTANTIATE_WIDTHS(Half)

}  // namespace mlp_mma
}  // namespace mipnerf
