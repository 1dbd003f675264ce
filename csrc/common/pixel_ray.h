// The ray through a pixel of a pinhole camera and the pixel's colour: host and device. No torch, no CUDA
// header.
#pragma once

#include <cstdint>

#include "portable_math.h"

namespace mipnerf {

// OpenGL axes; c2w is [3, 4], pixel counts row by row. The radius is the pixel width times 2 / sqrt(12), the
// pixel width being the length of the rotation's second column / focal.
MIPNERF_HOST_DEVICE void pixel_ray(const float* c2w, int64_t height, int64_t width, float focal,
                                   int64_t pixel, float* origin, float* direction, float* radius) {
    const float column = static_cast<float>(pixel % width), row = static_cast<float>(pixel / width);
    const float x = (column + 0.5f - 0.5f * static_cast<float>(width)) / focal;
    const float y = -(row + 0.5f - 0.5f * static_cast<float>(height)) / focal;
    float up = 0.0f;
    for (int k = 0; k < 3; ++k) {
        direction[k] = c2w[4 * k] * x + c2w[4 * k + 1] * y - c2w[4 * k + 2];
        origin[k] = c2w[4 * k + 3];
        up += c2w[4 * k + 1] * c2w[4 * k + 1];
    }
    *radius = sqrtf(up) / focal * 0.57735026919f;
}

// In [0, 1], over what is behind the pixel; straight alpha is the fourth of four channels.
MIPNERF_HOST_DEVICE void pixel_colour(const uint8_t* pixel, int channels, const float* behind,
                                      float* colour) {
    const float alpha = channels == 4 ? static_cast<float>(pixel[3]) / 255.0f : 1.0f;
    for (int k = 0; k < 3; ++k)
        colour[k] = static_cast<float>(pixel[k]) / 255.0f * alpha + (1.0f - alpha) * behind[k];
}

}  // namespace mipnerf
