// The two small networks' weights as the tiles read them, and the rows in which tiles lie. No torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "tiny_mlp_math.h"
#include "tiny_mlp_sizes.h"
#include "tiny_mlp_tiles.h"

namespace mipnerf {

// Rows of kTile floats, aligned for the widest vector.
class RowBuffer {
  public:
    explicit RowBuffer(int rows) : data_(static_cast<float*>(std::aligned_alloc(64, bytes(rows)))) {
        if (data_ == nullptr) throw std::bad_alloc();
        std::memset(data_.get(), 0, bytes(rows));
    }
    float* row(int index) const { return data_.get() + static_cast<int64_t>(index) * kTile; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    static size_t bytes(int rows) { return static_cast<size_t>(rows) * kTile * sizeof(float); }
    std::unique_ptr<float[], Free> data_;
};

// The networks' weights in the order in which the dense kernels read them, forward and transposed.
class PackedNetworks {
  public:
    PackedNetworks(const FastSizes& sizes, const float* density_in, const float* density_out,
                   const float* colour_in, const float* colour_hidden, const float* colour_out, int block) {
        const int H = sizes.hidden, C = sizes.colour_inputs();
        density_in_ = add(density_in, H, sizes.inputs, sizes.inputs, 1, block);
        density_in_t_ = add(density_in, sizes.encoded, H, 1, sizes.inputs, block);
        density_out_ = add(density_out, kGeometryFeatures, H, H, 1, block);
        density_out_t_ = add(density_out, H, kGeometryFeatures, 1, H, block);
        colour_in_ = add(colour_in, H, C, C, 1, block);
        colour_in_t_ = add(colour_in, kGeometryFeatures, H, 1, C, block);
        if (sizes.colour_layers == 2) {
            colour_hidden_ = add(colour_hidden, H, H, H, 1, block);
            colour_hidden_t_ = add(colour_hidden, H, H, 1, H, block);
        }
        colour_out_ = add(colour_out, 3, H, H, 1, block);
        colour_out_t_ = add(colour_out, H, 3, 1, H, block);
    }

    const float* density_in() const { return at(density_in_); }
    const float* density_in_t() const { return at(density_in_t_); }
    const float* density_out() const { return at(density_out_); }
    const float* density_out_t() const { return at(density_out_t_); }
    const float* colour_in() const { return at(colour_in_); }
    const float* colour_in_t() const { return at(colour_in_t_); }
    const float* colour_hidden() const { return at(colour_hidden_); }
    const float* colour_hidden_t() const { return at(colour_hidden_t_); }
    const float* colour_out() const { return at(colour_out_); }
    const float* colour_out_t() const { return at(colour_out_t_); }

  private:
    size_t add(const float* weights, int rows, int depth, int row_stride, int depth_stride, int block) {
        const size_t first = packed_.size();
        packed_.resize(first + static_cast<size_t>(packed_rows(rows)) * depth);
        pack_weights(weights, rows, depth, row_stride, depth_stride, block, packed_.data() + first);
        return first;
    }
    const float* at(size_t offset) const { return packed_.data() + offset; }

    std::vector<float> packed_;
    size_t density_in_, density_in_t_, density_out_, density_out_t_, colour_in_, colour_in_t_;
    size_t colour_hidden_ = 0, colour_hidden_t_ = 0, colour_out_, colour_out_t_;
};

}  // namespace mipnerf
