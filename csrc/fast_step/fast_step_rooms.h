// Memory of the fused training step on the CPU: kept from call to call, since fresh pages cost more than the
// arithmetic. No torch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "../hash_encode/hash_encode_math.h"
#include "../tiny_mlp/tiny_mlp_math.h"
#include "../tiny_mlp/tiny_mlp_tiles.h"
#include "fast_step_sizes.h"

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

// Buffers of one shape, made when first asked for.
class RowBuffers {
  public:
    const RowBuffer& at(int64_t index, int rows) {
        if (rows != rows_) buffers_.clear();
        rows_ = rows;
        while (static_cast<int64_t>(buffers_.size()) <= index) buffers_.emplace_back(rows);
        return buffers_[index];
    }

  private:
    int rows_ = 0;
    std::deque<RowBuffer> buffers_;  // a deque: references stay good while it grows
};

// Where the rows of a tile of samples lie in its buffer; a colour tile (samples that count, compacted) uses
// the second half of some tile's.
struct TileRows {
    int position, scale, length, middle, tau, keep, before, ray;
    int features, hidden, geometry, grad_geometry, grad_hidden;
    int source, colour_inputs, colour_hidden[2], raw, rgb, grad_raw, grad_colour_hidden[2];
    int total;

    explicit TileRows(const FastSizes& sizes) {
        int next = 0;
        const auto take = [&next](int rows) {
            const int first = next;
            next += rows;
            return first;
        };
        position = take(3);
        scale = take(1), length = take(1), middle = take(1), tau = take(1), keep = take(1), before = take(1);
        ray = take(1);
        features = take(sizes.inputs);
        hidden = take(sizes.hidden);
        geometry = take(kGeometryFeatures);
        grad_geometry = take(kGeometryFeatures);
        grad_hidden = take(sizes.hidden);
        source = take(1);
        colour_inputs = take(sizes.colour_inputs());
        for (int layer = 0; layer < 2; ++layer)
            colour_hidden[layer] = take(layer < sizes.colour_layers ? sizes.hidden : 0);
        raw = take(4), rgb = take(4), grad_raw = take(4);
        for (int layer = 0; layer < 2; ++layer)
            grad_colour_hidden[layer] = take(layer < sizes.colour_layers ? sizes.hidden : 0);
        total = next;
    }
};

// What a thread works in.
struct FastRoom {
    RowBuffers tiles;
    std::vector<int> columns;      // samples in each tile
    std::vector<int32_t> counted;  // tile x kTile + column of the samples that count, per ray from the front
    std::vector<TilePair> pairs;
};

// What a group of rays leaves for the reduction: its weight gradients, and its tiles for the scatter.
struct GroupResult {
    std::vector<float> weight_gradient;
    RowBuffers tiles;  // rows: position (3), scale, gradient of the encoding
    std::vector<int> columns;
    double loss, squared_error;
    int64_t samples, counted;
};

struct FastWorkspace {
    std::deque<FastRoom> rooms;
    std::deque<GroupResult> groups;
};

// Lends a workspace for one call; concurrent calls get different ones.
class WorkspaceLease {
  public:
    WorkspaceLease() {
        const std::lock_guard<std::mutex> lock(mutex());
        if (!idle().empty()) {
            workspace_ = std::move(idle().back());
            idle().pop_back();
        } else {
            workspace_ = std::make_unique<FastWorkspace>();
        }
    }
    ~WorkspaceLease() {
        const std::lock_guard<std::mutex> lock(mutex());
        idle().push_back(std::move(workspace_));
    }
    WorkspaceLease(const WorkspaceLease&) = delete;
    WorkspaceLease& operator=(const WorkspaceLease&) = delete;
    FastWorkspace& operator*() const { return *workspace_; }

  private:
    static std::mutex& mutex() {
        static std::mutex instance;
        return instance;
    }
    static std::vector<std::unique_ptr<FastWorkspace>>& idle() {
        static std::vector<std::unique_ptr<FastWorkspace>> instance;
        return instance;
    }
    std::unique_ptr<FastWorkspace> workspace_;
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
