// The operator resample on the CPU: checks, allocation, dispatch over dtypes. The loops are in
// resample_rays.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../common/checks.h"
#include "../common/for_rays.h"
#include "resample_arguments.h"
#include "resample_rays.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Resample {
    ResampleInputs<T> in;
    const T* weights;  // [B, N]
    T* new_t_vals;     // [B, M]

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const Positions<T> positions(in.num_fenceposts);
        const ResampleRoom<T> room(in, positions);
        for (int64_t first = begin; first < end; first += kResampleRays)
            resample_block(in, positions, room, first, std::min(first + kResampleRays, end), weights,
                           new_t_vals);
    }
};

Tensor resample_cpu(Tensor t_vals, Tensor weights, int64_t num_samples, std::optional<Tensor> u,
                    double padding) {
    const Checker check{"resample"};
    const ResampleSizes sizes = check_resample(check, t_vals, weights, num_samples, u, true);
    t_vals = torch::stable::contiguous(t_vals);
    weights = torch::stable::contiguous(weights);
    if (u.has_value()) u = torch::stable::contiguous(*u);
    const Tensor new_t_vals = torch::stable::new_empty(t_vals, {sizes.rays, sizes.num_fenceposts});
    const auto run = [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const ResampleInputs<T> in{
            sizes.samples, sizes.num_fenceposts, static_cast<const T*>(t_vals.const_data_ptr()),
            u.has_value() ? static_cast<const T*>(u->const_data_ptr()) : nullptr, padding};
        for_rays<T>(sizes.rays, sizes.samples + sizes.num_fenceposts,
                    Resample<T>{in, static_cast<const T*>(weights.const_data_ptr()),
                                static_cast<T*>(new_t_vals.mutable_data_ptr())});
    };
    if (t_vals.scalar_type() == ScalarType::Double)
        run(static_cast<double*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
    return new_t_vals;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("resample", TORCH_BOX(&mipnerf::resample_cpu));
}
