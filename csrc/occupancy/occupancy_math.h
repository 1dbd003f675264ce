// Where the bits of the occupancy grid lie, and how cells are chosen for its update: host and device. No
// torch, no CUDA header.
//
// The grid holds a density per cell, R^3, x fastest. From it come six masks of bits (1: look here): mask 0 is
// density > threshold; mask 1 + l is that, max-pooled 2^l times smaller and dilated by one cell in every
// direction, for l = 0 to 4. Beside each mask lies one four times coarser, with which empty space is skipped.
// A ray looks into the mask whose cells are at least half as large as its cone is wide.
#pragma once

#include <cstdint>

#include "../common/philox.h"

namespace mipnerf {

constexpr int kMasks = 6;
constexpr int kPyramidLevels = 5;

struct OccupancyMask {
    int32_t cells;       // per side
    int32_t skip_cells;  // per side of the coarser mask
    int32_t words;       // offset of the mask in 32-bit words
    int32_t skip_words;  // offset of the coarser mask
};

struct OccupancyLayout {
    OccupancyMask mask[kMasks];
    int32_t total_words;
};

// R is a multiple of 32.
MIPNERF_HOST_DEVICE OccupancyLayout occupancy_layout(int32_t resolution) {
    OccupancyLayout layout{};
    int32_t words = 0;
    for (int m = 0; m < kMasks; ++m) {
        OccupancyMask& mask = layout.mask[m];
        mask.cells = m == 0 ? resolution : resolution >> (m - 1);
        mask.skip_cells = mask.cells % 4 == 0 ? mask.cells / 4 : 1;
        mask.words = words;
        words += (mask.cells * mask.cells * mask.cells + 31) / 32;
        mask.skip_words = words;
        words += (mask.skip_cells * mask.skip_cells * mask.skip_cells + 31) / 32;
    }
    layout.total_words = words;
    return layout;
}

MIPNERF_HOST_DEVICE bool occupancy_bit(const uint32_t* words, int32_t index) {
    return (words[index >> 5] >> (index & 31)) & 1u;
}

// The mask for a cone `width` wide (in units of the box's side, as a pixel).
MIPNERF_HOST_DEVICE int mask_for_width(float width, int32_t resolution) {
    float cell = 1.0f / static_cast<float>(resolution);
    if (width < 0.75f * cell) return 0;
    int level = 0;
    while (level < kPyramidLevels - 1 && cell < 0.5f * width) {
        cell *= 2.0f;
        ++level;
    }
    return 1 + level;
}

// Cell updates are stratified: of every `stride` candidates one is drawn, so that no cell comes twice.
// `part` 0 draws from all cells, 1 from the list of occupied ones.
struct CellDraw {
    int64_t candidate;  // may lie past the end: then there is none
    float offset[3];    // of the point within the cell, in [0, 1)
};

MIPNERF_HOST_DEVICE CellDraw draw_cell(uint64_t seed, uint64_t step, uint32_t part, int64_t stratum,
                                       int64_t stride) {
    const Words4 words = counter_words(seed, step, kStreamOccupancy, static_cast<uint32_t>(stratum), part);
    return {stratum * stride + scaled_index(words.word[0], static_cast<uint32_t>(stride)),
            {unit_uniform(words.word[1]), unit_uniform(words.word[2]), unit_uniform(words.word[3])}};
}

}  // namespace mipnerf
