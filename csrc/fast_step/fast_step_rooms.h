// Memory of the fused training step on the CPU: kept from call to call, since fresh pages cost more than the
// arithmetic. No torch.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "../tiny_mlp/tiny_mlp_networks.h"

namespace mipnerf {

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

}  // namespace mipnerf
