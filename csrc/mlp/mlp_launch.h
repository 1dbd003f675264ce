// The launches of the fused network, alike for both kernel generations: mlp_mma (mma.sync, compute capability
// 8.0 and higher; mlp_launch.cu) and mlp_hopper (wgmma, 9.0a alone; mlp_hopper_launch.cu). W is the width, T
// Bfloat16 or Half. Packed weights and stashes of one generation mean nothing to the other.
#pragma once

#include "../common/device.cuh"
#include "mlp_plan.h"
#include "mlp_schedule.h"

namespace mipnerf {

#define MIPNERF_MLP_LAUNCHES                                                         \
    template <int W, typename T>                                                     \
    void launch_mlp_pack(const MlpPackArguments& arguments, Stream stream);          \
    template <int W, typename T>                                                     \
    void launch_mlp_forward(const MlpForwardArguments<T>& arguments, Stream stream); \
    template <int W, typename T>                                                     \
    void launch_mlp_dgrad(const MlpDgradArguments<T>& arguments, Stream stream);     \
    template <int W, typename T>                                                     \
    void launch_mlp_wgrad(const MlpWgradArguments<T>& arguments, Stream stream);

namespace mlp_mma {  // its mlp_sizes is in mlp_schedule.h
MIPNERF_MLP_LAUNCHES
}
namespace mlp_hopper {
MlpSizes mlp_sizes(const MlpPlan& plan, std::int64_t samples);
MIPNERF_MLP_LAUNCHES
}  // namespace mlp_hopper

#undef MIPNERF_MLP_LAUNCHES

}  // namespace mipnerf
