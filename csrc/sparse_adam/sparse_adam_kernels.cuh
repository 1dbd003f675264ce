// The CUDA kernel of Adam on touched entries: four numbers a thread; where all their gradients are zero
// nothing else is read.
#pragma once

#include "sparse_adam_launch.h"

namespace mipnerf {

constexpr int kAdamThreads = 256;

// Thread i of block b owns the N numbers from N (b kAdamThreads + i) on.
template <int N>
__global__ void __launch_bounds__(kAdamThreads) sparse_adam_kernel(SparseAdamArguments in) {
    const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kAdamThreads + threadIdx.x) * N;
    if (first >= in.count) return;
    const Pack<float, N> gradient = load_pack_written<N>(in.gradient + first);
    std::uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) any |= float_bits(gradient.value[i]) << 1;  // -0 is zero too
    if (any == 0) return;
    const AdamOptions options =
        in.clock.rate == nullptr
            ? in.options
            : adam_options_at(*in.clock.rate * in.clock.rate_ratio, in.options.beta1, in.options.beta2,
                              in.options.eps, in.clock.decays, static_cast<float>(*in.clock.step + 1));
    Pack<float, N> value = load_pack_written<N>(in.values + first),
                   moment1 = load_pack_written<N>(in.moment1 + first),
                   moment2 = load_pack_written<N>(in.moment2 + first), zero;
    Floats<N> narrow;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const AdamEntry<float> entry =
            adam_update(gradient.value[i], options, value.value[i], moment1.value[i], moment2.value[i]);
        value.value[i] = narrow.value[i] = entry.value;
        moment1.value[i] = entry.moment1;
        moment2.value[i] = entry.moment2;
        zero.value[i] = 0.0f;
    }
    store_pack(in.values + first, value);
    store_pack(in.moment1 + first, moment1);
    store_pack(in.moment2 + first, moment2);
    store_pack(in.gradient + first, zero);
    if (in.copy != nullptr) store_pack(in.copy + first, pack_from_float<Half>(narrow));
}

void launch_sparse_adam(const SparseAdamArguments& in, Stream stream) {
    const bool aligned = in.count % 4 == 0 && is_aligned(in.values, 16) && is_aligned(in.gradient, 16) &&
                         is_aligned(in.moment1, 16) && is_aligned(in.moment2, 16) &&
                         (in.copy == nullptr || is_aligned(in.copy, 8));
    if (aligned)
        MIPNERF_LAUNCH(sparse_adam_kernel<4>, grid_size(ceil_div(in.count, std::int64_t{4 * kAdamThreads})),
                       dim3(kAdamThreads), 0, stream, in);
    else
        MIPNERF_LAUNCH(sparse_adam_kernel<1>, grid_size(ceil_div(in.count, std::int64_t{kAdamThreads})),
                       dim3(kAdamThreads), 0, stream, in);
}

}  // namespace mipnerf
