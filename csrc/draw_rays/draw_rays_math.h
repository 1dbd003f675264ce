// Which pixel a ray of the fast model's batch goes through: host and device. No torch, no CUDA header.
//
// Words of row r in a step: 0 the scale, 1 the image within it, 2 the pixel within the image, 3 the marching
// phase, 4 to 6 the background.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "../common/pixel_ray.h"

namespace mipnerf {

struct PixelDraw {
    uint32_t image, pixel;  // index within the group of its scale; row-major index within the image
    int group;
    float phase;
    float background[3];
};

// group_shares ascends to 1.
template <typename Pixels>
MIPNERF_HOST_DEVICE PixelDraw draw_pixel(uint64_t seed, uint64_t step, uint32_t row,
                                         const float* group_shares, const int64_t* group_ends,
                                         const int64_t* order, int groups, const Pixels& pixels_of) {
    const Words4 words = counter_words(seed, step, kStreamFastRays, row, 0);
    const Words4 colours = counter_words(seed, step, kStreamFastRays, row, 1);
    const float u = unit_uniform(words.word[0]);
    PixelDraw draw;
    draw.group = 0;
    while (draw.group < groups - 1 && u >= group_shares[draw.group]) ++draw.group;
    const int64_t first = draw.group == 0 ? 0 : group_ends[draw.group - 1];
    const uint32_t images = static_cast<uint32_t>(group_ends[draw.group] - first);
    draw.image = static_cast<uint32_t>(order[first + scaled_index(words.word[1], images)]);
    draw.pixel = scaled_index(words.word[2], static_cast<uint32_t>(pixels_of(draw.image)));
    draw.phase = unit_uniform(words.word[3]);
    for (int k = 0; k < 3; ++k) draw.background[k] = unit_uniform(colours.word[k]);
    return draw;
}

}  // namespace mipnerf
