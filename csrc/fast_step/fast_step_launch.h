// What the CUDA launches of the fast model's training step and of its rendering take. fast_step_kernels.cuh
// and fast_render.cuh define them, fast_step_launch.cu instantiates them for tables of float and Half and for
// 2 and 4 features.
#pragma once

#include <algorithm>

#include "../common/device.cuh"
#include "../hash_encode/hash_encode_math.h"
#include "../march/march_launch.h"
#include "../tiny_mlp/tiny_mlp_launch.h"

namespace mipnerf {

// What the device is told of a model: S is the type of the tables, float or Half, and of the encodings kept.
template <typename S>
struct DeviceModel {
    HashGrid grid;
    EncodeOptions encode;
    const S* tables;  // [entries, F]
    DeviceNetworks networks;
};

// ---- the training step --------------------------------------------------------------------------

struct StepTargets {
    const float* background;  // [B, 3]
    const float* rgb;         // [B, 3]
    float beta;               // of the smooth L1 loss
};

// Written by kernels, read by later ones.
struct StepCounters {
    std::int32_t rays;     // that took part: those whose samples had room
    std::int32_t samples;  // of those rays
    std::int32_t counted;  // of those samples, in front of which transmittance was left
    std::int32_t not_finite;
};

// Everything that a step keeps between its kernels, in one piece of memory. A sample is one found by
// marching, a counted sample one that reaches the picture; both stand in the order of the rays. Arrays with
// several numbers per sample hold one feature after the other, but for the F features of a level, which stay
// together.
struct StepScratch {
    std::int64_t rays, capacity;  // capacity: samples there is room for, a multiple of 64
    int parts;                    // over which weight gradients are summed: blocks of the backward kernels
    StepCounters* counters;
    std::int32_t *counts, *totals;  // samples of a ray, of a block of rays
    std::int64_t* starts;           // [B + 1]
    std::int32_t *counted, *counted_totals;
    std::int64_t* counted_starts;  // [B + 1]
    float* loss_parts;             // [blocks of rays, 2]
    float* positions;              // [C, 4]: mean, scale
    float* lengths;                // [C]
    float* tau;                    // [C]
    void* encoding;                // [L, C, F] of S
    float* geometry;               // [16, C]
    std::int32_t* list;            // [C, 2]: sample and ray of a counted sample
    float* raw;              // [4, C] by counted sample: colours before their activation; then gradients,
                             // of the raw density in the fourth row
    float* grad_geometry;    // [16, C] by counted sample
    float* grad_encoding;    // [L, C, F] by counted sample
    float* weight_parts;     // [parts, weights]
    float* weight_sums;      // [weights]
    std::uint32_t* largest;  // [levels at most], of FixedSums
    float* packed;           // NetworkLayout

    // The same walk finds how many bytes are needed (base null) and where each array lies.
    static StepScratch lay_out(unsigned char* base, const FastSizes& sizes, int packed_total,
                               std::size_t table_bytes, std::int64_t rays, std::int64_t capacity, int parts,
                               std::size_t& bytes) {
        StepScratch s{};
        s.rays = rays, s.capacity = capacity, s.parts = parts;
        std::size_t next = 0;
        const auto take = [&](auto*& array, std::int64_t count) {
            using T = std::remove_reference_t<decltype(*array)>;
            if (base != nullptr) array = reinterpret_cast<T*>(base + next);
            next += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
        };
        const std::int64_t blocks = ray_blocks(rays), encoded = sizes.encoded;
        unsigned char* encoding = nullptr;
        take(s.counters, 1);
        take(s.counts, rays), take(s.totals, blocks), take(s.starts, rays + 1);
        take(s.counted, rays), take(s.counted_totals, blocks), take(s.counted_starts, rays + 1);
        take(s.loss_parts, 2 * blocks);
        take(s.positions, 4 * capacity), take(s.lengths, capacity), take(s.tau, capacity);
        take(encoding, capacity * encoded * static_cast<std::int64_t>(table_bytes));
        s.encoding = encoding;
        take(s.geometry, kGeometryFeatures * capacity);
        take(s.list, 2 * capacity), take(s.raw, 4 * capacity);
        take(s.grad_geometry, kGeometryFeatures * capacity), take(s.grad_encoding, encoded * capacity);
        take(s.weight_parts, parts * sizes.weights()), take(s.weight_sums, sizes.weights());
        take(s.largest, kMaxLevels);
        take(s.packed, packed_total);
        bytes = next;
        return s;
    }
};

constexpr int kStepStatistics = 6;  // loss, squared error, samples, counted, finite, rays

// Marches up to counting; scratch.counters then holds rays and samples.
void launch_step_march(const MarchArguments& rays, const StepScratch& scratch, Stream stream);

// The rest, from writing the samples to gradients: added to grad_tables and grads unless one of the networks'
// or the loss is not finite. table_sums: int64 [entries, F], zero before and after, to sum the gradients of
// the tables in fixed point, which must be finite too; null: sums of floats in no particular order.
// statistics: float64 [6].
template <typename S, int F>
void launch_train_step(const DeviceModel<S>& model, const MarchArguments& rays, const StepTargets& targets,
                       const StepScratch& scratch, float* grad_tables, std::int64_t* table_sums,
                       const FastWeights<float>& grads, double* statistics, Stream stream);

// Of the next step: how many samples a ray takes, how many rays that makes for `batch` samples, and the
// step's number.
struct StepPace {
    float* samples_per_ray;     // [1]
    std::int32_t* active_rays;  // [1]
    std::int64_t* step;         // [1]
    float batch;
    int least, most, multiple;  // of rays
};
void launch_step_pace(const double* statistics, const StepPace& pace, Stream stream);

// ---- rendering ----------------------------------------------------------------------------------

struct RenderArrays {
    const float* background;  // [B, 3]
    float* rgb;               // [B, 3]
    float* distance;          // [B]
    float* acc;               // [B]
    std::int32_t* next_ray;   // [1], zero: taken by the blocks as they go
};

template <typename S, int F>
void launch_fast_render(const DeviceModel<S>& model, const MarchArguments& rays, const RenderArrays& arrays,
                        int blocks, Stream stream);

}  // namespace mipnerf
