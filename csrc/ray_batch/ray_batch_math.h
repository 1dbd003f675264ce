// A ray of a training batch, from its row in the batch: host and device. No torch, no CUDA header.
//
// mipnerf_fast/data/ray_batches.py is the same in torch: pixels are drawn with replacement, by words 0 and 1
// of a row in the streams of pixels and of images.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "../common/pixel_ray.h"

namespace mipnerf {

struct RayBatchArguments {
    int64_t count;
    uint64_t seed;
    const int64_t* step;  // one number, on the device
    bool single_image;    // one image for the whole batch, else any pixel of any image
    float background;
    int64_t images, all_pixels;
    int64_t common_size;  // pixels of each image where all have as many, else 0
    int channels;
    const uint8_t* pixels;   // [P, channels]
    const int64_t* offsets;  // [n + 1]
    const int64_t* heights;  // [n]
    const int64_t* widths;   // [n]
    const float* c2w;        // [n, 3, 4]
    const float* focals;     // [n]
    const float* nears;      // [n]
    const float* fars;       // [n]
    const float* lossmults;  // [n]
};

struct RayBatchOutputs {
    float* origins;     // [B, 3]
    float* directions;  // [B, 3]
    float* viewdirs;    // [B, 3]
    float* radii;       // [B]
    float* near;        // [B]
    float* far;         // [B]
    float* lossmult;    // [B]
    float* target;      // [B, 3]
};

struct BatchPixel {
    int64_t image, pixel;  // row-major within the image
};

// In [0, n): 62 random bits modulo n, as counter_index has it.
MIPNERF_HOST_DEVICE int64_t counter_index(uint64_t seed, uint64_t step, uint32_t stream, uint32_t row,
                                          int64_t n) {
    const Words4 words = counter_words(seed, step, stream, row, 0);
    const uint64_t bits = (static_cast<uint64_t>(words.word[0] >> 2) << 32) + words.word[1];
    return static_cast<int64_t>(bits % static_cast<uint64_t>(n));
}

// The image that holds a pixel counted through all images.
MIPNERF_HOST_DEVICE int64_t image_of_pixel(const int64_t* offsets, int64_t images, int64_t index) {
    int64_t image = 0, end = images;
    while (end - image > 1) {
        const int64_t middle = image + (end - image) / 2;
        (offsets[middle] <= index ? image : end) = middle;
    }
    return image;
}

MIPNERF_HOST_DEVICE BatchPixel choose_pixel(const RayBatchArguments& in, uint64_t step, uint32_t row) {
    if (!in.single_image) {
        const int64_t index = counter_index(in.seed, step, kStreamPixels, row, in.all_pixels);
        const int64_t image =
            in.common_size > 0 ? index / in.common_size : image_of_pixel(in.offsets, in.images, index);
        return {image, index - in.offsets[image]};
    }
    const int64_t image = counter_index(in.seed, step, kStreamImages, 0, in.images);
    if (in.common_size > 0) return {image, counter_index(in.seed, step, kStreamPixels, row, in.common_size)};
    // 40 bits modulo the size, as in torch, where a size on the device cannot be the n of counter_index.
    const int64_t bits = counter_index(in.seed, step, kStreamPixels, row, (int64_t{1} << 40) - 1);
    return {image, bits % (in.heights[image] * in.widths[image])};
}

MIPNERF_HOST_DEVICE void write_batch_ray(const RayBatchArguments& in, const RayBatchOutputs& out,
                                         uint64_t step, int64_t row) {
    const auto [image, pixel] = choose_pixel(in, step, static_cast<uint32_t>(row));
    float origin[3], direction[3], colour[3];
    pixel_ray(in.c2w + 12 * image, in.heights[image], in.widths[image], in.focals[image], pixel, origin,
              direction, out.radii + row);
    const float behind[3] = {in.background, in.background, in.background};
    pixel_colour(in.pixels + in.channels * (in.offsets[image] + pixel), in.channels, behind, colour);
    // Fused, as torch's norm over the last axis is on processors that can.
    const float squared = fma_rn(direction[2], direction[2],
                                 fma_rn(direction[1], direction[1], mul_rn(direction[0], direction[0])));
    const float length = sqrtf(squared);
    for (int k = 0; k < 3; ++k) {
        out.origins[3 * row + k] = origin[k];
        out.directions[3 * row + k] = direction[k];
        out.viewdirs[3 * row + k] = direction[k] / length;
        out.target[3 * row + k] = colour[k];
    }
    out.near[row] = in.nears[image];
    out.far[row] = in.fars[image];
    out.lossmult[row] = in.lossmults[image];
}

}  // namespace mipnerf
