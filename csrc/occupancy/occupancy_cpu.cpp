// The operators occupancy_update and occupancy_masks on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../fast_step/fast_step_arguments.h"
#include "occupancy_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One task: the densities of up to kTile drawn cells. Strata are disjoint, so tasks never meet in a cell.
template <int F>
struct VisitCells {
    const FastModel& model;
    FastWorkspace& workspace;
    uint64_t seed, step;
    uint32_t part;
    int64_t stride, strata, candidates;
    const int32_t* list;  // candidate to cell; null: itself
    float cell_scale, decay;
    float* densities;

    template <int W>
    MIPNERF_INLINE void operator()(int64_t task, int64_t thread) const {
        FastRoom& room = workspace.rooms[thread];
        room.shape(model.sizes);
        room.grow(kTile, kTile);
        const int32_t R = model.march.resolution;
        const float cell_size = 1.0f / static_cast<float>(R);
        int32_t cells[kTile];
        int count = 0;
        const int64_t last = std::min(strata, (task + 1) * kTile);
        for (int64_t stratum = task * kTile; stratum < last; ++stratum) {
            const CellDraw draw = draw_cell(seed, step, part, stratum, stride);
            if (draw.candidate >= candidates) continue;
            const int32_t cell =
                list != nullptr ? list[draw.candidate] : static_cast<int32_t>(draw.candidate);
            const int32_t at[3] = {cell % R, cell / R % R, cell / (R * R)};
            float place[3];
            for (int k = 0; k < 3; ++k) place[k] = (static_cast<float>(at[k]) + draw.offset[k]) * cell_size;
            room.places.set(count, place, cell_scale);
            cells[count++] = cell;
        }
        if (count == 0) return;
        density_tile<W, F>(model, room.places.from(0), count, room.features.from(0), room.hidden.from(0),
                           room.geometry.from(0));
        for (int n = 0; n < count; ++n) {
            float& density = densities[cells[n]];
            density = std::max(density * decay, fast_density(*room.geometry.at(n)));
        }
    }
};

// Bytes that are 0 or 1 to the bits of words, the first to the lowest.
void set_bits(const std::vector<uint8_t>& bytes, uint32_t* words) {
    const int64_t count = static_cast<int64_t>(bytes.size());
    for (int64_t first = 0; first < count; first += 32) {
        uint32_t word = 0;
        const int64_t last = std::min(count, first + 32);
        for (int64_t i = first; i < last; i += 8) {
            uint64_t eight = 0;
            for (int64_t k = 0; k < std::min<int64_t>(8, last - i); ++k)
                eight |= static_cast<uint64_t>(bytes[i + k]) << (8 * k);
            // Byte k times 2^(56 - 7k) is bit 56 + k; all other products lie below bit 56 or beyond 63.
            word |= static_cast<uint32_t>(eight * 0x0102040810204080u >> 56) << (i - first);
        }
        words[first / 32] = word;
    }
}

// Every cell's byte or that of a neighbour `step` away along one axis of `length` cells.
void dilate_axis(std::vector<uint8_t>& bytes, int64_t step, int64_t length) {
    const int64_t count = static_cast<int64_t>(bytes.size()), block = step * length;
    std::vector<uint8_t> out(bytes);
    for (int64_t base = 0; base < count; base += block) {
        uint8_t* to = out.data() + base;
        const uint8_t* from = bytes.data() + base;
#pragma omp simd
        for (int64_t i = step; i < block; ++i) to[i] |= from[i - step];
#pragma omp simd
        for (int64_t i = 0; i < block - step; ++i) to[i] |= from[i + step];
    }
    bytes.swap(out);
}

// One byte for every factor^3 cells: whether one of them has one. Rows are joined first, many bytes at a
// time.
std::vector<uint8_t> pooled(const std::vector<uint8_t>& bytes, int32_t n, int32_t factor) {
    const int32_t side = n / factor;
    std::vector<uint8_t> out(static_cast<size_t>(side) * side * side, 0), row(n);
    for (int32_t z = 0; z < side; ++z)
        for (int32_t y = 0; y < side; ++y) {
            std::fill(row.begin(), row.end(), 0);
            for (int32_t k = 0; k < factor * factor; ++k) {
                const int64_t at =
                    static_cast<int64_t>(z * factor + k / factor) * n + y * factor + k % factor;
                const uint8_t* const from = bytes.data() + at * n;
                uint8_t* const to = row.data();
#pragma omp simd
                for (int32_t x = 0; x < n; ++x) to[x] |= from[x];
            }
            uint8_t* const to = out.data() + (static_cast<int64_t>(z) * side + y) * side;
            for (int32_t x = 0; x < side; ++x)
                for (int32_t k = 0; k < factor; ++k) to[x] |= row[x * factor + k];
        }
    return out;
}

struct MaskSummary {
    double occupied_share, threshold;
};

MaskSummary build_masks(const float* densities, int32_t resolution, float max_threshold, uint32_t* words) {
    const OccupancyLayout layout = occupancy_layout(resolution);
    const int64_t count = static_cast<int64_t>(resolution) * resolution * resolution;
    double sum = 0;
    const float high = 4.0f * max_threshold;
    for (int64_t first = 0; first < count; first += resolution) {  // pairwise enough: a row at a time
        float row = 0.0f;
#pragma omp simd reduction(+ : row)
        for (int64_t i = first; i < first + resolution; ++i) row += std::min(densities[i], high);
        sum += row;
    }
    const float threshold = std::min(max_threshold, static_cast<float>(sum / static_cast<double>(count)));
    std::vector<uint8_t> base(count);
    int64_t occupied = 0;
    for (int64_t i = 0; i < count; ++i) {
        base[i] = densities[i] > threshold;
        occupied += base[i];
    }
    const auto write = [&](const std::vector<uint8_t>& bytes, const OccupancyMask& mask) {
        set_bits(bytes, words + mask.words);
        set_bits(pooled(bytes, mask.cells, mask.cells / mask.skip_cells), words + mask.skip_words);
    };
    write(base, layout.mask[0]);
    std::vector<uint8_t> pyramid = base;
    for (int m = 1; m < kMasks; ++m) {
        const int64_t n = layout.mask[m].cells;
        if (m > 1) pyramid = pooled(pyramid, layout.mask[m - 1].cells, 2);
        dilate_axis(pyramid, 1, n);
        dilate_axis(pyramid, n, n);
        dilate_axis(pyramid, n * n, n);
        write(pyramid, layout.mask[m]);
    }
    return {static_cast<double>(occupied) / static_cast<double>(count), threshold};
}

Tensor summary_tensor(const Tensor& like, const MaskSummary& summary) {
    const Tensor out = torch::stable::new_empty(like, {2}, ScalarType::Double);
    double* values = mutable_tensor_data<double>(out);
    values[0] = summary.occupied_share;
    values[1] = summary.threshold;
    return out;
}

int32_t check_densities(const Checker& check, const Tensor& densities) {
    check.dims("densities", densities, 3, "[R, R, R]");
    const int64_t resolution = densities.size(0);
    check.shape("densities", densities, {resolution, resolution, resolution}, "[R, R, R]");
    check.that(resolution >= 32 && resolution <= 512 && resolution % 32 == 0, "densities",
               "a multiple of 32 up to 512 cells a side", resolution);
    check.dtype("densities", densities, {ScalarType::Float});
    check.that(densities.is_cpu() && densities.is_contiguous(), "densities", "contiguous and on the CPU",
               device_text(densities));
    return static_cast<int32_t>(resolution);
}

Tensor occupancy_masks_cpu(Tensor densities, double max_threshold, Tensor masks) {
    const Checker check{"occupancy_masks"};
    const int32_t resolution = check_densities(check, densities);
    check.dtype("masks", masks, {ScalarType::Int});
    check.shape("masks", masks, {occupancy_layout(resolution).total_words}, "[words]");
    return summary_tensor(
        densities, build_masks(tensor_data<float>(densities), resolution, static_cast<float>(max_threshold),
                               reinterpret_cast<uint32_t*>(mutable_tensor_data<int32_t>(masks))));
}

Tensor occupancy_update_cpu(Tensor densities, double cell_scale, int64_t seed, int64_t step, int64_t stride,
                            double decay, double max_threshold, Tensor tables, Tensor density_in,
                            Tensor density_out, Tensor colour_in, std::optional<Tensor> colour_hidden,
                            Tensor colour_out, Tensor masks, std::vector<int64_t> resolutions,
                            int64_t table_size, int64_t attenuation, double cutoff, bool scale_input,
                            double scale_low, double scale_high, int64_t occupancy_resolution,
                            double box_half, double step_scale, double min_step, double max_step, bool tf32) {
    const Checker check{"occupancy_update"};
    const CheckedModel checked(check, {tables,     density_in,  density_out, colour_in,  colour_hidden,
                                       colour_out, masks,       resolutions, table_size, attenuation,
                                       cutoff,     scale_input, scale_low,   scale_high, occupancy_resolution,
                                       box_half,   step_scale,  min_step,    max_step,   tf32});
    const int32_t resolution = check_densities(check, densities);
    check.that(resolution == occupancy_resolution, "densities", "of occupancy_resolution cells a side",
               resolution);
    check.that(stride >= 1, "stride", "1 or more", stride);
    const FastModel& model = checked.model();
    uint32_t* const words = reinterpret_cast<uint32_t*>(mutable_tensor_data<int32_t>(masks));
    const int64_t count = static_cast<int64_t>(resolution) * resolution * resolution;
    std::vector<int32_t> occupied;
    const uint32_t* const occupancy = words + model.occupancy.mask[0].words;
    for (int64_t first = 0; first < count; first += 32) {
        if (occupancy[first / 32] == 0) continue;
        for (int64_t i = first; i < std::min(count, first + 32); ++i)
            if (occupancy_bit(occupancy, i)) occupied.push_back(static_cast<int32_t>(i));
    }

    const WorkspaceLease lease;
    const int64_t visits = (count + stride - 1) / stride;
    const auto visit = [&](uint32_t part, int64_t candidates, const int32_t* list) {
        if (candidates == 0) return;
        const int64_t every = std::max<int64_t>(1, (candidates + visits - 1) / visits);
        const int64_t strata = (candidates + every - 1) / every;
        const int64_t tasks = (strata + kTile - 1) / kTile;
        grow_rooms(*lease, tasks);
        const auto run = [&](auto features) {
            constexpr int F = decltype(features)::value;
            for_tasks(tasks,
                      VisitCells<F>{model, *lease, static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                                    part, every, strata, candidates, list, static_cast<float>(cell_scale),
                                    static_cast<float>(decay), mutable_tensor_data<float>(densities)});
        };
        with_features(checked.features(), run);
    };
    visit(0, count, nullptr);
    visit(1, static_cast<int64_t>(occupied.size()), occupied.data());
    return summary_tensor(densities, build_masks(tensor_data<float>(densities), resolution,
                                                 static_cast<float>(max_threshold), words));
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("occupancy_update", TORCH_BOX(&mipnerf::occupancy_update_cpu));
    m.impl("occupancy_masks", TORCH_BOX(&mipnerf::occupancy_masks_cpu));
}
