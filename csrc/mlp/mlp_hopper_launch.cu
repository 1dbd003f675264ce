// The instances of packing and forward for compute capability 9.0a, free of torch: the extension and
// `make cuda-check` compile the same.
#include "mlp_hopper_kernels.cuh"

namespace mipnerf {
namespace mlp_hopper {

#define MIPNERF_INSTANTIATE(W, T)                                         \
    template void launch_mlp_pack<W, T>(const MlpPackArguments&, Stream); \
    template void launch_mlp_forward<W, T>(const MlpForwardArguments<T>&, Stream);

MIPNERF_INSTANTIATE(64, Bfloat16)
MIPNERF_INSTANTIATE(128, Bfloat16)
MIPNERF_INSTANTIATE(256, Bfloat16)
MIPNERF_INSTANTIATE(64, Half)
MIPNERF_INSTANTIATE(128, Half)
MIPNERF_INSTANTIATE(256, Half)

}  // namespace mlp_hopper
}  // namespace mipnerf
