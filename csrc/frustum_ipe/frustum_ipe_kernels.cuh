// The CUDA kernels of frustum_ipe. A sample belongs to one thread from its two fenceposts to its features;
// what a warp has computed goes through shared memory, so that every access to the (large) features is 16
// bytes wide and whole sectors are moved. Each has a kernel for all 16 degrees, the usual case, whose loops
// unroll completely, and one for any other number.
#pragma once

#include "../common/device.cuh"
#include "frustum_ipe_launch.h"
#include "frustum_ipe_math.h"

namespace mipnerf {
namespace frustum_ipe {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;

// The tile of the 16-degree kernels: one row per lane, 96 bytes of sines and 96 of cosines, 8 degrees of
// float or all 16 of a 16-bit type. Rows lie 13 x 16 bytes apart: any 8 neighbouring lanes then touch all
// banks once.
constexpr int kHalfRowBytes = 96;
constexpr int kPieces = 2 * kHalfRowBytes / 16;  // 16-byte pieces of a row
constexpr int kRowBytes = 2 * kHalfRowBytes + 16;
constexpr int kTileBytes = kWarpSize * kRowBytes;

template <typename Out>
constexpr int kPerPiece = 16 / static_cast<int>(sizeof(Out));
template <typename Out>
constexpr int kTileDegrees = kHalfRowBytes / (3 * static_cast<int>(sizeof(Out)));

// Degrees that share a range reduction: 16-bit features are rounded a thousand times more coarsely than
// doubling an angle is.
template <typename Out>
constexpr int kDegreesPerReduction = sizeof(Out) == 2 ? 4 : 1;

// Tile of the general kernels: rows as in memory, one after the other.
template <typename Out>
constexpr int kGeneralTileBytes = kWarpSize * 6 * kMaxDegrees * static_cast<int>(sizeof(Out));

// How a warp moves a tile between shared memory and the features: three turns take 8 rows of 12 pieces, and
// the next 8 rows are moved alike. Where this lane's piece of each turn is.
template <typename Out>
struct Turns {
    int row[3];
    int shared[3];  // bytes into the tile
    int global[3];  // elements from the warp's first feature, for the tile of degree 0

    MIPNERF_DEVICE explicit Turns(int lane) {
#pragma unroll
        for (int turn = 0; turn < 3; ++turn) {
            const int piece = turn * kWarpSize + lane, column = piece % kPieces;
            const int half = column / (kPieces / 2), within = column % (kPieces / 2);
            row[turn] = piece / kPieces;
            shared[turn] = row[turn] * kRowBytes + column * 16;
            global[turn] = (row[turn] * 2 + half) * 3 * kMaxDegrees + within * kPerPiece<Out>;
        }
    }
};

struct EncodedSample {
    EncodedCoordinate<float> coordinate[3];
};

MIPNERF_DEVICE FrustumMoments<float> moments_of(const FrustumIpeInputs& in, float t0, float t1) {
    return in.cylinder ? frustum_moments<FrustumShape::kCylinder>(t0, t1)
                       : frustum_moments<FrustumShape::kCone>(t0, t1);
}

MIPNERF_DEVICE RayConstants<float> ray_of(const FrustumIpeInputs& in, std::int64_t ray) {
    float origin[3], direction[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        origin[k] = load_pack<1>(in.origins + 3 * ray + k).value[0];
        direction[k] = load_pack<1>(in.directions + 3 * ray + k).value[0];
    }
    return ray_constants(origin, direction, load_pack<1>(in.radii + ray).value[0]);
}

MIPNERF_DEVICE EncodedSample encode_sample(const RayConstants<float>& ray,
                                           const FrustumMoments<float>& moments) {
    EncodedSample sample;
#pragma unroll
    for (int k = 0; k < 3; ++k) sample.coordinate[k] = encoded_coordinate(ray, moments, k);
    return sample;
}

// The sample with this number, counted over all rays.
MIPNERF_DEVICE EncodedSample load_sample(const FrustumIpeInputs& in, std::int64_t number) {
    std::int64_t ray;
    // A 64-bit division costs as much as a tenth of the kernel.
    if (in.rays * in.intervals <= 0xffffffffll)
        ray = static_cast<unsigned>(number) / static_cast<unsigned>(in.intervals);
    else
        ray = number / in.intervals;
    const float* t = in.t_vals + number + ray;  // a ray has one fencepost more than intervals
    const float t0 = load_pack<1>(t).value[0], t1 = load_pack<1>(t + 1).value[0];
    return encode_sample(ray_of(in, ray), moments_of(in, t0, t1));
}

MIPNERF_DEVICE float degree_scale(int degree) {
    return bits_float(static_cast<std::uint32_t>(127 + degree) << 23);
}

MIPNERF_DEVICE SinCos<float> encode_one(bool integrated, const EncodedCoordinate<float>& coordinate,
                                        float scale) {
    return integrated ? encode_degree<true>(coordinate, scale) : encode_degree<false>(coordinate, scale);
}

// ---- forward

// Who: lane i of a warp has sample 32 w + i (w counts warps over the grid) and row i of the warp's tile.
// Shared: kTileBytes per warp. Written: each warp its 32 x 96 features, contiguous in memory.
template <typename Out, bool kIntegrated>
__global__ void __launch_bounds__(kThreads) frustum_ipe_forward_kernel(FrustumIpeInputs in, Out* features) {
    constexpr int kDegreesPerStep = kPerPiece<Out>;  // of all three coordinates: three pieces of each half
    const std::int64_t samples = in.rays * in.intervals;
    const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index()) * kWarpSize;
    if (first >= samples) return;  // the whole warp
    const int lane = lane_index();
    const int rows = samples - first < kWarpSize ? static_cast<int>(samples - first) : kWarpSize;
    // The lanes past the end repeat the last sample; their rows are not written.
    const EncodedSample sample = load_sample(in, first + (lane < rows ? lane : rows - 1));
    unsigned char* tile = shared_memory<unsigned char>(warp_index() * kTileBytes);

    const Turns<Out> turns(lane);
    Out* warp_features = features + first * 6 * kMaxDegrees;

#pragma unroll
    for (int tile_degree = 0; tile_degree < kMaxDegrees; tile_degree += kTileDegrees<Out>) {
#pragma unroll
        for (int step = 0; step < kTileDegrees<Out>; step += kDegreesPerStep) {
            Floats<3 * kDegreesPerStep> sines, cosines;
#pragma unroll
            for (int l = 0; l < kDegreesPerStep; l += kDegreesPerReduction<Out>) {
                const float scale = static_cast<float>(1 << (tile_degree + step + l));
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    SinCos<float> value[kDegreesPerReduction<Out>];
                    encode_degrees<kIntegrated, kDegreesPerReduction<Out>>(sample.coordinate[k], scale,
                                                                           value);
#pragma unroll
                    for (int i = 0; i < kDegreesPerReduction<Out>; ++i) {
                        sines.value[3 * (l + i) + k] = value[i].sin;
                        cosines.value[3 * (l + i) + k] = value[i].cos;
                    }
                }
            }
            Out* own = reinterpret_cast<Out*>(tile + lane * kRowBytes) + 3 * step;
#pragma unroll
            for (int piece = 0; piece < 3; ++piece) {
                Floats<kPerPiece<Out>> sine, cosine;
#pragma unroll
                for (int i = 0; i < kPerPiece<Out>; ++i) {
                    sine.value[i] = sines.value[piece * kPerPiece<Out> + i];
                    cosine.value[i] = cosines.value[piece * kPerPiece<Out> + i];
                }
                store_pack_shared(own + piece * kPerPiece<Out>, pack_from_float<Out>(sine));
                store_pack_shared(own + 3 * kTileDegrees<Out> + piece * kPerPiece<Out>,
                                  pack_from_float<Out>(cosine));
            }
        }
        warp_sync();
#pragma unroll
        for (int group = 0; group < kWarpSize / 8; ++group) {
#pragma unroll
            for (int turn = 0; turn < 3; ++turn) {
                const auto piece = load_pack_shared<kPerPiece<Out>>(
                    reinterpret_cast<const Out*>(tile + turns.shared[turn] + group * 8 * kRowBytes));
                if (turns.row[turn] + group * 8 < rows)
                    store_pack(
                        warp_features + turns.global[turn] + group * 8 * 6 * kMaxDegrees + 3 * tile_degree,
                        piece);
            }
        }
        warp_sync();
    }
}

// As above for any degrees. Shared: kGeneralTileBytes per warp.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    frustum_ipe_forward_general_kernel(FrustumIpeInputs in, Out* features) {
    const std::int64_t samples = in.rays * in.intervals;
    const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index()) * kWarpSize;
    if (first >= samples) return;
    const int lane = lane_index();
    const int rows = samples - first < kWarpSize ? static_cast<int>(samples - first) : kWarpSize;
    const EncodedSample sample = load_sample(in, first + (lane < rows ? lane : rows - 1));
    Out* tile = shared_memory<Out>(warp_index() * kGeneralTileBytes<Out>);
    const int width = 6 * in.degrees;

    // Every lane starts at a degree of its own: rows are often a multiple of the banks apart.
    int l = lane % in.degrees;
#pragma unroll 1
    for (int count = 0; count < in.degrees; ++count) {
        const float scale = degree_scale(in.min_deg + l);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const SinCos<float> value = encode_one(in.integrated, sample.coordinate[k], scale);
            tile[lane * width + 3 * l + k] = from_float<Out>(value.sin);
            tile[lane * width + width / 2 + 3 * l + k] = from_float<Out>(value.cos);
        }
        l = l + 1 == in.degrees ? 0 : l + 1;
    }
    warp_sync();
    // 32 rows are a multiple of 16 bytes, so every warp's part begins aligned; only the last may end inside a
    // piece.
    Out* warp_features = features + first * width;
    const int elements = rows * width;
    const int whole = elements / kPerPiece<Out> * kPerPiece<Out>;
    for (int i = lane * kPerPiece<Out>; i < whole; i += kWarpSize * kPerPiece<Out>)
        store_pack(warp_features + i, load_pack_shared<kPerPiece<Out>>(tile + i));
    for (int i = whole + lane; i < elements; i += kWarpSize) warp_features[i] = tile[i];
}

// ---- backward

// Adds what one coordinate at one degree contributes.
MIPNERF_DEVICE void add_degree(bool integrated, const EncodedCoordinate<float>& coordinate, float scale,
                               float grad_sin, float grad_cos, CoordinateGradient<float>& grad) {
    const CoordinateGradient<float> part =
        encode_degree_gradient(encode_one(integrated, coordinate, scale), scale, grad_sin, grad_cos);
    grad.mean += part.mean;
    grad.variance += part.variance;
}

// Turns the gradients of one sample's coordinates into those of its fenceposts, and adds to the ray's sums.
MIPNERF_DEVICE FencepostGradient<float> finish_sample(const FrustumIpeInputs& in,
                                                      const RayConstants<float>& ray,
                                                      const FrustumMoments<float>& moments,
                                                      const CoordinateGradient<float> grad[3],
                                                      RaySums<float>& sums) {
    // Without integration the gradients of the variances are zero, and so is what they add.
    return in.cylinder ? sample_gradient<FrustumShape::kCylinder, true>(ray, moments, grad, sums)
                       : sample_gradient<FrustumShape::kCone, true>(ray, moments, grad, sums);
}

// Sums over the warp and writes the ray's own gradients.
MIPNERF_DEVICE void write_ray(const FrustumIpeInputs& in, const FrustumIpeGradients& out, std::int64_t ray,
                              RaySums<float> sums) {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        sums.mean[k] = warp_sum(sums.mean[k]);
        sums.mean_distance[k] = warp_sum(sums.mean_distance[k]);
        sums.variance_along[k] = warp_sum(sums.variance_along[k]);
        sums.variance_across[k] = warp_sum(sums.variance_across[k]);
    }
    if (lane_index() != 0) return;
    float direction[3];
#pragma unroll
    for (int k = 0; k < 3; ++k) direction[k] = load_pack<1>(in.directions + 3 * ray + k).value[0];
    const RayGradient<float> grad = ray_gradient(direction, load_pack<1>(in.radii + ray).value[0], sums);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        out.origins[3 * ray + k] = grad.origin[k];
        out.directions[3 * ray + k] = grad.direction[k];
    }
    out.radii[ray] = grad.radius;
}

// Who: one warp per ray, 32 intervals at a time, lane i the i-th of them and row i of the tile, into which
// the warp loads their gradients together. Shared: kTileBytes per warp. Written: each fencepost by the lane
// of the interval that it opens (the gradient of the interval that it closes comes from the lane below), the
// last by the last interval's lane. kFull: 16 degrees and grad_features aligned to 16 bytes.
template <typename Out, bool kFull>
__global__ void __launch_bounds__(kThreads, 4)
    frustum_ipe_backward_kernel(FrustumIpeInputs in, const Out* grad_features, FrustumIpeGradients out) {
    const std::int64_t number = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_index();
    if (number >= in.rays) return;  // the whole warp
    const int lane = lane_index();
    const RayConstants<float> ray = ray_of(in, number);
    const float* t_vals = in.t_vals + number * (in.intervals + 1);
    float* grad_t = out.t_vals + number * (in.intervals + 1);
    const int width = 6 * (kFull ? kMaxDegrees : in.degrees);
    const Turns<Out> turns(lane);

    RaySums<float> sums = {};
    float carried = 0.0f;  // the gradient of this step's first fencepost from the interval before it
    for (std::int64_t first = 0; first < in.intervals; first += kWarpSize) {
        const int rows =
            in.intervals - first < kWarpSize ? static_cast<int>(in.intervals - first) : kWarpSize;
        const std::int64_t interval = first + (lane < rows ? lane : rows - 1);
        const float t0 = load_pack<1>(t_vals + interval).value[0],
                    t1 = load_pack<1>(t_vals + interval + 1).value[0];
        const FrustumMoments<float> moments = moments_of(in, t0, t1);
        const EncodedSample sample = encode_sample(ray, moments);
        const Out* warp_grads = grad_features + (number * in.intervals + first) * width;
        CoordinateGradient<float> grad[3] = {};

        if constexpr (kFull) {
            unsigned char* tile = shared_memory<unsigned char>(warp_index() * kTileBytes);
#pragma unroll 1
            for (int tile_degree = 0; tile_degree < kMaxDegrees; tile_degree += kTileDegrees<Out>) {
#pragma unroll
                for (int group = 0; group < kWarpSize / 8; ++group) {
#pragma unroll
                    for (int turn = 0; turn < 3; ++turn) {
                        if (turns.row[turn] + group * 8 < rows)
                            store_pack_shared(
                                reinterpret_cast<Out*>(tile + turns.shared[turn] + group * 8 * kRowBytes),
                                load_pack<kPerPiece<Out>>(warp_grads + turns.global[turn] +
                                                          group * 8 * 6 * kMaxDegrees + 3 * tile_degree));
                    }
                }
                warp_sync();
                const Out* own = reinterpret_cast<const Out*>(tile + lane * kRowBytes);
#pragma unroll 1
                for (int step = 0; step < kTileDegrees<Out>; step += 4) {
                    if (lane >= rows) break;
                    Floats<12> grad_sin, grad_cos;  // 4 degrees of 3 coordinates
#pragma unroll
                    for (int part = 0; part < 3; ++part) {
                        const int at = 3 * step + 4 * part;
                        const auto sine = pack_to_float(load_pack_shared<4>(own + at));
                        const auto cosine =
                            pack_to_float(load_pack_shared<4>(own + 3 * kTileDegrees<Out> + at));
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            grad_sin.value[4 * part + i] = sine.value[i];
                            grad_cos.value[4 * part + i] = cosine.value[i];
                        }
                    }
#pragma unroll
                    for (int l = 0; l < 4; ++l) {
                        const float scale = degree_scale(tile_degree + step + l);
#pragma unroll
                        for (int k = 0; k < 3; ++k)
                            add_degree(in.integrated, sample.coordinate[k], scale, grad_sin.value[3 * l + k],
                                       grad_cos.value[3 * l + k], grad[k]);
                    }
                }
                warp_sync();
            }
        } else {
            Out* tile = shared_memory<Out>(warp_index() * kGeneralTileBytes<Out>);
#pragma unroll 1
            for (int i = lane; i < rows * width; i += kWarpSize)
                tile[i] = load_pack<1>(warp_grads + i).value[0];
            warp_sync();
            int l = lane % in.degrees;
#pragma unroll 1
            for (int count = 0; count < in.degrees && lane < rows; ++count) {
                const float scale = degree_scale(in.min_deg + l);
#pragma unroll
                for (int k = 0; k < 3; ++k)
                    add_degree(in.integrated, sample.coordinate[k], scale,
                               to_float(tile[lane * width + 3 * l + k]),
                               to_float(tile[lane * width + width / 2 + 3 * l + k]), grad[k]);
                l = l + 1 == in.degrees ? 0 : l + 1;
            }
            warp_sync();
        }

        if (!in.integrated) grad[0].variance = grad[1].variance = grad[2].variance = 0.0f;
        FencepostGradient<float> fenceposts = {0.0f, 0.0f};
        if (lane < rows) fenceposts = finish_sample(in, ray, moments, grad, sums);
        const float below = warp_shuffle_up(fenceposts.t1, 1);
        if (lane < rows) grad_t[interval] = fenceposts.t0 + (lane == 0 ? carried : below);
        carried = warp_shuffle(fenceposts.t1, kWarpSize - 1);
        if (interval == in.intervals - 1 && lane < rows) grad_t[in.intervals] = fenceposts.t1;
    }
    write_ray(in, out, number, sums);
}

}  // namespace frustum_ipe

// ---- launches

template <typename Out>
void launch_frustum_ipe_forward(const FrustumIpeInputs& inputs, Out* features, Stream stream) {
    using namespace frustum_ipe;
    const dim3 grid = grid_size(ceil_div(inputs.rays * inputs.intervals, std::int64_t{kThreads}));
    if (inputs.degrees != kMaxDegrees)
        MIPNERF_LAUNCH(frustum_ipe_forward_general_kernel<Out>, grid, dim3(kThreads),
                       kWarps * kGeneralTileBytes<Out>, stream, inputs, features);
    else if (inputs.integrated)
        MIPNERF_LAUNCH((frustum_ipe_forward_kernel<Out, true>), grid, dim3(kThreads), kWarps * kTileBytes,
                       stream, inputs, features);
    else
        MIPNERF_LAUNCH((frustum_ipe_forward_kernel<Out, false>), grid, dim3(kThreads), kWarps * kTileBytes,
                       stream, inputs, features);
}

template <typename Out>
void launch_frustum_ipe_backward(const FrustumIpeInputs& inputs, const Out* grad_features,
                                 const FrustumIpeGradients& gradients, Stream stream) {
    using namespace frustum_ipe;
    const dim3 grid = grid_size(ceil_div(inputs.rays, std::int64_t{kWarps}));
    if (inputs.degrees == kMaxDegrees && is_aligned(grad_features, 16))
        MIPNERF_LAUNCH((frustum_ipe_backward_kernel<Out, true>), grid, dim3(kThreads), kWarps * kTileBytes,
                       stream, inputs, grad_features, gradients);
    else
        MIPNERF_LAUNCH((frustum_ipe_backward_kernel<Out, false>), grid, dim3(kThreads),
                       kWarps * kGeneralTileBytes<Out>, stream, inputs, grad_features, gradients);
}

}  // namespace mipnerf
