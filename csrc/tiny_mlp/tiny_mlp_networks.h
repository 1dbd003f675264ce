// The two small networks' weights as the dense kernels read them, and their gradients as those leave them.
// No torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "tiny_mlp_math.h"
#include "tiny_mlp_rows.h"
#include "tiny_mlp_sizes.h"

namespace mipnerf {

// Rows of floats, aligned for the widest vector; they are kept while it grows.
class RowBuffer {
  public:
    explicit RowBuffer(int stride = 1) : stride_(stride) {}

    // Room for this many rows; new ones are zero.
    void grow(int64_t rows) {
        if (rows <= rows_) return;
        const int64_t more = std::max(rows, 2 * rows_);
        const size_t bytes = (static_cast<size_t>(more) * stride_ * sizeof(float) + 63) / 64 * 64;
        std::unique_ptr<float[], Free> data(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (data == nullptr) throw std::bad_alloc();
        const size_t kept = static_cast<size_t>(rows_) * stride_;
        std::memset(data.get() + kept, 0, bytes - kept * sizeof(float));
        if (kept > 0) std::memcpy(data.get(), data_.get(), kept * sizeof(float));
        data_ = std::move(data);
        rows_ = more;
    }
    // Rows of another width, with room for this many.
    void reshape(int stride, int64_t rows) {
        if (stride != stride_) *this = RowBuffer(stride);
        grow(rows);
    }
    float* at(int64_t row) const { return data_.get() + row * stride_; }
    Rows from(int64_t row) const { return {at(row), stride_}; }
    Rows picked(const int32_t* pick) const { return {at(0), stride_, pick}; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    int64_t stride_, rows_ = 0;
    std::unique_ptr<float[], Free> data_;
};

// The networks' weights, forward and transposed.
class PackedNetworks {
  public:
    PackedNetworks(const FastSizes& sizes, const float* density_in, const float* density_out,
                   const float* colour_in, const float* colour_hidden, const float* colour_out) {
        const int H = sizes.hidden, C = sizes.colour_inputs();
        density_in_ = add(density_in, H, sizes.inputs, sizes.inputs, 1);
        density_in_t_ = add(density_in, sizes.encoded, H, 1, sizes.inputs);
        density_out_ = add(density_out, kGeometryFeatures, H, H, 1);
        density_out_t_ = add(density_out, H, kGeometryFeatures, 1, H);
        colour_in_ = add(colour_in, H, C, C, 1);
        colour_in_t_ = add(colour_in, C, H, 1, C);
        if (sizes.colour_layers == 2) {
            colour_hidden_ = add(colour_hidden, H, H, H, 1);
            colour_hidden_t_ = add(colour_hidden, H, H, 1, H);
        }
        const int padded = padded_outputs(H);
        colour_out_ = take(3 * padded);
        for (int c = 0; c < 3; ++c)
            std::copy(colour_out + c * H, colour_out + (c + 1) * H, packed_.at(0) + colour_out_ + c * padded);
    }

    PackedLayer density_in() const { return layer(density_in_); }
    PackedLayer density_in_t() const { return layer(density_in_t_); }
    PackedLayer density_out() const { return layer(density_out_); }
    PackedLayer density_out_t() const { return layer(density_out_t_); }
    PackedLayer colour_in() const { return layer(colour_in_); }
    PackedLayer colour_in_t() const { return layer(colour_in_t_); }
    PackedLayer colour_hidden() const { return layer(colour_hidden_); }
    PackedLayer colour_hidden_t() const { return layer(colour_hidden_t_); }
    // [3, padded hidden]
    const float* colour_out() const { return packed_.at(0) + colour_out_; }

  private:
    struct Place {
        int64_t offset;
        int outputs, depth;
    };
    // Floats, a multiple of kOutputBlock, zero: where they begin.
    int64_t take(int64_t floats) {
        const int64_t first = taken_;
        taken_ += floats;
        packed_.grow(taken_ / kOutputBlock);
        return first;
    }
    Place add(const float* weights, int outputs, int depth, int output_stride, int depth_stride) {
        const int64_t first = take(static_cast<int64_t>(padded_outputs(outputs)) * depth);
        pack_weights(weights, outputs, depth, output_stride, depth_stride, packed_.at(0) + first);
        return {first, outputs, depth};
    }
    PackedLayer layer(const Place& place) const {
        return {packed_.at(0) + place.offset, place.outputs, place.depth,
                static_cast<int64_t>(place.depth) * kOutputBlock};
    }

    RowBuffer packed_{kOutputBlock};
    int64_t taken_ = 0;
    Place density_in_, density_in_t_, density_out_, density_out_t_, colour_in_, colour_in_t_;
    Place colour_hidden_{}, colour_hidden_t_{};
    int64_t colour_out_;
};

// Where the weights' gradients lie as weight_gradient sums them, [inputs, padded outputs] a layer, and the
// way from there to the layout of FastSizes.
class GradientSums {
  public:
    explicit GradientSums(const FastSizes& sizes) : sizes_(sizes) {
        const int64_t H = padded_outputs(sizes.hidden);
        density_out = density_in + sizes.inputs * H;
        colour_in = density_out + static_cast<int64_t>(sizes.hidden) * kGeometryFeatures;
        colour_hidden = colour_in + sizes.colour_inputs() * H;
        colour_out = colour_hidden + (sizes.colour_layers == 2 ? sizes.hidden * H : 0);
        total = colour_out + 3 * H;
    }
    int64_t density_in = 0, density_out, colour_in, colour_hidden, colour_out;
    int64_t total;

    void unpack(const float* sums, float* weights) const {
        const int H = sizes_.hidden;
        transpose(sums + density_in, sizes_.inputs, H, weights);
        transpose(sums + density_out, H, kGeometryFeatures, weights + sizes_.density_out_at());
        transpose(sums + colour_in, sizes_.colour_inputs(), H, weights + sizes_.colour_in_at());
        if (sizes_.colour_layers == 2)
            transpose(sums + colour_hidden, H, H, weights + sizes_.colour_hidden_at());
        for (int c = 0; c < 3; ++c) {
            const float* from = sums + colour_out + c * padded_outputs(H);
            std::copy(from, from + H, weights + sizes_.colour_out_at() + c * H);
        }
    }

  private:
    static void transpose(const float* sums, int inputs, int outputs, float* weights) {
        for (int o = 0; o < outputs; ++o)
            for (int k = 0; k < inputs; ++k) weights[o * inputs + k] = sums[k * padded_outputs(outputs) + o];
    }
    FastSizes sizes_;
};

}  // namespace mipnerf
