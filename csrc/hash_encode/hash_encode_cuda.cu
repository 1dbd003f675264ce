// The operators hash_encode_forward and hash_encode_backward on CUDA: checks, allocation, launch on the
// current stream.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_call.h"
#include "hash_encode_arguments.h"
#include "hash_encode_launch.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Checked {
    CudaArrays arrays;
    HashEncodeArguments in{};
    int64_t row;

    Checked(const Checker& check, const Tensor& points, const Tensor& scales, const Tensor& tables,
            const std::vector<int64_t>& resolutions, int64_t table_size, int64_t kind, double cutoff)
        : arrays(check, "points", points) {
        in.grid = checked_hash_grid(check, tables, resolutions, table_size);
        in.attenuation = attenuation_coded(check, kind);
        in.cutoff = static_cast<float>(cutoff);
        check.dims("points", points, 2, "[S, 3]");
        in.samples = points.size(0);
        in.points = arrays.floats("points", points, {in.samples, 3}, "[S, 3]");
        in.scales = arrays.floats("scales", scales, {in.samples}, "[S]");
        in.tables = arrays.floats("tables", tables, {in.grid.entries, tables.size(1)}, "[entries, F]");
        row = in.grid.levels * tables.size(1);
    }
};

Tensor hash_encode_forward_cuda(Tensor points, Tensor scales, Tensor tables, std::vector<int64_t> resolutions,
                                int64_t table_size, int64_t attenuation, double cutoff) {
    const Checker check{"hash_encode_forward"};
    const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
    const Checked checked(check, points, scales, tables, resolutions, table_size, attenuation, cutoff);
    const Tensor features = torch::stable::new_empty(points, {checked.in.samples, checked.row});
    float* const to = mutable_cuda_data<float>(features);
    const Stream stream = current_cuda_stream(points);
    if (tables.size(1) == 2)
        launch_hash_encode_forward<2>(checked.in, to, stream);
    else
        launch_hash_encode_forward<4>(checked.in, to, stream);
    return features;
}

std::tuple<Tensor, Tensor, Tensor> hash_encode_backward_cuda(Tensor grad_features, Tensor points,
                                                             Tensor scales, Tensor tables,
                                                             std::vector<int64_t> resolutions,
                                                             int64_t table_size, int64_t attenuation,
                                                             double cutoff, bool deterministic) {
    const Checker check{"hash_encode_backward"};
    const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
    Checked checked(check, points, scales, tables, resolutions, table_size, attenuation, cutoff);
    const float* given =
        checked.arrays.floats("grad_features", grad_features, {checked.in.samples, checked.row}, "[S, L F]");
    const Tensor to_points = torch::stable::new_empty(points, {checked.in.samples, 3});
    const Tensor to_scales = torch::stable::new_empty(points, {checked.in.samples});
    const int64_t entries = checked.in.grid.entries, features = tables.size(1);
    const Tensor to_tables = torch::stable::new_zeros(points, {entries, features});
    HashEncodeGradients to{mutable_cuda_data<float>(to_points), mutable_cuda_data<float>(to_scales),
                           mutable_cuda_data<float>(to_tables), nullptr, nullptr};
    const Tensor sums =
        torch::stable::new_zeros(points, {deterministic ? entries : 0, features}, ScalarType::Long);
    const Tensor largest = torch::stable::new_zeros(points, {checked.in.grid.levels}, ScalarType::Int);
    if (deterministic) {
        to.table_sums = mutable_cuda_data<int64_t>(sums);
        to.largest = reinterpret_cast<uint32_t*>(mutable_cuda_data<int32_t>(largest));
    }
    const auto launch = features == 2 ? launch_hash_encode_backward<2> : launch_hash_encode_backward<4>;
    launch(checked.in, given, to, current_cuda_stream(points));
    return {to_points, to_scales, to_tables};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CUDA, m) {
    m.impl("hash_encode_forward", TORCH_BOX(&mipnerf::hash_encode_forward_cuda));
    m.impl("hash_encode_backward", TORCH_BOX(&mipnerf::hash_encode_backward_cuda));
}
