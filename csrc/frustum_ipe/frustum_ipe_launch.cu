// Every CUDA kernel of frustum_ipe that the extension launches, free of torch.
#include "frustum_ipe_kernels.cuh"

namespace mipnerf {

template void launch_frustum_ipe_forward(const FrustumIpeInputs&, float*, Stream);
template void launch_frustum_ipe_forward(const FrustumIpeInputs&, Bfloat16*, Stream);
template void launch_frustum_ipe_forward(const FrustumIpeInputs&, Half*, Stream);
template void launch_frustum_ipe_backward(const FrustumIpeInputs&, const float*, const FrustumIpeGradients&,
                                          Stream);
template void launch_frustum_ipe_backward(const FrustumIpeInputs&, const Bfloat16*,
                                          const FrustumIpeGradients&, Stream);
template void launch_frustum_ipe_backward(const FrustumIpeInputs&, const Half*, const FrustumIpeGradients&,
                                          Stream);

}  // namespace mipnerf
