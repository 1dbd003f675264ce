// The operators mlp_fold and mlp_unfold on the CPU: the bottleneck and the layer above it as one, and the
// gradients of the two from those of the one. Of a few samples' call this takes as long as a layer's
// products, and torch a dozen calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "mlp_products.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What both operators read, checked: C outputs of the view layer, K columns that the bottleneck reads, W of
// the trunk's that it gives, V of the encoded directions of B rays.
struct Folding {
    const Checker check;
    const Tensor& like;
    int64_t outputs, width, columns, directions, rays;
    std::vector<Tensor> copies;  // of what is not contiguous, while it is needed

    Folding(const char* op, const Tensor& viewdirs_enc, const Tensor& view_weight,
            const Tensor& bottleneck_weight, const Tensor& bottleneck_bias)
        : check{op}, like(view_weight) {
        check.dims("view_weight", view_weight, 2, "[C, W + V]");
        check.dtype("view_weight", view_weight, {ScalarType::Float});
        check.dims("bottleneck_weight", bottleneck_weight, 2, "[W, K]");
        check.dims("viewdirs_enc", viewdirs_enc, 2, "[B, V]");
        outputs = view_weight.size(0);
        width = bottleneck_weight.size(0);
        columns = bottleneck_weight.size(1);
        rays = viewdirs_enc.size(0);
        directions = viewdirs_enc.size(1);
        check.shape("view_weight", view_weight, {outputs, width + directions}, "[C, W + V]");
        check.shape("bottleneck_bias", bottleneck_bias, {width}, "[W]");
    }

    const float* data(const char* name, const Tensor& tensor) {
        check.same_dtype(name, tensor, "view_weight", like);
        check.same_device(name, tensor, "view_weight", like);
        if (tensor.is_contiguous()) return static_cast<const float*>(tensor.const_data_ptr());
        copies.push_back(torch::stable::contiguous(tensor));
        return static_cast<const float*>(copies.back().const_data_ptr());
    }

    Operand rows(const char* name, const Tensor& tensor) {
        return {data(name, tensor), tensor.size(1), false};
    }
};

float* made(const Tensor& tensor) {
    return static_cast<float*>(tensor.mutable_data_ptr());
}

// See csrc/library.cpp.
std::tuple<Tensor, Tensor> mlp_fold_cpu(Tensor viewdirs_enc, Tensor view_weight, Tensor view_bias,
                                        Tensor bottleneck_weight, Tensor bottleneck_bias,
                                        Tensor density_weight) {
    Folding f("mlp_fold", viewdirs_enc, view_weight, bottleneck_weight, bottleneck_bias);
    const int64_t outputs = f.outputs, width = f.width, columns = f.columns;
    f.check.shape("view_bias", view_bias, {outputs}, "[C]");
    f.check.shape("density_weight", density_weight, {1, columns}, "[1, K]");
    const Operand view = f.rows("view_weight", view_weight);
    const Operand bottleneck = f.rows("bottleneck_weight", bottleneck_weight);
    const Operand directions = f.rows("viewdirs_enc", viewdirs_enc);
    const float* const density = f.data("density_weight", density_weight);
    const float* const bias = f.data("view_bias", view_bias);
    const float* const of_bottleneck = f.data("bottleneck_bias", bottleneck_bias);
    Tensor top = torch::stable::new_empty(view_weight, {outputs + 1, columns});
    Tensor ray_biases = torch::stable::new_empty(view_weight, {f.rays, outputs});
    std::copy_n(density, columns, made(top) + outputs * columns);
    std::vector<float> shared(outputs);
    const int c = static_cast<int>(outputs);
    const Product and_bias{1, 1, c, kColumnOfOnes, same_row(bias), shared.data(), outputs};
    Product of_rays{1, width, c, same_row(of_bottleneck), view.transposed(), shared.data(), outputs};
    of_rays.then = &and_bias;
    for_products(
        {{outputs, width, static_cast<int>(columns), view, bottleneck, made(top), columns}, of_rays});
    const Product and_shared{f.rays, 1, c, kColumnOfOnes, same_row(shared.data()), made(ray_biases), outputs};
    of_rays = {f.rays,           f.directions, c, directions, view.from_column(width).transposed(),
               made(ray_biases), outputs};
    of_rays.then = &and_shared;
    for_products({of_rays});
    return {top, ray_biases};
}

// See csrc/library.cpp.
std::vector<Tensor> mlp_unfold_cpu(Tensor grad_top, Tensor sums, Tensor of_ray_biases, Tensor viewdirs_enc,
                                   Tensor view_weight, Tensor bottleneck_weight, Tensor bottleneck_bias,
                                   bool to_viewdirs) {
    Folding f("mlp_unfold", viewdirs_enc, view_weight, bottleneck_weight, bottleneck_bias);
    const int64_t outputs = f.outputs, width = f.width, columns = f.columns, rays = f.rays;
    f.check.shape("grad_top", grad_top, {outputs + 1, columns}, "[C + 1, K]");
    f.check.shape("sums", sums, {outputs + 1}, "[C + 1]");
    f.check.shape("of_ray_biases", of_ray_biases, {rays, outputs}, "[B, C]");
    const Operand gradient = f.rows("grad_top", grad_top);
    const float* const summed = f.data("sums", sums);
    const Operand of_rays = f.rows("of_ray_biases", of_ray_biases);
    const Operand directions = f.rows("viewdirs_enc", viewdirs_enc);
    const Operand view = f.rows("view_weight", view_weight);
    const Operand bottleneck = f.rows("bottleneck_weight", bottleneck_weight);
    const float* const bias = f.data("bottleneck_bias", bottleneck_bias);
    std::vector<Tensor> results;
    const auto empty = [&](std::initializer_list<int64_t> sizes) {
        results.push_back(torch::stable::new_empty(view_weight, sizes));
        return made(results.back());
    };
    std::copy_n(gradient.at(outputs, 0), columns, empty({1, columns}));
    *empty({1}) = summed[outputs];
    float* const grad_bottleneck = empty({width, columns});
    float* const grad_bottleneck_bias = empty({width});
    float* const grad_view = empty({outputs, view.stride});
    std::copy_n(summed, outputs, empty({outputs}));
    float* const of_viewdirs = empty({to_viewdirs ? rays : 0, f.directions});
    const int w = static_cast<int>(width), v = static_cast<int>(f.directions);
    const Operand sums_column{summed, outputs, true};
    const Product and_bias{outputs, 1, w, sums_column, same_row(bias), grad_view, view.stride};
    Product of_trunk{outputs, columns, w, gradient, bottleneck.transposed(), grad_view, view.stride};
    of_trunk.then = &and_bias;
    std::vector<Product> products{
        of_trunk,
        {width, outputs, static_cast<int>(columns), view.transposed(), gradient, grad_bottleneck, columns},
        {1, outputs, w, same_row(summed), view, grad_bottleneck_bias, width},
        {outputs, rays, v, of_rays.transposed(), directions, grad_view + width, view.stride}};
    if (to_viewdirs)
        products.push_back({rays, outputs, v, of_rays, view.from_column(width), of_viewdirs, f.directions});
    for_products(products);
    return results;
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("mlp_fold", TORCH_BOX(&mipnerf::mlp_fold_cpu));
    m.impl("mlp_unfold", TORCH_BOX(&mipnerf::mlp_unfold_cpu));
}
