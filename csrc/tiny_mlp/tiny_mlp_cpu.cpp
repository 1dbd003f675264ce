// The operators tiny_mlp_forward and tiny_mlp_backward on the CPU: float32 in the tiles of the fused step
// (tiny_mlp_tiles.h), float64, which is for checking, in plain loops over the same formulas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "tiny_mlp_networks.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Inputs {
    int64_t samples, encoded;  // columns of features: at most sizes.inputs, the rest counts as zero
    FastSizes sizes;
    const T *features, *harmonics;
    const int64_t* rays;
    const T *density_in, *density_out, *colour_in, *colour_hidden, *colour_out;
};

// Gradients of one call; null: not wanted. `weights` has the layout of FastSizes; `harmonics` is per sample.
template <typename T>
struct Gradients {
    T *features, *harmonics, *weights;
};

// ---- float32: tiles

// Where a tile's rows lie.
struct Rows {
    int features, hidden, geometry, colour_inputs, colour_hidden[2], raw, rgb;
    int grad_raw, grad_colour_hidden[2], grad_colour_inputs, grad_hidden, grad_features;
    int total;

    Rows(const FastSizes& sizes, bool backward) {
        int next = 0;
        const auto take = [&next](int rows) {
            const int first = next;
            next += rows;
            return first;
        };
        const int second = sizes.colour_layers == 2 ? sizes.hidden : 0;
        features = take(sizes.inputs), hidden = take(sizes.hidden);
        // The colour network reads the geometry features where the density network leaves them.
        geometry = colour_inputs = take(sizes.colour_inputs());
        colour_hidden[0] = take(sizes.hidden), colour_hidden[1] = take(second);
        raw = take(4), rgb = take(4);
        if (backward) {
            grad_raw = take(4), grad_colour_hidden[0] = take(sizes.hidden);
            grad_colour_hidden[1] = take(second);
            grad_colour_inputs = take(sizes.colour_inputs());
            grad_hidden = take(sizes.hidden), grad_features = take(sizes.inputs);
        }
        total = next;
    }
};

struct Tiles {
    const Inputs<float>& in;
    const PackedNetworks& networks;
    const float* all_colour_inputs_t;  // colour_in transposed, the harmonics' rows too
    Rows rows;

    // The tile that begins at sample `first`, through both networks.
    template <int W>
    MIPNERF_INLINE void forward(int64_t first, int count, const RowBuffer& tile) const {
        const FastSizes& sizes = in.sizes;
        const int columns = padded_columns<W>(count);
        for (int k = 0; k < sizes.inputs; ++k) {
            float* row = tile.row(rows.features + k);
            const bool given = k < in.encoded;
            for (int n = 0; n < columns; ++n)
                row[n] = given && n < count ? in.features[(first + n) * in.encoded + k] : 0.0f;
        }
        for (int k = 0; k < kHarmonics; ++k) {
            float* row = tile.row(rows.colour_inputs + kGeometryFeatures + k);
            for (int n = 0; n < columns; ++n)
                row[n] = n < count ? in.harmonics[in.rays[first + n] * kHarmonics + k] : 0.0f;
        }
        dense_tile<W, Epilogue::kRelu>(networks.density_in(), sizes.hidden, sizes.inputs,
                                       tile.row(rows.features), tile.row(rows.hidden), columns);
        dense_tile<W, Epilogue::kNone>(networks.density_out(), kGeometryFeatures, sizes.hidden,
                                       tile.row(rows.hidden), tile.row(rows.geometry), columns);
        dense_tile<W, Epilogue::kRelu>(networks.colour_in(), sizes.hidden, sizes.colour_inputs(),
                                       tile.row(rows.colour_inputs), tile.row(rows.colour_hidden[0]),
                                       columns);
        if (sizes.colour_layers == 2)
            dense_tile<W, Epilogue::kRelu>(networks.colour_hidden(), sizes.hidden, sizes.hidden,
                                           tile.row(rows.colour_hidden[0]), tile.row(rows.colour_hidden[1]),
                                           columns);
        dense_tile<W, Epilogue::kNone>(networks.colour_out(), 3, sizes.hidden,
                                       tile.row(rows.colour_hidden[sizes.colour_layers - 1]),
                                       tile.row(rows.raw), columns);
    }
};

struct ForwardTask {
    const Tiles& tiles;
    std::deque<RowBuffer>& rooms;
    float* rgb;
    float* density;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        const RowBuffer& tile = rooms[thread];
        const int64_t first = task * kTile;
        const int count = static_cast<int>(std::min<int64_t>(kTile, tiles.in.samples - first));
        tiles.forward<W>(first, count, tile);
        const float* geometry = tile.row(tiles.rows.geometry);
#pragma omp simd
        for (int n = 0; n < count; ++n) density[first + n] = fast_density(geometry[n]);
        for (int k = 0; k < 3; ++k) {
            const float* raw = tile.row(tiles.rows.raw + k);
#pragma omp simd
            for (int n = 0; n < count; ++n) rgb[3 * (first + n) + k] = fast_colour(raw[n]);
        }
    }
};

// A task has `tiles_per_task` tiles and weight gradients of its own, which are summed in their order: the
// result does not depend on the number of threads.
struct BackwardTask {
    const Tiles& tiles;
    std::deque<RowBuffer>& rooms;
    int64_t tiles_per_task;
    const float *grad_rgb, *grad_density;
    const Gradients<float>& out;  // weights: one set a task

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        const RowBuffer& tile = rooms[thread];
        float* weights = out.weights + task * tiles.in.sizes.weights();
        const int64_t begin = task * tiles_per_task * kTile;
        const int64_t end = std::min(tiles.in.samples, begin + tiles_per_task * kTile);
        for (int64_t first = begin; first < end; first += kTile)
            one_tile<W>(first, static_cast<int>(std::min<int64_t>(kTile, end - first)), tile, weights);
    }

    template <int W>
    MIPNERF_INLINE void one_tile(int64_t first, int count, const RowBuffer& tile, float* weights) const {
        const Inputs<float>& in = tiles.in;
        const Rows& rows = tiles.rows;
        const FastSizes& sizes = in.sizes;
        const PackedNetworks& networks = tiles.networks;
        const int H = sizes.hidden, last = sizes.colour_layers - 1, columns = padded_columns<W>(count);
        tiles.forward<W>(first, count, tile);
        for (int k = 0; k < 4; ++k) {
            float* to = tile.row(rows.grad_raw + k);
            const float* raw = tile.row(rows.raw + std::min(k, 2));
            for (int n = 0; n < columns; ++n)
                to[n] = k < 3 && n < count ? grad_rgb[3 * (first + n) + k] * fast_colour_derivative(raw[n])
                                           : 0.0f;
        }
        dense_tile<W, Epilogue::kReluGradient>(networks.colour_out_t(), H, 3, tile.row(rows.grad_raw),
                                               tile.row(rows.grad_colour_hidden[last]), columns,
                                               tile.row(rows.colour_hidden[last]));
        if (sizes.colour_layers == 2)
            dense_tile<W, Epilogue::kReluGradient>(
                networks.colour_hidden_t(), H, H, tile.row(rows.grad_colour_hidden[1]),
                tile.row(rows.grad_colour_hidden[0]), columns, tile.row(rows.colour_hidden[0]));
        float* const grad_inputs = tile.row(rows.grad_colour_inputs);
        const int wanted = out.harmonics != nullptr ? sizes.colour_inputs() : kGeometryFeatures;
        dense_tile<W, Epilogue::kNone>(tiles.all_colour_inputs_t, wanted, H,
                                       tile.row(rows.grad_colour_hidden[0]), grad_inputs, columns);
        if (out.harmonics != nullptr)
            for (int n = 0; n < count; ++n)
                for (int k = 0; k < kHarmonics; ++k)
                    out.harmonics[(first + n) * kHarmonics + k] =
                        grad_inputs[(kGeometryFeatures + k) * kTile + n];
        const float* geometry = tile.row(rows.geometry);
        for (int n = 0; n < count; ++n)
            if (fast_density_is_free(geometry[n]))
                grad_inputs[n] += grad_density[first + n] * fast_density(geometry[n]);
        dense_tile<W, Epilogue::kReluGradient>(networks.density_out_t(), H, kGeometryFeatures, grad_inputs,
                                               tile.row(rows.grad_hidden), columns, tile.row(rows.hidden));
        if (out.features != nullptr) {
            float* const grad_features = tile.row(rows.grad_features);
            dense_tile<W, Epilogue::kNone>(networks.density_in_t(), sizes.encoded, H,
                                           tile.row(rows.grad_hidden), grad_features, columns);
            for (int n = 0; n < count; ++n)
                for (int64_t k = 0; k < in.encoded; ++k)
                    out.features[(first + n) * in.encoded + k] = grad_features[k * kTile + n];
        }
        const auto add = [&](int dy, int x, int outputs, int kept, int depth, int64_t at) {
            const TilePair pair{tile.row(dy), tile.row(x), columns};
            weight_gradient<W>(&pair, 1, outputs, kept, depth, weights + at);
        };
        add(rows.grad_raw, rows.colour_hidden[last], 4, 3, H, sizes.colour_out_at());
        if (sizes.colour_layers == 2)
            add(rows.grad_colour_hidden[1], rows.colour_hidden[0], H, H, H, sizes.colour_hidden_at());
        add(rows.grad_colour_hidden[0], rows.colour_inputs, H, H, sizes.colour_inputs(),
            sizes.colour_in_at());
        add(rows.grad_colour_inputs, rows.hidden, kGeometryFeatures, kGeometryFeatures, H,
            sizes.density_out_at());
        add(rows.grad_hidden, rows.features, H, H, sizes.inputs, 0);
    }
};

class TilePasses {
  public:
    TilePasses(const Inputs<float>& in, bool backward)
        : networks_(in.sizes, in.density_in, in.density_out, in.colour_in, in.colour_hidden, in.colour_out,
                    dispatched_row_block()),
          colour_inputs_t_(static_cast<size_t>(packed_rows(in.sizes.colour_inputs())) * in.sizes.hidden),
          tiles_{in, networks_, colour_inputs_t_.data(), Rows(in.sizes, backward)} {
        pack_weights(in.colour_in, in.sizes.colour_inputs(), in.sizes.hidden, 1, in.sizes.colour_inputs(),
                     dispatched_row_block(), colour_inputs_t_.data());
    }

    void forward(float* rgb, float* density) {
        const int64_t count = (tiles_.in.samples + kTile - 1) / kTile;
        grow(count);
        for_tasks(count, ForwardTask{tiles_, rooms_, rgb, density});
    }

    void backward(const float* grad_rgb, const float* grad_density, Gradients<float> out) {
        const int64_t weights = tiles_.in.sizes.weights();
        const int64_t count = (tiles_.in.samples + kTile - 1) / kTile;
        const int64_t per_task = std::max<int64_t>(4, (count + kMostTasks - 1) / kMostTasks);
        const int64_t tasks = (count + per_task - 1) / per_task;
        std::vector<float> parts(static_cast<size_t>(tasks * weights), 0.0f);
        float* const sums = out.weights;
        out.weights = parts.data();
        grow(tasks);
        for_tasks(tasks, BackwardTask{tiles_, rooms_, per_task, grad_rgb, grad_density, out});
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t i = 0; i < weights; ++i) sums[i] += parts[task * weights + i];
    }

  private:
    static constexpr int64_t kMostTasks = 64;
    void grow(int64_t tasks) {
        while (static_cast<int64_t>(rooms_.size()) < task_threads(tasks))
            rooms_.emplace_back(tiles_.rows.total);
    }

    PackedNetworks networks_;
    std::vector<float> colour_inputs_t_;
    Tiles tiles_;
    std::deque<RowBuffer> rooms_;
};

void forward(const Inputs<float>& in, float* rgb, float* density) {
    TilePasses(in, false).forward(rgb, density);
}
void backward(const Inputs<float>& in, const float* grad_rgb, const float* grad_density,
              const Gradients<float>& out) {
    TilePasses(in, true).backward(grad_rgb, grad_density, out);
}

// ---- float64: one sample after the other

struct SampleValues {
    std::vector<double> features, hidden, colour_inputs, colour_hidden[2], raw;
};

// y = W x, rectified or not.
std::vector<double> dense(const double* weights, int rows, const std::vector<double>& x, bool rectified) {
    std::vector<double> y(rows);
    for (int o = 0; o < rows; ++o) {
        for (size_t k = 0; k < x.size(); ++k) y[o] += weights[o * x.size() + k] * x[k];
        if (rectified && y[o] < 0) y[o] = 0;
    }
    return y;
}

// dW += dy x^T and dx = W^T dy, gated by the ReLU whose output is `gate` where there is one.
std::vector<double> dense_backward(const double* weights, const std::vector<double>& x,
                                   const std::vector<double>& dy, double* to_weights,
                                   const std::vector<double>* gate) {
    std::vector<double> dx(x.size());
    for (size_t o = 0; o < dy.size(); ++o)
        for (size_t k = 0; k < x.size(); ++k) {
            dx[k] += weights[o * x.size() + k] * dy[o];
            to_weights[o * x.size() + k] += dy[o] * x[k];
        }
    for (size_t k = 0; gate != nullptr && k < x.size(); ++k)
        if ((*gate)[k] <= 0) dx[k] = 0;
    return dx;
}

SampleValues sample_forward(const Inputs<double>& in, int64_t sample) {
    const FastSizes& sizes = in.sizes;
    SampleValues v;
    v.features.assign(in.features + sample * in.encoded, in.features + (sample + 1) * in.encoded);
    v.features.resize(sizes.inputs);
    v.hidden = dense(in.density_in, sizes.hidden, v.features, true);
    v.colour_inputs = dense(in.density_out, kGeometryFeatures, v.hidden, false);
    const double* harmonics = in.harmonics + in.rays[sample] * kHarmonics;
    v.colour_inputs.insert(v.colour_inputs.end(), harmonics, harmonics + kHarmonics);
    v.colour_hidden[0] = dense(in.colour_in, sizes.hidden, v.colour_inputs, true);
    if (sizes.colour_layers == 2)
        v.colour_hidden[1] = dense(in.colour_hidden, sizes.hidden, v.colour_hidden[0], true);
    v.raw = dense(in.colour_out, 3, v.colour_hidden[sizes.colour_layers - 1], false);
    return v;
}

void forward(const Inputs<double>& in, double* rgb, double* density) {
    for (int64_t s = 0; s < in.samples; ++s) {
        const SampleValues v = sample_forward(in, s);
        for (int k = 0; k < 3; ++k) rgb[3 * s + k] = fast_colour(v.raw[k]);
        density[s] = fast_density(v.colour_inputs[0]);
    }
}

void backward(const Inputs<double>& in, const double* grad_rgb, const double* grad_density,
              const Gradients<double>& out) {
    const FastSizes& sizes = in.sizes;
    const int last = sizes.colour_layers - 1;
    for (int64_t s = 0; s < in.samples; ++s) {
        const SampleValues v = sample_forward(in, s);
        std::vector<double> dy(3);
        for (int k = 0; k < 3; ++k) dy[k] = grad_rgb[3 * s + k] * fast_colour_derivative(v.raw[k]);
        dy = dense_backward(in.colour_out, v.colour_hidden[last], dy, out.weights + sizes.colour_out_at(),
                            &v.colour_hidden[last]);
        if (sizes.colour_layers == 2)
            dy = dense_backward(in.colour_hidden, v.colour_hidden[0], dy,
                                out.weights + sizes.colour_hidden_at(), &v.colour_hidden[0]);
        dy = dense_backward(in.colour_in, v.colour_inputs, dy, out.weights + sizes.colour_in_at(), nullptr);
        if (out.harmonics != nullptr)
            std::copy(dy.begin() + kGeometryFeatures, dy.end(), out.harmonics + s * kHarmonics);
        dy.resize(kGeometryFeatures);
        if (fast_density_is_free(v.colour_inputs[0]))
            dy[0] += grad_density[s] * fast_density(v.colour_inputs[0]);
        dy = dense_backward(in.density_out, v.hidden, dy, out.weights + sizes.density_out_at(), &v.hidden);
        dy = dense_backward(in.density_in, v.features, dy, out.weights, nullptr);
        if (out.features != nullptr)
            std::copy(dy.begin(), dy.begin() + in.encoded, out.features + s * in.encoded);
    }
}

// ---- the operators

// The tensors that Inputs points to, checked.
struct Checked {
    FastSizes sizes;
    int64_t samples, encoded, rays;
    Tensor features, harmonics, ray_of, density_in, density_out, colour_in, colour_out;
    std::optional<Tensor> colour_hidden;

    Checked(const Checker& check, const Tensor& given_features, const Tensor& given_harmonics,
            const Tensor& given_rays, const Tensor& given_density_in, const Tensor& given_density_out,
            const Tensor& given_colour_in, const std::optional<Tensor>& given_colour_hidden,
            const Tensor& given_colour_out) {
        check.dims("features", given_features, 2, "[S, E]");
        check.dtype("features", given_features, {ScalarType::Float, ScalarType::Double});
        samples = given_features.size(0), encoded = given_features.size(1);
        check.dims("harmonics", given_harmonics, 2, "[B, 16]");
        rays = given_harmonics.size(0);
        check.dims("density_in", given_density_in, 2, "[H, I]");
        const int64_t hidden = given_density_in.size(0), inputs = given_density_in.size(1);
        check.that(hidden >= 8 && hidden <= 256 && hidden % 8 == 0, "density_in",
                   "a multiple of 8 up to 256 rows", hidden);
        check.that(inputs >= 4 && inputs <= 256 && inputs % 4 == 0 && encoded <= inputs, "density_in",
                   "a multiple of 4 up to 256 columns, at least as many as features", inputs);
        sizes = {static_cast<int>(encoded), static_cast<int>(inputs), static_cast<int>(hidden),
                 given_colour_hidden.has_value() ? 2 : 1};
        const auto hold = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                              const char* meaning) {
            check.shape(name, tensor, shape, meaning);
            check.same_dtype(name, tensor, "features", given_features);
            check.same_device(name, tensor, "features", given_features);
            return torch::stable::contiguous(tensor);
        };
        features = torch::stable::contiguous(given_features);
        harmonics = hold("harmonics", given_harmonics, {rays, kHarmonics}, "[B, 16]");
        density_in = hold("density_in", given_density_in, {hidden, inputs}, "[H, I]");
        density_out = hold("density_out", given_density_out, {kGeometryFeatures, hidden}, "[16, H]");
        colour_in = hold("colour_in", given_colour_in, {hidden, kGeometryFeatures + kHarmonics}, "[H, 32]");
        if (given_colour_hidden.has_value())
            colour_hidden = hold("colour_hidden", *given_colour_hidden, {hidden, hidden}, "[H, H]");
        colour_out = hold("colour_out", given_colour_out, {3, hidden}, "[3, H]");
        check.shape("rays", given_rays, {samples}, "[S]");
        check.dtype("rays", given_rays, {ScalarType::Long});
        check.same_device("rays", given_rays, "features", given_features);
        ray_of = torch::stable::contiguous(given_rays);
        // Memory is read by these.
        const int64_t* index = static_cast<const int64_t*>(ray_of.const_data_ptr());
        bool inside = true;
        for (int64_t s = 0; s < samples; ++s) inside = inside && index[s] >= 0 && index[s] < rays;
        check.that(inside, "rays", "in [0, B)", "other values");
    }

    template <typename T>
    Inputs<T> of() const {
        const auto data = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
        return {samples,
                encoded,
                sizes,
                data(features),
                data(harmonics),
                static_cast<const int64_t*>(ray_of.const_data_ptr()),
                data(density_in),
                data(density_out),
                data(colour_in),
                colour_hidden.has_value() ? data(*colour_hidden) : nullptr,
                data(colour_out)};
    }
};

template <typename Run>
void with_dtype(const Tensor& tensor, const Run& run) {
    if (tensor.scalar_type() == ScalarType::Double)
        run(double());
    else
        run(float());
}

std::tuple<Tensor, Tensor> tiny_mlp_forward_cpu(Tensor features, Tensor harmonics, Tensor rays,
                                                Tensor density_in, Tensor density_out, Tensor colour_in,
                                                std::optional<Tensor> colour_hidden, Tensor colour_out,
                                                bool tf32) {
    const Checker check{"tiny_mlp_forward"};
    check.that(!tf32, "tf32", "false on the CPU", "true");
    const Checked checked(check, features, harmonics, rays, density_in, density_out, colour_in, colour_hidden,
                          colour_out);
    const Tensor rgb = torch::stable::new_empty(features, {checked.samples, 3});
    const Tensor density = torch::stable::new_empty(features, {checked.samples});
    with_dtype(features, [&](auto zero) {
        using T = decltype(zero);
        forward(checked.of<T>(), static_cast<T*>(rgb.mutable_data_ptr()),
                static_cast<T*>(density.mutable_data_ptr()));
    });
    return {rgb, density};
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven tiny_mlp_backward_cpu(Tensor grad_rgb, Tensor grad_density, Tensor features, Tensor harmonics,
                            Tensor rays, Tensor density_in, Tensor density_out, Tensor colour_in,
                            std::optional<Tensor> colour_hidden, Tensor colour_out, bool tf32,
                            bool wants_features, bool wants_harmonics) {
    const Checker check{"tiny_mlp_backward"};
    check.that(!tf32, "tf32", "false on the CPU", "true");
    const Checked checked(check, features, harmonics, rays, density_in, density_out, colour_in, colour_hidden,
                          colour_out);
    check.shape("grad_rgb", grad_rgb, {checked.samples, 3}, "[S, 3]");
    check.shape("grad_density", grad_density, {checked.samples}, "[S]");
    check.same_dtype("grad_rgb", grad_rgb, "features", features);
    check.same_dtype("grad_density", grad_density, "features", features);
    const Tensor given_rgb = torch::stable::contiguous(grad_rgb);
    const Tensor given_density = torch::stable::contiguous(grad_density);
    const FastSizes& sizes = checked.sizes;
    const int64_t H = sizes.hidden;
    const auto zeros = [&](std::initializer_list<int64_t> shape) {
        return torch::stable::new_zeros(features, shape);
    };
    const Tensor to_features = zeros({wants_features ? checked.samples : 0, checked.encoded});
    const Tensor to_harmonics = zeros({wants_harmonics ? checked.rays : 0, kHarmonics});
    const Tensor to_density_in = zeros({H, sizes.inputs}), to_density_out = zeros({kGeometryFeatures, H});
    const Tensor to_colour_in = zeros({H, sizes.colour_inputs()});
    const Tensor to_colour_hidden = zeros({colour_hidden.has_value() ? H : 0, H});
    const Tensor to_colour_out = zeros({3, H});
    with_dtype(features, [&](auto zero) {
        using T = decltype(zero);
        const auto out = [](const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); };
        std::vector<T> weights(static_cast<size_t>(sizes.weights()), T(0));
        std::vector<T> per_sample(wants_harmonics ? static_cast<size_t>(checked.samples) * kHarmonics : 0);
        const Inputs<T> in = checked.of<T>();
        backward(in, static_cast<const T*>(given_rgb.const_data_ptr()),
                 static_cast<const T*>(given_density.const_data_ptr()),
                 Gradients<T>{wants_features ? out(to_features) : nullptr,
                              wants_harmonics ? per_sample.data() : nullptr, weights.data()});
        for (int64_t s = 0; wants_harmonics && s < checked.samples; ++s)
            for (int64_t k = 0; k < kHarmonics; ++k)
                out(to_harmonics)[in.rays[s] * kHarmonics + k] += per_sample[s * kHarmonics + k];
        const T* next = weights.data();
        for (const Tensor& part :
             {to_density_in, to_density_out, to_colour_in, to_colour_hidden, to_colour_out}) {
            const int64_t count = part.numel();
            std::copy(next, next + count, out(part));
            next += count;
        }
    });
    return {to_features,  to_harmonics,     to_density_in, to_density_out,
            to_colour_in, to_colour_hidden, to_colour_out};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("tiny_mlp_forward", TORCH_BOX(&mipnerf::tiny_mlp_forward_cpu));
    m.impl("tiny_mlp_backward", TORCH_BOX(&mipnerf::tiny_mlp_backward_cpu));
}
