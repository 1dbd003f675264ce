// Memory of the fused training step on the CPU: kept from call to call, since fresh pages cost more than the
// arithmetic. No torch.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "../hash_encode/hash_encode_tiles.h"
#include "../tiny_mlp/tiny_mlp_networks.h"

namespace mipnerf {

constexpr int kGroupRays = 64;
// Samples whose backward pass is done at a time: what it leaves from layer to layer stays in the second-level
// cache, and a sum of weight gradients goes through memory once in as many samples.
constexpr int kBackwardSamples = 96;

// Positions in the unit box and widths of samples.
class PlaceBuffer {
  public:
    void grow(int64_t samples) {
        for (RowBuffer& buffer : of_) buffer.grow(samples);
    }
    TilePlaces from(int64_t sample) const {
        return {of_[0].at(sample), of_[1].at(sample), of_[2].at(sample), of_[3].at(sample)};
    }
    float* axis(int k, int64_t sample) const { return of_[k].at(sample); }  // 3: the widths
    void set(int64_t sample, const float* mean, float scale) const {
        for (int axis = 0; axis < 3; ++axis) *of_[axis].at(sample) = mean[axis];
        *of_[3].at(sample) = scale;
    }

  private:
    std::array<RowBuffer, 4> of_;
};

// What a thread works in: samples in the order of the march, and those that count.
struct FastRoom {
    PlaceBuffer places;
    RowBuffer length, middle, tau, keep, before;
    std::vector<int32_t> ray;  // of the group
    RowBuffer features, hidden, geometry;
    std::vector<int32_t> counted, counted_ray;  // sample and ray, per ray from the front
    RowBuffer colour_hidden[2], raw, rgb;       // of the samples that count
    RowBuffer harmonics, view, grad_view;       // of the rays
    // Of kBackwardSamples samples that count.
    RowBuffer grad_raw, grad_colour_hidden[2], grad_geometry, grad_hidden;

    // Rows as wide as the networks are.
    void shape(const FastSizes& sizes) {
        const int hidden = padded_outputs(sizes.hidden);
        features.reshape(sizes.inputs, 0);
        for (RowBuffer* buffer : {&this->hidden, &colour_hidden[0], &colour_hidden[1]})
            buffer->reshape(hidden, 0);
        geometry.reshape(kGeometryFeatures, 0);
        harmonics.reshape(kHarmonics, kGroupRays);
        for (RowBuffer* buffer : {&view, &grad_view}) buffer->reshape(hidden, kGroupRays);
        for (RowBuffer* buffer : {&raw, &rgb}) buffer->reshape(4, 0);
        grad_raw.reshape(4, kBackwardSamples);
        for (RowBuffer* buffer : {&grad_colour_hidden[0], &grad_colour_hidden[1], &grad_hidden})
            buffer->reshape(hidden, kBackwardSamples);
        grad_geometry.reshape(kGeometryFeatures, kBackwardSamples);
    }

    // Room for so many samples, of which the activations are kept or not.
    void grow(int64_t samples, int64_t kept) {
        places.grow(samples);
        for (RowBuffer* buffer : {&length, &middle, &tau, &keep, &before, &geometry}) buffer->grow(samples);
        for (RowBuffer* buffer : {&features, &hidden}) buffer->grow(kept);
        if (static_cast<int64_t>(ray.size()) < samples) ray.resize(samples);
    }
};

// What a group of rays leaves for the reductions: the sums of its weights' gradients, and of the samples that
// count the places and the gradients of the encoding.
struct GroupResult {
    RowBuffer weight_gradient;  // as GradientSums has it
    PlaceBuffer places;
    RowBuffer grad_features;
    double loss, squared_error;
    int64_t samples, counted;
};

struct FastWorkspace {
    std::deque<FastRoom> rooms;
    std::deque<GroupResult> groups;
    // A thread's, of a part of one level's table: zeros between two uses.
    std::deque<std::vector<float>> table_gradients;
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
