// The CUDA kernels of the occupancy grid: densities of drawn cells, and the masks made from all densities.
// Every sum is taken in a fixed order or is of whole numbers.
#pragma once

#include "../fast_step/fast_step_device.cuh"
#include "../march/march_device.cuh"
#include "occupancy_launch.h"

namespace mipnerf {

// ---- masks --------------------------------------------------------------------------------------

// Sum of a block's numbers, in thread 0; shared memory: a number per thread.
MIPNERF_DEVICE float tree_sum(float value) {
    float* const sums = shared_memory<float>();
    sums[threadIdx.x] = value;
    for (int half = kMaskThreads / 2; half > 0; half /= 2) {
        block_sync();
        if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

// Block b sums the densities of its part of the grid, each cut to four times the highest threshold.
__global__ void __launch_bounds__(kMaskThreads)
    occupancy_sum_kernel(const __grid_constant__ MaskArguments in) {
    const std::int64_t cells = static_cast<std::int64_t>(in.resolution) * in.resolution * in.resolution;
    const std::int64_t packs = cells / 4;  // R is a multiple of 32
    const std::int64_t first = packs * blockIdx.x / kDensityParts,
                       end = packs * (blockIdx.x + 1) / kDensityParts;
    const float high = 4.0f * in.max_threshold;
    float sum = 0.0f;
    for (std::int64_t i = first + threadIdx.x; i < end; i += kMaskThreads) {
        const Pack<float, 4> four = load_pack<4>(in.densities + 4 * i);
        float of_four = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) of_four += high < four.value[k] ? high : four.value[k];
        sum += of_four;
    }
    sum = tree_sum(sum);
    if (threadIdx.x == 0) in.parts[blockIdx.x] = sum;
}

// One block: the threshold; nothing counted yet.
__global__ void __launch_bounds__(kMaskThreads)
    occupancy_threshold_kernel(const __grid_constant__ MaskArguments in) {
    static_assert(kDensityParts == kMaskThreads, "a thread per part");
    const float sum = tree_sum(in.parts[threadIdx.x]);
    if (threadIdx.x != 0) return;
    const float side = static_cast<float>(in.resolution), mean = sum / (side * side * side);
    *in.threshold = mean < in.max_threshold ? mean : in.max_threshold;
    *in.occupied = 0;
}

// Warp w of the grid writes word w of mask 0.
__global__ void __launch_bounds__(kMaskThreads)
    occupancy_bits_kernel(const __grid_constant__ MaskArguments in) {
    const std::int64_t cells = static_cast<std::int64_t>(in.resolution) * in.resolution * in.resolution;
    const std::int64_t cell = static_cast<std::int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
    const unsigned word =
        warp_ballot(cell < cells && load_pack<1>(in.densities + cell).value[0] > *in.threshold);
    if (lane_index() != 0 || cell >= cells) return;
    in.masks[in.layout.mask[0].words + cell / 32] = word;
    if (word != 0) atomic_add(in.occupied, count_bits(word));
}

// Whether a bit is set in the cells low <= i < high of a mask, cut to the mask.
MIPNERF_DEVICE bool any_bit(const std::uint32_t* words, int cells, const int (&low)[3],
                            const int (&high)[3]) {
    int from[3], to[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        from[k] = low[k] < 0 ? 0 : low[k];
        to[k] = high[k] > cells ? cells : high[k];
    }
    for (int z = from[2]; z < to[2]; ++z)
        for (int y = from[1]; y < to[1]; ++y)
            for (int x = from[0]; x < to[0]; ++x)
                if (occupancy_bit(words, (z * cells + y) * cells + x)) return true;
    return false;
}

// Warp w of the grid writes word w of mask m: a cell of it is set where the mask before (mask 0 for masks 1,
// else twice as fine) has a bit in the cell or a neighbour.
__global__ void __launch_bounds__(kMaskThreads)
    occupancy_dilate_kernel(const __grid_constant__ MaskArguments in, int m) {
    const OccupancyMask& from = in.layout.mask[m - 1];
    const OccupancyMask& to = in.layout.mask[m];
    const int factor = from.cells / to.cells, cells = to.cells * to.cells * to.cells;
    const int cell = static_cast<int>(blockIdx.x * kMaskThreads + threadIdx.x);
    bool is_set = false;
    if (cell < cells) {
        const int x = cell % to.cells, y = cell / to.cells % to.cells, z = cell / (to.cells * to.cells);
        is_set =
            any_bit(in.masks + from.words, from.cells, {(x - 1) * factor, (y - 1) * factor, (z - 1) * factor},
                    {(x + 2) * factor, (y + 2) * factor, (z + 2) * factor});
    }
    const unsigned word = warp_ballot(is_set);
    if (lane_index() == 0 && cell < cells) in.masks[to.words + cell / 32] = word;
}

// Warp w of blocks (., m) writes word w of the coarser mask beside mask m.
__global__ void __launch_bounds__(kMaskThreads)
    occupancy_skip_kernel(const __grid_constant__ MaskArguments in) {
    const OccupancyMask& mask = in.layout.mask[blockIdx.y];
    const int n = mask.skip_cells, factor = mask.cells / n, cells = n * n * n;
    const int cell = static_cast<int>(blockIdx.x * kMaskThreads + threadIdx.x);
    bool is_set = false;
    if (cell < cells) {
        const int x = cell % n, y = cell / n % n, z = cell / (n * n);
        is_set = any_bit(in.masks + mask.words, mask.cells, {x * factor, y * factor, z * factor},
                         {(x + 1) * factor, (y + 1) * factor, (z + 1) * factor});
    }
    const unsigned word = warp_ballot(is_set);
    if (lane_index() == 0 && cell < cells) in.masks[mask.skip_words + cell / 32] = word;
}

// One thread.
__global__ void __launch_bounds__(kWarpSize)
    occupancy_summary_kernel(const __grid_constant__ MaskArguments in) {
    if (threadIdx.x != 0) return;
    const float side = static_cast<float>(in.resolution);
    in.summary[0] = static_cast<float>(*in.occupied) / (side * side * side);
    in.summary[1] = *in.threshold;
}

// ---- visits -------------------------------------------------------------------------------------

// Thread i of block b counts the set bits of chunk b * kRayThreads + i.
__global__ void __launch_bounds__(kRayThreads) occupancy_count_kernel(OccupiedCells in, std::int64_t words) {
    const std::int64_t chunk = ray_of_thread();
    std::int32_t count = 0;
    for (std::int64_t w = chunk * (kChunkCells / 32); w < (chunk + 1) * (kChunkCells / 32) && w < words; ++w)
        count += count_bits(in.mask[w]);
    if (chunk < in.chunks) in.counts[chunk] = count;
    const std::int32_t sum = block_sum(count, shared_memory<std::int32_t>());
    if (threadIdx.x == 0) in.totals[blockIdx.x] = sum;
}

// The cell of the occupied ones that `candidate` others lie before.
MIPNERF_DEVICE std::int32_t occupied_cell(const OccupiedCells& in, std::int64_t candidate) {
    std::int64_t low = 0, high = in.chunks - 1;  // the last chunk that starts at or before the candidate
    while (low < high) {
        const std::int64_t middle = (low + high + 1) / 2;
        if (in.starts[middle] <= candidate)
            low = middle;
        else
            high = middle - 1;
    }
    std::int32_t left = static_cast<std::int32_t>(candidate - in.starts[low]);
    std::int64_t w = low * (kChunkCells / 32);
    std::uint32_t word = in.mask[w];
    while (left >= count_bits(word)) {
        left -= count_bits(word);
        word = in.mask[++w];
    }
    for (; left > 0; --left) word &= word - 1;
    return static_cast<std::int32_t>(32 * w + lowest_bit(word));
}

// Block b draws from strata 64 b to 64 b + 63 of all cells (part 0) or of the occupied ones (part 1), takes
// the density at a point in each cell and raises the cell to it. No cell comes twice in a part. Shared
// memory: rows of the encoding, and one of the cells.
template <typename S, int F, bool kTf32>
__global__ void __launch_bounds__(kTileThreads)
    occupancy_visit_kernel(const __grid_constant__ DeviceModel<S> model,
                           const __grid_constant__ VisitArguments in, std::uint32_t part) {
    const std::int32_t R = in.resolution;
    const std::int64_t candidates =
        part == 0 ? static_cast<std::int64_t>(R) * R * R : in.occupied.starts[in.occupied.chunks];
    std::int64_t every = (candidates + in.visits - 1) / in.visits;
    every = every < 1 ? 1 : every;
    const std::int64_t strata = (candidates + every - 1) / every;
    const std::int64_t stratum = static_cast<std::int64_t>(blockIdx.x) * kTileSamples + threadIdx.x;
    if (static_cast<std::int64_t>(blockIdx.x) * kTileSamples >= strata) return;
    float* const rows = shared_memory<float>();
    std::int32_t* const cells = shared_memory<std::int32_t>(tile_bytes(encoding_rows(model.networks.sizes)));
    Pack<float, 4> sample = padding_sample();
    std::int32_t cell = -1;
    if (stratum < strata) {
        const std::uint64_t step =
            in.step_on_device == nullptr ? in.step : static_cast<std::uint64_t>(*in.step_on_device);
        const CellDraw draw = draw_cell(in.seed, step, part, stratum, every);
        if (draw.candidate < candidates) {
            cell = part == 0 ? static_cast<std::int32_t>(draw.candidate)
                             : occupied_cell(in.occupied, draw.candidate);
            const float size = 1.0f / static_cast<float>(R);
            sample.value[0] = (static_cast<float>(cell % R) + draw.offset[0]) * size;
            sample.value[1] = (static_cast<float>(cell / R % R) + draw.offset[1]) * size;
            sample.value[2] = (static_cast<float>(cell / (R * R)) + draw.offset[2]) * size;
            sample.value[3] = in.cell_scale;
        }
    }
    cells[threadIdx.x] = cell;
    encode_column<F, kTf32>(model, sample, rows + threadIdx.x, [](int, const Pack<S, F>&) {});
    block_sync();
    const TileSums<kGeometryFeatures> sums = density_layers<kTf32>(model.networks, rows, rows);
    if (tile_x() != 0) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const std::int32_t at = cells[tile_sample(j)];
        if (at < 0) continue;
        const float decayed = in.densities[at] * in.decay, found = fast_density(sums.of[0].value[j]);
        in.densities[at] = decayed < found ? found : decayed;
    }
}

// ---- launches -----------------------------------------------------------------------------------

void launch_occupancy_masks(const MaskArguments& in, Stream stream) {
    const std::int64_t R = in.resolution;
    const std::size_t sum_bytes = kMaskThreads * sizeof(float);
    const auto blocks = [](std::int64_t side) {
        return grid_size(ceil_div(side * side * side, std::int64_t{kMaskThreads}));
    };
    MIPNERF_LAUNCH(occupancy_sum_kernel, dim3(kDensityParts), dim3(kMaskThreads), sum_bytes, stream, in);
    MIPNERF_LAUNCH(occupancy_threshold_kernel, dim3(1), dim3(kMaskThreads), sum_bytes, stream, in);
    MIPNERF_LAUNCH(occupancy_bits_kernel, blocks(R), dim3(kMaskThreads), 0, stream, in);
    for (int m = 1; m < kMasks; ++m)
        MIPNERF_LAUNCH(occupancy_dilate_kernel, blocks(in.layout.mask[m].cells), dim3(kMaskThreads), 0,
                       stream, in, m);
    dim3 of_masks = blocks(in.layout.mask[0].skip_cells);
    of_masks.y = kMasks;
    MIPNERF_LAUNCH(occupancy_skip_kernel, of_masks, dim3(kMaskThreads), 0, stream, in);
    MIPNERF_LAUNCH(occupancy_summary_kernel, dim3(1), dim3(kWarpSize), 0, stream, in);
}

template <typename S, int F>
void launch_occupancy_visits(const DeviceModel<S>& model, const VisitArguments& in, Stream stream) {
    const std::int64_t cells = static_cast<std::int64_t>(in.resolution) * in.resolution * in.resolution;
    const std::size_t bytes =
        tile_bytes(encoding_rows(model.networks.sizes)) + kTileSamples * sizeof(std::int32_t);
    const dim3 tiles = grid_size(ceil_div(in.visits, std::int64_t{kTileSamples}));
    const auto occupancy_visit =
        model.networks.tf32 ? occupancy_visit_kernel<S, F, true> : occupancy_visit_kernel<S, F, false>;
    MIPNERF_LAUNCH(occupancy_visit, tiles, dim3(kTileThreads), bytes, stream, model, in, 0u);
    MIPNERF_LAUNCH(occupancy_count_kernel, grid_size(ray_blocks(in.occupied.chunks)), dim3(kRayThreads),
                   kRayThreads / kWarpSize * sizeof(std::int32_t), stream, in.occupied, cells / 32);
    launch_ray_starts(in.occupied.chunks, nullptr, in.occupied.counts, in.occupied.totals, in.occupied.starts,
                      {0, nullptr, nullptr}, stream);
    MIPNERF_LAUNCH(occupancy_visit, tiles, dim3(kTileThreads), bytes, stream, model, in, 1u);
}

}  // namespace mipnerf
