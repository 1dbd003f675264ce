// The operators hash_encode_forward and hash_encode_backward on the CPU, sample by sample in float32 or
// float64: the plain counterpart of the tiles that the fused step encodes (hash_encode_tiles.h), from the
// same formulas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../common/for_rays.h"
#include "hash_encode_arguments.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Inputs {
    HashGrid grid;
    int64_t features;
    Attenuation attenuation;
    T cutoff;
    const T *points, *scales, *tables;

    uint32_t index(const HashLevel& level, const Cell<T>& cell, int corner) const {
        return corner_index(level, static_cast<uint32_t>(cell.corner[0] + (corner & 1)),
                            static_cast<uint32_t>(cell.corner[1] + (corner >> 1 & 1)),
                            static_cast<uint32_t>(cell.corner[2] + (corner >> 2 & 1)));
    }
    T kept(const HashLevel& level, int64_t sample) const {
        return mipnerf::attenuation(attenuation, scales[sample], static_cast<T>(level.resolution), cutoff);
    }
    Cell<T> cell(const HashLevel& level, int64_t sample) const {
        const T* x = points + 3 * sample;
        return cell_of(x[0], x[1], x[2], level.resolution);
    }
};

template <typename T>
void encode_sample(const Inputs<T>& in, int64_t sample, T* out) {
    for (int l = 0; l < in.grid.levels; ++l) {
        const HashLevel& level = in.grid.level[l];
        T* feature = out + l * in.features;
        for (int64_t f = 0; f < in.features; ++f) feature[f] = T(0);
        const T kept = in.kept(level, sample);
        if (kept == T(0)) continue;
        const Cell<T> cell = in.cell(level, sample);
        for (int corner = 0; corner < 8; ++corner) {
            const T weight = kept * corner_weight(cell, corner);
            const T* entry = in.tables + in.features * in.index(level, cell, corner);
            for (int64_t f = 0; f < in.features; ++f) feature[f] += weight * entry[f];
        }
    }
}

// Gradients of one sample's point and scale.
template <typename T>
void differentiate_sample(const Inputs<T>& in, int64_t sample, const T* grad, T* grad_point, T* grad_scale) {
    for (int k = 0; k < 3; ++k) grad_point[k] = T(0);
    *grad_scale = T(0);
    for (int l = 0; l < in.grid.levels; ++l) {
        const HashLevel& level = in.grid.level[l];
        const T kept = in.kept(level, sample), n = static_cast<T>(level.resolution);
        if (kept == T(0)) continue;
        const Cell<T> cell = in.cell(level, sample);
        T interpolated = T(0);
        for (int corner = 0; corner < 8; ++corner) {
            const T* entry = in.tables + in.features * in.index(level, cell, corner);
            T along = T(0);  // the entry's share of the gradient
            for (int64_t f = 0; f < in.features; ++f) along += grad[l * in.features + f] * entry[f];
            interpolated += corner_weight(cell, corner) * along;
            for (int k = 0; k < 3; ++k)
                grad_point[k] += kept * n * corner_weight_derivative(cell, corner, k) * along;
        }
        *grad_scale += attenuation_derivative(in.attenuation, in.scales[sample], n, kept) * interpolated;
    }
}

// One level's entries, in the order of the samples: levels do not share entries, so they may run side by
// side.
template <typename T>
void scatter_level(const Inputs<T>& in, int64_t samples, int l, const T* grad, T* grad_tables) {
    const HashLevel& level = in.grid.level[l];
    const int64_t row = in.grid.levels * in.features;
    for (int64_t sample = 0; sample < samples; ++sample) {
        const T kept = in.kept(level, sample);
        if (kept == T(0)) continue;
        const Cell<T> cell = in.cell(level, sample);
        for (int corner = 0; corner < 8; ++corner) {
            const T weight = kept * corner_weight(cell, corner);
            T* entry = grad_tables + in.features * in.index(level, cell, corner);
            for (int64_t f = 0; f < in.features; ++f)
                entry[f] += weight * grad[sample * row + l * in.features + f];
        }
    }
}

struct Checked {
    HashGrid grid;
    int64_t samples, features;
    Attenuation attenuation;
    double cutoff;
    Tensor points, scales, tables;

    Checked(const Checker& check, const Tensor& given_points, const Tensor& given_scales,
            const Tensor& given_tables, const std::vector<int64_t>& resolutions, int64_t table_size,
            int64_t kind, double given_cutoff)
        : grid(checked_hash_grid(check, given_tables, resolutions, table_size)),
          features(given_tables.size(1)),
          attenuation(attenuation_coded(check, kind)),
          cutoff(given_cutoff) {
        check.dims("points", given_points, 2, "[S, 3]");
        samples = given_points.size(0);
        check.shape("points", given_points, {samples, 3}, "[S, 3]");
        check.shape("scales", given_scales, {samples}, "[S]");
        check.dtype("points", given_points, {ScalarType::Float, ScalarType::Double});
        check.same_dtype("scales", given_scales, "points", given_points);
        check.same_dtype("tables", given_tables, "points", given_points);
        check.same_device("scales", given_scales, "points", given_points);
        check.same_device("tables", given_tables, "points", given_points);
        points = torch::stable::contiguous(given_points);
        scales = torch::stable::contiguous(given_scales);
        tables = torch::stable::contiguous(given_tables);
    }

    template <typename T>
    Inputs<T> of() const {
        const auto data = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
        return {grid,         features,     attenuation, static_cast<T>(cutoff),
                data(points), data(scales), data(tables)};
    }
};

template <typename Run>
void with_dtype(const Tensor& tensor, const Run& run) {
    if (tensor.scalar_type() == ScalarType::Double)
        run(double());
    else
        run(float());
}

constexpr int64_t kSamplesPerTask = 1024;

Tensor hash_encode_forward_cpu(Tensor points, Tensor scales, Tensor tables, std::vector<int64_t> resolutions,
                               int64_t table_size, int64_t attenuation, double cutoff) {
    const Checked checked(Checker{"hash_encode_forward"}, points, scales, tables, resolutions, table_size,
                          attenuation, cutoff);
    const int64_t row = checked.grid.levels * checked.features;
    const Tensor out = torch::stable::new_empty(points, {checked.samples, row});
    with_dtype(points, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in = checked.of<T>();
        T* const features = static_cast<T*>(out.mutable_data_ptr());
        torch::stable::parallel_for(0, checked.samples, kSamplesPerTask, [&](int64_t begin, int64_t end) {
            for (int64_t sample = begin; sample < end; ++sample)
                encode_sample(in, sample, features + sample * row);
        });
    });
    return out;
}

std::tuple<Tensor, Tensor, Tensor> hash_encode_backward_cpu(Tensor grad_features, Tensor points,
                                                            Tensor scales, Tensor tables,
                                                            std::vector<int64_t> resolutions,
                                                            int64_t table_size, int64_t attenuation,
                                                            double cutoff, bool /* is always true here */) {
    const Checker check{"hash_encode_backward"};
    const Checked checked(check, points, scales, tables, resolutions, table_size, attenuation, cutoff);
    const int64_t row = checked.grid.levels * checked.features;
    check.shape("grad_features", grad_features, {checked.samples, row}, "[S, L F]");
    check.same_dtype("grad_features", grad_features, "points", points);
    const Tensor given = torch::stable::contiguous(grad_features);
    const Tensor to_points = torch::stable::new_empty(points, {checked.samples, 3});
    const Tensor to_scales = torch::stable::new_empty(points, {checked.samples});
    const Tensor to_tables = torch::stable::new_zeros(points, {checked.grid.entries, checked.features});
    with_dtype(points, [&](auto zero) {
        using T = decltype(zero);
        const Inputs<T> in = checked.of<T>();
        const T* const grad = static_cast<const T*>(given.const_data_ptr());
        T* const grad_points = static_cast<T*>(to_points.mutable_data_ptr());
        T* const grad_scales = static_cast<T*>(to_scales.mutable_data_ptr());
        T* const grad_tables = static_cast<T*>(to_tables.mutable_data_ptr());
        torch::stable::parallel_for(0, checked.samples, kSamplesPerTask, [&](int64_t begin, int64_t end) {
            for (int64_t sample = begin; sample < end; ++sample)
                differentiate_sample(in, sample, grad + sample * row, grad_points + 3 * sample,
                                     grad_scales + sample);
        });
        torch::stable::parallel_for(0, checked.grid.levels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t l = begin; l < end; ++l)
                scatter_level(in, checked.samples, static_cast<int>(l), grad, grad_tables);
        });
    });
    return {to_points, to_scales, to_tables};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("hash_encode_forward", TORCH_BOX(&mipnerf::hash_encode_forward_cpu));
    m.impl("hash_encode_backward", TORCH_BOX(&mipnerf::hash_encode_backward_cpu));
}
