// The operators tiny_mlp_forward and tiny_mlp_backward on the CPU: float32 by the dense layers of the fused
// step (tiny_mlp_rows.h), float64, which is for checking, in plain loops over the same formulas.
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

// ---- float32: tiles of samples

constexpr int kTile = 128;

// What a thread works in: rows of the samples of a tile.
struct Room {
    RowBuffer features, hidden, colour_inputs, colour_hidden[2], raw;
    RowBuffer grad_raw, grad_colour_hidden[2], grad_colour_inputs, grad_hidden, grad_features;

    explicit Room(const FastSizes& sizes) {
        const int hidden_width = padded_outputs(sizes.hidden);
        features.reshape(sizes.inputs, kTile);
        for (RowBuffer* buffer : {&hidden, &colour_hidden[0], &colour_hidden[1], &grad_hidden,
                                  &grad_colour_hidden[0], &grad_colour_hidden[1]})
            buffer->reshape(hidden_width, kTile);
        for (RowBuffer* buffer : {&colour_inputs, &grad_colour_inputs})
            buffer->reshape(sizes.colour_inputs(), kTile);
        for (RowBuffer* buffer : {&raw, &grad_raw}) buffer->reshape(4, kTile);
        grad_features.reshape(padded_outputs(sizes.encoded), kTile);
    }
};

struct Tiles {
    const Inputs<float>& in;
    const PackedNetworks& networks;

    // The tile that begins at sample `first`, through both networks.
    template <int W>
    MIPNERF_INLINE void forward(int64_t first, int count, const Room& room) const {
        const FastSizes& sizes = in.sizes;
        const int last = sizes.colour_layers - 1;
        for (int n = 0; n < count; ++n) {
            const float* const given = in.features + (first + n) * in.encoded;
            std::copy(given, given + in.encoded, room.features.at(n));  // zero behind them from the start
            const float* const harmonics = in.harmonics + in.rays[first + n] * kHarmonics;
            std::copy(harmonics, harmonics + kHarmonics, room.colour_inputs.at(n) + kGeometryFeatures);
        }
        dense_rows<W, Epilogue::kRelu>(networks.density_in(), room.features.from(0), room.hidden.from(0),
                                       count);
        // The colour network reads the geometry features where the density network leaves them.
        dense_rows<W, Epilogue::kNone>(networks.density_out(), room.hidden.from(0),
                                       room.colour_inputs.from(0), count);
        dense_rows<W, Epilogue::kRelu>(networks.colour_in(), room.colour_inputs.from(0),
                                       room.colour_hidden[0].from(0), count);
        if (last == 1)
            dense_rows<W, Epilogue::kRelu>(networks.colour_hidden(), room.colour_hidden[0].from(0),
                                           room.colour_hidden[1].from(0), count);
        three_outputs<W>(networks.colour_out(), room.colour_hidden[last].from(0), sizes.hidden,
                         room.raw.from(0), count);
    }
};

struct ForwardTask {
    const Tiles& tiles;
    std::deque<Room>& rooms;
    float* rgb;
    float* density;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        const Room& room = rooms[thread];
        const int64_t first = task * kTile;
        const int count = static_cast<int>(std::min<int64_t>(kTile, tiles.in.samples - first));
        tiles.forward<W>(first, count, room);
        const Rows geometry = room.colour_inputs.from(0), raw = room.raw.from(0);
#pragma omp simd
        for (int n = 0; n < count; ++n) density[first + n] = fast_density(geometry.data[n * geometry.stride]);
        for (int k = 0; k < 3; ++k) {
#pragma omp simd
            for (int n = 0; n < count; ++n) rgb[3 * (first + n) + k] = fast_colour(raw.data[4 * n + k]);
        }
    }
};

// A task has `tiles_per_task` tiles and weight gradients of its own, which are summed in their order: the
// result does not depend on the number of threads.
struct BackwardTask {
    const Tiles& tiles;
    const GradientSums& layout;
    std::deque<Room>& rooms;
    int64_t tiles_per_task;
    const float *grad_rgb, *grad_density;
    const Gradients<float>& out;  // weights: one set of sums a task

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        float* sums = out.weights + task * layout.total;
        const int64_t begin = task * tiles_per_task * kTile;
        const int64_t end = std::min(tiles.in.samples, begin + tiles_per_task * kTile);
        for (int64_t first = begin; first < end; first += kTile)
            one_tile<W>(first, static_cast<int>(std::min<int64_t>(kTile, end - first)), rooms[thread], sums);
    }

    template <int W>
    MIPNERF_INLINE void one_tile(int64_t first, int count, const Room& room, float* sums) const {
        const Inputs<float>& in = tiles.in;
        const FastSizes& sizes = in.sizes;
        const PackedNetworks& networks = tiles.networks;
        const int H = sizes.hidden, last = sizes.colour_layers - 1;
        tiles.forward<W>(first, count, room);
        for (int n = 0; n < count; ++n)
            for (int k = 0; k < 3; ++k)
                room.grad_raw.at(n)[k] =
                    grad_rgb[3 * (first + n) + k] * fast_colour_derivative(room.raw.at(n)[k]);
        three_outputs_backward<W>(networks.colour_out(), room.grad_raw.from(0),
                                  room.colour_hidden[last].from(0), H, room.grad_colour_hidden[last].from(0),
                                  count, sums + layout.colour_out);
        if (last == 1) {
            weight_gradient<W>(room.grad_colour_hidden[1].from(0), H, room.colour_hidden[0].from(0), H, count,
                               sums + layout.colour_hidden);
            dense_rows<W, Epilogue::kReluGradient>(
                networks.colour_hidden_t(), room.grad_colour_hidden[1].from(0),
                room.grad_colour_hidden[0].from(0), count, kNoRows, room.colour_hidden[0].from(0));
        }
        weight_gradient<W>(room.grad_colour_hidden[0].from(0), H, room.colour_inputs.from(0),
                           sizes.colour_inputs(), count, sums + layout.colour_in);
        const int wanted = out.harmonics != nullptr ? sizes.colour_inputs() : kGeometryFeatures;
        dense_rows<W, Epilogue::kNone>(networks.colour_in_t().of_first_outputs(wanted),
                                       room.grad_colour_hidden[0].from(0), room.grad_colour_inputs.from(0),
                                       count);
        for (int n = 0; n < count; ++n) {
            float* const gradient = room.grad_colour_inputs.at(n);
            if (out.harmonics != nullptr)
                std::copy(gradient + kGeometryFeatures, gradient + wanted,
                          out.harmonics + (first + n) * kHarmonics);
            const float raw = *room.colour_inputs.at(n);
            if (fast_density_is_free(raw)) *gradient += grad_density[first + n] * fast_density(raw);
        }
        weight_gradient<W>(room.grad_colour_inputs.from(0), kGeometryFeatures, room.hidden.from(0), H, count,
                           sums + layout.density_out);
        dense_rows<W, Epilogue::kReluGradient>(networks.density_out_t(), room.grad_colour_inputs.from(0),
                                               room.grad_hidden.from(0), count, kNoRows, room.hidden.from(0));
        weight_gradient<W>(room.grad_hidden.from(0), H, room.features.from(0), sizes.inputs, count,
                           sums + layout.density_in);
        if (out.features == nullptr) return;
        dense_rows<W, Epilogue::kNone>(networks.density_in_t(), room.grad_hidden.from(0),
                                       room.grad_features.from(0), count);
        for (int n = 0; n < count; ++n) {
            const float* const gradient = room.grad_features.at(n);
            std::copy(gradient, gradient + in.encoded, out.features + (first + n) * in.encoded);
        }
    }
};

class TilePasses {
  public:
    explicit TilePasses(const Inputs<float>& in)
        : networks_(in.sizes, in.density_in, in.density_out, in.colour_in, in.colour_hidden, in.colour_out),
          layout_(in.sizes),
          tiles_{in, networks_} {}

    void forward(float* rgb, float* density) {
        const int64_t count = (tiles_.in.samples + kTile - 1) / kTile;
        grow(count);
        for_tasks(count, ForwardTask{tiles_, rooms_, rgb, density});
    }

    void backward(const float* grad_rgb, const float* grad_density, Gradients<float> out) {
        const int64_t count = (tiles_.in.samples + kTile - 1) / kTile;
        const int64_t per_task = std::max<int64_t>(4, (count + kMostTasks - 1) / kMostTasks);
        const int64_t tasks = (count + per_task - 1) / per_task;
        std::vector<float> parts(static_cast<size_t>(tasks * layout_.total), 0.0f);
        std::vector<float> sums(static_cast<size_t>(layout_.total), 0.0f);
        float* const weights = out.weights;
        out.weights = parts.data();
        grow(tasks);
        for_tasks(tasks, BackwardTask{tiles_, layout_, rooms_, per_task, grad_rgb, grad_density, out});
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t i = 0; i < layout_.total; ++i) sums[i] += parts[task * layout_.total + i];
        layout_.unpack(sums.data(), weights);
    }

  private:
    static constexpr int64_t kMostTasks = 64;
    void grow(int64_t tasks) {
        while (static_cast<int64_t>(rooms_.size()) < task_threads(tasks))
            rooms_.emplace_back(tiles_.in.sizes);
    }

    PackedNetworks networks_;
    GradientSums layout_;
    Tiles tiles_;
    std::deque<Room> rooms_;
};

void forward(const Inputs<float>& in, float* rgb, float* density) {
    TilePasses(in).forward(rgb, density);
}
void backward(const Inputs<float>& in, const float* grad_rgb, const float* grad_density,
              const Gradients<float>& out) {
    TilePasses(in).backward(grad_rgb, grad_density, out);
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
