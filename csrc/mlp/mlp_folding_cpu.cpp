// The operator mlp_unfold on the CPU: from the gradients of the layer that the bottleneck and the one above
// it were folded into, those of the two. Of a few samples' call this takes as long as a layer's products, and
// torch a dozen calls. And the folding itself.
#include "mlp_folding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../common/checks.h"
#include "mlp_products.h"

namespace mipnerf {

void fold(const Folding& f, float* folded, float* ray_biases) {
    const int columns = static_cast<int>(f.columns), outputs = static_cast<int>(f.outputs);
    const Operand view{f.view_weight, f.width + f.directions, false};
    const Operand bottleneck{f.bottleneck_weight, f.columns, false};
    std::vector<float> shared(f.outputs);
    const Product and_bias{1, 1, outputs, kColumnOfOnes, same_row(f.view_bias), shared.data(), f.outputs};
    Product biases{1,        f.width, outputs, same_row(f.bottleneck_bias), view.transposed(), shared.data(),
                   f.outputs};
    biases.then = &and_bias;
    for_products({{f.outputs, f.width, columns, view, bottleneck, folded, f.columns}, biases});
    const Product and_shared{f.rays,     1,        outputs, kColumnOfOnes, same_row(shared.data()),
                             ray_biases, f.outputs};
    biases = {f.rays,
              f.directions,
              outputs,
              Operand{f.viewdirs_enc, f.directions, false},
              view.from_column(f.width).transposed(),
              ray_biases,
              f.outputs};
    biases.then = &and_shared;
    for_products({biases});
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// See csrc/library.cpp.
std::vector<Tensor> mlp_unfold_cpu(Tensor grad_top, Tensor sums, Tensor of_ray_biases, Tensor viewdirs_enc,
                                   Tensor view_weight, Tensor bottleneck_weight, Tensor bottleneck_bias,
                                   bool to_viewdirs) {
    const Checker check{"mlp_unfold"};
    check.dims("view_weight", view_weight, 2, "[C, W + V]");
    check.dtype("view_weight", view_weight, {ScalarType::Float});
    check.dims("bottleneck_weight", bottleneck_weight, 2, "[W, K]");
    check.dims("viewdirs_enc", viewdirs_enc, 2, "[B, V]");
    const int64_t outputs = view_weight.size(0), columns = bottleneck_weight.size(1);
    const int64_t width = bottleneck_weight.size(0);
    const int64_t rays = viewdirs_enc.size(0), directions = viewdirs_enc.size(1);
    check.shape("view_weight", view_weight, {outputs, width + directions}, "[C, W + V]");
    check.shape("bottleneck_bias", bottleneck_bias, {width}, "[W]");
    check.shape("grad_top", grad_top, {outputs + 1, columns}, "[C + 1, K]");
    check.shape("sums", sums, {outputs + 1}, "[C + 1]");
    check.shape("of_ray_biases", of_ray_biases, {rays, outputs}, "[B, C]");
    std::vector<Tensor> copies;  // of what is not contiguous, while it is needed
    const auto data = [&](const char* name, const Tensor& tensor) {
        check.same_dtype(name, tensor, "view_weight", view_weight);
        check.same_device(name, tensor, "view_weight", view_weight);
        if (tensor.is_contiguous()) return static_cast<const float*>(tensor.const_data_ptr());
        copies.push_back(torch::stable::contiguous(tensor));
        return static_cast<const float*>(copies.back().const_data_ptr());
    };
    const auto rows = [&](const char* name, const Tensor& tensor) {
        return Operand{data(name, tensor), tensor.size(1), false};
    };
    const Operand gradient = rows("grad_top", grad_top);
    const float* const summed = data("sums", sums);
    const Operand of_rays = rows("of_ray_biases", of_ray_biases);
    const Operand from_rays = rows("viewdirs_enc", viewdirs_enc);
    const Operand view = rows("view_weight", view_weight);
    const Operand bottleneck = rows("bottleneck_weight", bottleneck_weight);
    const float* const bias = data("bottleneck_bias", bottleneck_bias);
    std::vector<Tensor> results;
    const auto empty = [&](std::initializer_list<int64_t> sizes) {
        results.push_back(torch::stable::new_empty(view_weight, sizes));
        return static_cast<float*>(results.back().mutable_data_ptr());
    };
    std::copy_n(gradient.at(outputs, 0), columns, empty({1, columns}));
    *empty({1}) = summed[outputs];
    float* const grad_bottleneck = empty({width, columns});
    float* const grad_bottleneck_bias = empty({width});
    float* const grad_view = empty({outputs, view.stride});
    std::copy_n(summed, outputs, empty({outputs}));
    float* const of_viewdirs = empty({to_viewdirs ? rays : 0, directions});
    const int w = static_cast<int>(width), v = static_cast<int>(directions);
    const Operand sums_column{summed, outputs, true};
    const Product and_bias{outputs, 1, w, sums_column, same_row(bias), grad_view, view.stride};
    Product of_trunk{outputs, columns, w, gradient, bottleneck.transposed(), grad_view, view.stride};
    of_trunk.then = &and_bias;
    std::vector<Product> products{
        of_trunk,
        {width, outputs, static_cast<int>(columns), view.transposed(), gradient, grad_bottleneck, columns},
        {1, outputs, w, same_row(summed), view, grad_bottleneck_bias, width},
        {outputs, rays, v, of_rays.transposed(), from_rays, grad_view + width, view.stride}};
    if (to_viewdirs)
        products.push_back({rays, outputs, v, of_rays, view.from_column(width), of_viewdirs, directions});
    for_products(products);
    return results;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("mlp_unfold", TORCH_BOX(&mipnerf::mlp_unfold_cpu));
}
