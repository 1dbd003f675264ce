// What the kernels that composite share: the sums of a ray over the lanes of a warp, and the pixel they make.
// (composite_kernels.cuh and the network's forward with compositing behind it, ../mlp/mlp_composite.cuh.)
#pragma once

#include "../common/device.cuh"
#include "composite_launch.h"
#include "composite_math.h"

namespace mipnerf {

struct Colour {
    float red, green, blue;
};

MIPNERF_DEVICE Colour activate_colour(const CompositeOptions<float>& options, float red, float green,
                                      float blue) {
    if (options.rgb_activation == RgbActivation::kSigmoid) {
        red = activate_rgb(red, RgbActivation::kSigmoid, options.rgb_padding).value;
        green = activate_rgb(green, RgbActivation::kSigmoid, options.rgb_padding).value;
        blue = activate_rgb(blue, RgbActivation::kSigmoid, options.rgb_padding).value;
    }
    return {red, green, blue};
}

// A lane's share of the sums over a ray's samples.
struct PixelSums {
    float red = 0, green = 0, blue = 0, acc = 0, sum_middle = 0;

    MIPNERF_DEVICE void add(float weight, const Colour& colour, float middle) {
        red += weight * colour.red;
        green += weight * colour.green;
        blue += weight * colour.blue;
        acc += weight;
        sum_middle += weight * middle;
    }
};

// The pixel of the warp's ray, whose fenceposts reach from near to far; lanes 0 to 4 write a number each.
MIPNERF_DEVICE void store_pixel(PixelSums sums, float background, float near, float far,
                                const CompositeResults& out, std::int64_t ray) {
    const int lane = lane_index();
    sums.red = warp_sum(sums.red);
    sums.green = warp_sum(sums.green);
    sums.blue = warp_sum(sums.blue);
    sums.acc = warp_sum(sums.acc);
    sums.sum_middle = warp_sum(sums.sum_middle);
    if (lane < 3) {
        const float mine = lane == 0 ? sums.red : (lane == 1 ? sums.green : sums.blue);
        out.rgb[3 * ray + lane] = mine + background * (1.0f - sums.acc);
    } else if (lane == 3) {
        out.distance[ray] = expected_distance(sums.sum_middle, sums.acc, near, far).value;
    } else if (lane == 4) {
        out.acc[ray] = sums.acc;
    }
}

}  // namespace mipnerf
