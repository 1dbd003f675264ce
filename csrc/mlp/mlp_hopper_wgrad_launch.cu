// The instances of wgrad for compute capability 9.0a, free of torch: the extension and `make cuda-check`
// compile the same.
#include "mlp_hopper_wgrad_kernels.cuh"

namespace mipnerf {
namespace mlp_hopper {

MlpSizes mlp_sizes(const MlpPlan& plan, std::int64_t samples) {
    return sizes_with_workspace(plan, samples);
}

#define MIPNERF_INSTANTIATE(W, T) template void launch_mlp_wgrad<W, T>(const MlpWgradArguments<T>&, Stream);

MIPNERF_INSTANTIATE(64, Bfloat16)
MIPNERF_INSTANTIATE(128, Bfloat16)
MIPNERF_INSTANTIATE(256, Bfloat16)
MIPNERF_INSTANTIATE(64, Half)
MIPNERF_INSTANTIATE(128, Half)
MIPNERF_INSTANTIATE(256, Half)

}  // namespace mlp_hopper
}  // namespace mipnerf
