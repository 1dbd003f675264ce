// What the CUDA launch of Adam on touched entries takes. sparse_adam_kernels.cuh defines it.
#pragma once

#include "../common/device.cuh"
#include "sparse_adam_math.h"

namespace mipnerf {

// Rate and step that lie on the device, so that a captured graph can be replayed with others; rate null: the
// options given are whole.
struct AdamClock {
    const float* rate;
    const std::int64_t* step;  // done before this one
    float rate_ratio;
    AdamDecays decays;
};

struct SparseAdamArguments {
    std::int64_t count;
    float* values;
    float* gradient;
    float* moment1;
    float* moment2;
    Half* copy;  // of the values; null: none
    AdamOptions options;
    AdamClock clock;
};

void launch_sparse_adam(const SparseAdamArguments& arguments, Stream stream);

}  // namespace mipnerf
