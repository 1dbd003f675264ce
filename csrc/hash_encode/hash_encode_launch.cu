// The instances of the hash encoding's launches, free of torch: the extension and `make cuda-check` compile
// the same.
#include "hash_encode_kernels.cuh"

namespace mipnerf {

#define MIPNERF_INSTANTIATE(F)                                                               \
    template void launch_hash_encode_forward<F>(const HashEncodeArguments&, float*, Stream); \
    template void launch_hash_encode_backward<F>(const HashEncodeArguments&, const float*,   \
                                                 const HashEncodeGradients&, Stream);

MIPNERF_INSTANTIATE(2)
MIPNERF_INSTANTIATE(4)

}  // namespace mipnerf
