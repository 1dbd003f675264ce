// The operator mlp_layer_backward: one layer's way down on the CPU. The gradients of its weight and bias, and
// the delta of the layer below behind its ReLU, share one pass over the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "mlp_products.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// See csrc/library.cpp.
void mlp_layer_backward_cpu(Tensor delta, Tensor x, std::optional<Tensor> beside, Tensor weight,
                            std::optional<Tensor> below, Tensor grad_weight, Tensor grad_bias,
                            std::optional<Tensor> ray_sums, bool add) {
    const Checker check{"mlp_layer_backward"};
    check.dims("delta", delta, 2, "[S, N]");
    check.dtype("delta", delta, {ScalarType::Float});
    const int64_t samples = delta.size(0), outputs = delta.size(1);
    const auto checked = [&](const char* name, const Tensor& tensor, const char* meaning) {
        check.dims(name, tensor, 2, meaning);
        check.same_dtype(name, tensor, "delta", delta);
        check.same_device(name, tensor, "delta", delta);
        check.that(tensor.size(1) <= 1 || tensor.stride(1) == 1, name, "of rows without gaps",
                   tensor.stride(1));
    };
    const auto operand = [&](const char* name, const Tensor& tensor, const char* meaning) {
        checked(name, tensor, meaning);
        return Operand{static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(0), false};
    };
    const Operand deltas = operand("delta", delta, "[S, N]"), of_x = operand("x", x, "[S, K]");
    const int64_t inputs = x.size(1);
    check.shape("x", x, {samples, inputs}, "[S, K]");
    Operand of_beside{};
    int64_t columns = inputs;
    if (beside.has_value()) {
        of_beside = operand("beside", *beside, "[S, F]");
        check.shape("beside", *beside, {samples, beside->size(1)}, "[S, F]");
        columns += beside->size(1);
    }
    const Operand weights = operand("weight", weight, "[N, K]");
    check.shape("weight", weight, {outputs, inputs}, "[N, K]");
    if (below.has_value()) {
        checked("below", *below, "[S, K]");
        check.shape("below", *below, {samples, inputs}, "[S, K]");
    }
    checked("grad_weight", grad_weight, "[N, K + F]");
    check.shape("grad_weight", grad_weight, {outputs, columns}, "[N, K + F]");
    check.same_dtype("grad_bias", grad_bias, "delta", delta);
    check.same_device("grad_bias", grad_bias, "delta", delta);
    check.shape("grad_bias", grad_bias, {outputs}, "[N]");
    check.that(outputs <= 1 || grad_bias.stride(0) == 1, "grad_bias", "without gaps", grad_bias.stride(0));
    int64_t rays = 0, of_rays = 0;
    if (ray_sums.has_value()) {
        checked("ray_sums", *ray_sums, "[B, C]");
        rays = ray_sums->size(0);
        of_rays = ray_sums->size(1);
        check.that(of_rays <= outputs, "ray_sums", "of at most as many columns as delta", of_rays);
        check.that(rays > 0 ? samples % rays == 0 : samples == 0, "ray_sums",
                   "of rays with as many samples each", rays);
    }

    // delta^T [x, beside], in enough parts for every thread to find work to the end.
    const int64_t blocks =
        std::max<int64_t>(1, (inputs + products::kMostColumns - 1) / products::kMostColumns);
    const int64_t parts = std::max<int64_t>(1, 4 * torch::stable::get_num_threads() / blocks);
    const int64_t outputs_at_a_time = std::max<int64_t>(24, (outputs + parts - 1) / parts);
    float* const gradient = static_cast<float*>(grad_weight.mutable_data_ptr());
    std::vector<Product> all;
    const auto gradient_of = [&](const Operand& read, int64_t first, int64_t count) {
        all.push_back({outputs, samples, static_cast<int>(count), deltas.transposed(), read, gradient + first,
                       grad_weight.stride(0), add});
        all.back().rows_at_a_time = outputs_at_a_time;
    };
    gradient_of(of_x, 0, inputs);
    if (beside.has_value()) gradient_of(of_beside, inputs, columns - inputs);
    if (below.has_value())
        all.push_back({samples, outputs, static_cast<int>(inputs), deltas, weights,
                       static_cast<float*>(below->mutable_data_ptr()), below->stride(0), false, of_x.data,
                       of_x.stride});
    all.push_back({1, samples, static_cast<int>(outputs), kRowOfOnes, deltas,
                   static_cast<float*>(grad_bias.mutable_data_ptr()), outputs, add});
    if (rays > 0) {
        all.push_back({rays, samples / rays, static_cast<int>(of_rays), kRowOfOnes, deltas,
                       static_cast<float*>(ray_sums->mutable_data_ptr()), ray_sums->stride(0)});
        all.back().rows_at_a_time = 1;
        all.back().terms_of_each_row = true;
    }
    for_products(all);
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("mlp_layer_backward", TORCH_BOX(&mipnerf::mlp_layer_backward_cpu));
}
