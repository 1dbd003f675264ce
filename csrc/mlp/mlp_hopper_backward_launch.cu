// The instances of dgrad for compute capability 9.0a, free of torch: the extension and `make cuda-check`
// compile the same.
#include "mlp_hopper_backward_kernels.cuh"

namespace mipnerf {
namespace mlp_hopper {

#define MIPNERF_INSTANTIATE(W, T) template void launch_mlp_dgrad<W, T>(const MlpDgradArguments<T>&, Stream);

MIPNERF_INSTANTIATE(64, Bfloat16)
MIPNERF_INSTANTIATE(128, Bfloat16)
MIPNERF_INSTANTIATE(256, Bfloat16)
MIPNERF_INSTANTIATE(64, Half)
MIPNERF_INSTANTIATE(128, Half)
MIPNERF_INSTANTIATE(256, Half)

}  // namespace mlp_hopper
}  // namespace mipnerf
