// What the CUDA launches of the occupancy grid take. occupancy_kernels.cuh defines them; the visits are
// instantiated for tables of float and Half and for 2 and 4 features.
#pragma once

#include "../common/device.cuh"
#include "../fast_step/fast_step_launch.h"
#include "occupancy_math.h"

namespace mipnerf {

constexpr int kMaskThreads = 256;
constexpr int kDensityParts = 256;  // of the sum over the grid
constexpr int kChunkCells = 1024;   // cells whose set bits are counted together

// What the masks are made from and what is found.
struct MaskArguments {
    std::int32_t resolution;
    OccupancyLayout layout;
    float max_threshold;
    const float* densities;  // [R, R, R]
    std::uint32_t* masks;    // [words]
    float* parts;            // [kDensityParts]
    float* threshold;        // [1]
    std::int32_t* occupied;  // [1], cells of mask 0
    double* summary;         // [2]: share of cells occupied, threshold
};

void launch_occupancy_masks(const MaskArguments& arguments, Stream stream);

// Where the occupied cells are: the set bits of each chunk of mask 0, their sums by kRayThreads chunks, and
// the sums before each chunk [chunks + 1].
struct OccupiedCells {
    std::int64_t chunks;
    const std::uint32_t* mask;
    std::int32_t* counts;
    std::int32_t* totals;
    std::int64_t* starts;
};
inline std::int64_t occupancy_chunks(std::int32_t resolution) {
    const std::int64_t cells = static_cast<std::int64_t>(resolution) * resolution * resolution;
    return ceil_div(cells, std::int64_t{kChunkCells});
}

struct VisitArguments {
    std::int32_t resolution;
    std::uint64_t seed, step;
    const std::int64_t* step_on_device;  // instead of step; null: step
    std::int64_t visits;                 // of each kind, at most
    float cell_scale, decay;
    float* densities;  // [R, R, R]
    OccupiedCells occupied;
};

// Visits cells drawn from all, then cells drawn from the occupied ones.
template <typename S, int F>
void launch_occupancy_visits(const DeviceModel<S>& model, const VisitArguments& arguments, Stream stream);

}  // namespace mipnerf
