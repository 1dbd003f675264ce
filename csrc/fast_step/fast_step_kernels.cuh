// The CUDA kernels of the fast model's training step. The six stages of the design, each ending where all
// rays or all samples must be done:
//
//   1  march_count, ray_starts (march_kernels.cuh), step_samples   rays to samples, in the order of the rays
//   2  step_density                                                 encoding and density network
//   3  step_scan, step_list                                         transmittance; which samples count
//   4  step_colour, step_loss, step_colour_backward                 colours, pixels, loss, gradients of both
//   5  step_density_backward, sum_parts (tiny_mlp_kernels.cuh), step_scatter             gradients of the
//   networks and of the tables 6  step_finish; sparse_adam (sparse_adam_kernels.cuh)
//
// No size depends on the host: launches are as large as there is room for, and what there is is read from
// StepCounters. Every sum but those in the tables (step_scatter) is taken in a fixed order. Those are of
// floats in no particular order, or, on request, in fixed point (hash_encode_sums.cuh: step_largest before
// step_scatter, add_sums after it), which is the same in any order.
#pragma once

#include "../hash_encode/hash_encode_sums.cuh"
#include "../march/march_device.cuh"
#include "../packed_composite/packed_composite_math.h"
#include "fast_step_device.cuh"

namespace mipnerf {

// Thread i of block b writes the samples of ray b * kRayThreads + i, where the ray takes part.
__global__ void __launch_bounds__(kRayThreads) step_samples_kernel(MarchArguments in, StepScratch s) {
    const std::int64_t r = ray_of_thread();
    if (r >= s.counters->rays) return;
    MarchRay<float> ray = begin_marching(in, r);
    const OccupancyMask& mask = in.layout.mask[ray.mask];
    const std::int64_t end = s.starts[r + 1];
    for (std::int64_t at = s.starts[r]; at < end; ++at) {
        float t0, t1;
        march_next(ray, mask, in.masks, t0, t1);
        const MarchSample<float> sample = march_sample(ray, t0, t1);
        store_pack(s.positions + 4 * at,
                   Pack<float, 4>{{sample.mean[0], sample.mean[1], sample.mean[2], sample.scale}});
        s.lengths[at] = (t1 - t0) * ray.norm;
    }
}

// Block b owns samples 64 b to 64 b + 63: thread i encodes one of them into its column of the rows in shared
// memory; the layers are the block's (tiny_mlp_device.cuh). Writes encoding, geometry and tau.
template <typename S, int F, bool kTf32>
__global__ void __launch_bounds__(kTileThreads, 8)
    step_density_kernel(const __grid_constant__ DeviceModel<S> model, StepScratch s) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples;
    const std::int64_t count = s.counters->samples;
    if (first >= count) return;
    float* const rows = shared_memory<float>();
    const std::int64_t own = first + threadIdx.x;
    const Pack<float, 4> sample = own < count ? load_pack<4>(s.positions + 4 * own) : padding_sample();
    S* const kept = static_cast<S*>(s.encoding) + F * own;
    encode_column<F, kTf32>(model, sample, rows + threadIdx.x, [&](int l, const Pack<S, F>& pack) {
        store_pack(kept + l * F * s.capacity, pack);
    });
    block_sync();
    const TileSums<kGeometryFeatures> sums = density_layers<kTf32>(model.networks, rows, rows);
#pragma unroll
    for (int i = 0; i < kGeometryFeatures / 8; ++i)
        store_samples(s.geometry + (tile_x() + 8 * i) * s.capacity + first, sums.of[i]);
    if (tile_x() != 0) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const std::int64_t at = first + tile_sample(j);
        if (at < count) s.tau[at] = fast_density(sums.of[0].value[j]) * s.lengths[at];
    }
}

// Thread i of block b counts those samples of its ray in front of which transmittance is left.
__global__ void __launch_bounds__(kRayThreads) step_scan_kernel(StepScratch s) {
    const std::int64_t r = ray_of_thread();
    std::int32_t count = 0;
    if (r < s.counters->rays) {
        float transmittance = 1.0f;
        const std::int64_t end = s.starts[r + 1];
        for (std::int64_t i = s.starts[r]; i < end && counts(transmittance); ++i, ++count)
            transmittance *= exp_nonpositive(-s.tau[i]);
    }
    if (r < s.rays) s.counted[r] = count;
    const std::int32_t sum = block_sum(count, shared_memory<std::int32_t>());
    if (threadIdx.x == 0) s.counted_totals[blockIdx.x] = sum;
}

// Thread i of block b writes where its ray's counted samples start, and lists them.
__global__ void __launch_bounds__(kRayThreads) step_list_kernel(StepScratch s) {
    const std::int64_t r = ray_of_thread();
    const std::int32_t count = r < s.rays ? s.counted[r] : 0;
    const std::int64_t start = start_of_ray(count, s.counted_totals);
    if (r >= s.rays) return;
    s.counted_starts[r] = start;
    if (r == s.rays - 1) s.counters->counted = static_cast<std::int32_t>(start + count);
    const std::int32_t first = static_cast<std::int32_t>(s.starts[r]);
    for (std::int32_t k = 0; k < count; ++k)
        store_pack(s.list + 2 * (start + k),
                   Pack<std::int32_t, 2>{{first + k, static_cast<std::int32_t>(r)}});
}

// A counted sample's 32 inputs of the colour network into the thread's column; zeros for the padding of a
// tile.
template <bool kTf32>
MIPNERF_DEVICE void load_colour_inputs(const StepScratch& s, const float* directions, std::int64_t own,
                                       std::int64_t count, float* column) {
    if (own < count) {
        const Pack<std::int32_t, 2> place = load_pack<2>(s.list + 2 * own);
#pragma unroll
        for (int g = 0; g < kGeometryFeatures; ++g)
            column[g * kRowStride] =
                operand<kTf32>(load_pack<1>(s.geometry + g * s.capacity + place.value[0]).value[0]);
        store_harmonics<kTf32>(directions + 3 * static_cast<std::int64_t>(place.value[1]),
                               column + kGeometryFeatures * kRowStride);
    } else {
        for (int g = 0; g < kGeometryFeatures + kHarmonics; ++g) column[g * kRowStride] = 0.0f;
    }
}

// Block b owns counted samples 64 b to 64 b + 63 and writes their raw colours.
template <bool kTf32>
__global__ void __launch_bounds__(kTileThreads, 8)
    step_colour_kernel(const __grid_constant__ DeviceNetworks networks, const float* directions,
                       StepScratch s) {
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples;
    const std::int64_t count = s.counters->counted;
    if (first >= count) return;
    float* const rows = shared_memory<float>();
    load_colour_inputs<kTf32>(s, directions, first + threadIdx.x, count, rows + threadIdx.x);
    block_sync();
    const TileSums<8> sums = colour_layers<kTf32>(networks, rows, rows, rows);
    if (tile_x() < 3) store_samples(s.raw + tile_x() * s.capacity + first, sums.of[0]);
}

// Thread i of block b composites its ray's counted samples, compares with the target and writes the gradients
// of the raw colours and densities where the colours stood. Two sweeps from the front: what lies behind a
// sample is the ray's colour less what came so far.
__global__ void __launch_bounds__(kRayThreads) step_loss_kernel(StepTargets targets, StepScratch s) {
    const std::int64_t r = ray_of_thread();
    const std::int32_t rays = s.counters->rays;
    float loss = 0.0f, squared_error = 0.0f;
    if (r < rays) {
        const std::int64_t sample = s.starts[r], start = s.counted_starts[r];
        const std::int32_t count = s.counted[r];
        float* const raw = s.raw + start;
        float transmittance = 1.0f, total[3] = {0.0f, 0.0f, 0.0f};
        for (std::int32_t i = 0; i < count; ++i) {
            const float keep = exp_nonpositive(-s.tau[sample + i]);
            const float weight = transmittance * (1.0f - keep);
#pragma unroll
            for (int k = 0; k < 3; ++k) total[k] += weight * fast_colour(raw[k * s.capacity + i]);
            transmittance *= keep;
        }
        const float share = 1.0f / (3.0f * static_cast<float>(rays));
        float grad_rgb[3], so_far[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            total[k] += transmittance * targets.background[3 * r + k];
            const float error = total[k] - targets.rgb[3 * r + k];
            loss += smooth_l1(error, targets.beta);
            squared_error += error * error;
            grad_rgb[k] = smooth_l1_derivative(error, targets.beta) * share;
        }
        transmittance = 1.0f;
        for (std::int32_t i = 0; i < count; ++i) {
            const float tau = s.tau[sample + i], keep = exp_nonpositive(-tau);
            const float weight = transmittance * (1.0f - keep);
            transmittance *= keep;
            float colour[3];
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                const float given = raw[k * s.capacity + i];
                colour[k] = fast_colour(given);
                so_far[k] += weight * colour[k];
                raw[k * s.capacity + i] = grad_rgb[k] * weight * fast_colour_derivative(given);
            }
            const float by_depth = depth_gradient(grad_rgb, colour, total, so_far, transmittance);
            // d depth / d raw = depth: the activation is an exponential
            raw[3 * s.capacity + i] = fast_density_is_free(s.geometry[sample + i]) ? by_depth * tau : 0.0f;
        }
        if (!is_finite_number(loss)) atomic_add(&s.counters->not_finite, 1);
    }
    float* const of_warps = shared_memory<float>();
    loss = block_sum(loss, of_warps);
    squared_error = block_sum(squared_error, of_warps + kRayThreads / kWarpSize);
    if (threadIdx.x == 0) {
        s.loss_parts[2 * blockIdx.x] = loss;
        s.loss_parts[2 * blockIdx.x + 1] = squared_error;
    }
}

// Block b goes over tiles b, b + parts, ... of counted samples: evaluates the colour network again, writes
// the gradients of its geometry inputs and sums those of its weights into part b. Shared memory: 32 rows of
// inputs, 8 of the outputs' gradients, 64 per hidden layer, whose gradients take the place of its values.
template <bool kTf32>
__global__ void __launch_bounds__(kTileThreads)
    step_colour_backward_kernel(const __grid_constant__ DeviceNetworks networks, const float* directions,
                                StepScratch s) {
    const std::int64_t count = s.counters->counted;
    const FastSizes& sizes = networks.sizes;
    float* const inputs = shared_memory<float>();
    float* const outputs = inputs + sizes.colour_inputs() * kRowStride;
    float* const hidden = outputs + 8 * kRowStride;
    float* const last = sizes.colour_layers == 2 ? hidden + kTileWidth * kRowStride : hidden;
    float* const part = s.weight_parts + blockIdx.x * sizes.weights();
    bool is_first = true;
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples; first < count;
         first += static_cast<std::int64_t>(gridDim.x) * kTileSamples) {
        const std::int64_t own = first + threadIdx.x;
        load_colour_inputs<kTf32>(s, directions, own, count, inputs + threadIdx.x);
#pragma unroll
        for (int k = 0; k < 8; ++k)
            outputs[k * kRowStride + threadIdx.x] =
                k < 3 && own < count ? operand<kTf32>(s.raw[k * s.capacity + own]) : 0.0f;
        block_sync();
        hidden_colour_layers<kTf32>(networks, inputs, hidden, last);
        TileSums<kGeometryFeatures> sums =
            colour_layers_backward<kTf32>(networks, inputs, outputs, hidden, last, is_first, part);
        if (tile_x() == 0) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const std::int64_t at = first + tile_sample(j);
                if (at < count) sums.of[0].value[j] += s.raw[3 * s.capacity + at];
            }
        }
#pragma unroll
        for (int i = 0; i < kGeometryFeatures / 8; ++i)
            store_samples(s.grad_geometry + (tile_x() + 8 * i) * s.capacity + first, sums.of[i]);
        is_first = false;
        block_sync();
    }
    if (is_first)
        for (std::int64_t i = sizes.colour_in_at() + threadIdx.x; i < sizes.weights(); i += kTileThreads)
            part[i] = 0.0f;
}

// As step_colour_backward_kernel for the density network, from the kept encoding; writes the gradients of the
// encoding. Shared memory: 16 rows of the outputs' gradients, 64 of the hidden layer, the encoding.
template <typename S, int F, bool kTf32>
__global__ void __launch_bounds__(kTileThreads)
    step_density_backward_kernel(const __grid_constant__ DeviceModel<S> model, StepScratch s) {
    const std::int64_t count = s.counters->counted;
    const FastSizes& sizes = model.networks.sizes;
    float* const outputs = shared_memory<float>();
    float* const hidden = outputs + kGeometryFeatures * kRowStride;
    float* const inputs = hidden + kTileWidth * kRowStride;
    float* const part = s.weight_parts + blockIdx.x * sizes.weights();
    bool is_first = true;
    for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTileSamples; first < count;
         first += static_cast<std::int64_t>(gridDim.x) * kTileSamples) {
        const std::int64_t own = first + threadIdx.x;
        const bool is_one = own < count;
        const std::int64_t sample = is_one ? load_pack<2>(s.list + 2 * own).value[0] : 0;
        const S* const kept = static_cast<const S*>(s.encoding) + F * sample;
        float* const column = inputs + threadIdx.x;
        for (int l = 0; l < model.grid.levels; ++l) {
            Floats<F> features{};
            if (is_one) features = pack_to_float(load_pack<F>(kept + l * F * s.capacity));
#pragma unroll
            for (int f = 0; f < F; ++f) column[(l * F + f) * kRowStride] = operand<kTf32>(features.value[f]);
        }
        store_scale_inputs<kTf32>(model, is_one ? load_pack<1>(s.positions + 4 * sample + 3).value[0] : 1.0f,
                                  column);
#pragma unroll
        for (int g = 0; g < kGeometryFeatures; ++g)
            outputs[g * kRowStride + threadIdx.x] =
                is_one ? operand<kTf32>(s.grad_geometry[g * s.capacity + own]) : 0.0f;
        block_sync();
        density_layers_backward<kTf32>(model.networks, inputs, outputs, hidden, is_first, part);
        if (is_one)
            for (int l = 0; l < model.grid.levels; ++l) {
                Pack<float, F> gradient;
#pragma unroll
                for (int f = 0; f < F; ++f) gradient.value[f] = column[(l * F + f) * kRowStride];
                store_pack(s.grad_encoding + F * (l * s.capacity + own), gradient);
            }
        is_first = false;
    }
    if (is_first)
        for (std::int64_t i = threadIdx.x; i < sizes.colour_in_at(); i += kTileThreads) part[i] = 0.0f;
}

constexpr int kScatterThreads = 128;

// What thread i of block (b, l) has to scatter: of level l of counted sample b * kScatterThreads + i. kept 0:
// nothing.
template <int F>
struct ScatteredSample {
    float kept;
    Cell<float> cell;
    Floats<F> gradient;
};
template <int F>
MIPNERF_DEVICE ScatteredSample<F> scattered_sample(const HashGrid& grid, const EncodeOptions& encode,
                                                   const StepScratch& s) {
    ScatteredSample<F> found{};
    const std::int64_t own = static_cast<std::int64_t>(blockIdx.x) * kScatterThreads + threadIdx.x;
    if (own >= s.counters->counted) return found;
    const std::int32_t resolution = grid.level[blockIdx.y].resolution;
    const std::int64_t at = load_pack<2>(s.list + 2 * own).value[0];
    const Pack<float, 4> sample = load_pack<4>(s.positions + 4 * at);
    found.kept =
        attenuation(encode.attenuation, sample.value[3], static_cast<float>(resolution), encode.cutoff);
    if (found.kept == 0.0f) return found;
    found.cell = cell_of(sample.value[0], sample.value[1], sample.value[2], resolution);
    found.gradient = pack_to_float(load_pack<F>(s.grad_encoding + F * (blockIdx.y * s.capacity + own)));
    return found;
}

// Finds the largest gradient of each level, for FixedSums; one that is not finite counts like those of the
// networks.
template <int F>
__global__ void __launch_bounds__(kScatterThreads)
    step_largest_kernel(const __grid_constant__ HashGrid grid, EncodeOptions encode, StepScratch s) {
    const ScatteredSample<F> sample = scattered_sample<F>(grid, encode, s);
    const std::uint32_t bits =
        sample.kept == 0.0f ? 0u : largest_bits<F>(sample.kept, sample.cell, sample.gradient);
    if (!are_bits_finite(bits)) atomic_add(&s.counters->not_finite, 1);
    raise_largest(s.largest + blockIdx.y, bits);
}

// Adds the gradients to the eight entries of each sample and level.
template <int F, typename Sums>
__global__ void __launch_bounds__(kScatterThreads)
    step_scatter_kernel(const __grid_constant__ HashGrid grid, EncodeOptions encode, StepScratch s,
                        Sums sums) {
    if (s.counters->not_finite != 0) return;
    const ScatteredSample<F> sample = scattered_sample<F>(grid, encode, s);
    if (sample.kept == 0.0f) return;
    scatter_level<F>(grid.level[blockIdx.y], sample.kept, sample.cell, sample.gradient,
                     sums.of_level(blockIdx.y));
}

MIPNERF_DEVICE float* gradient_of_weight(const FastSizes& sizes, const FastWeights<float>& grads,
                                         std::int64_t weight) {
    if (weight < sizes.density_out_at()) return grads.density_in + weight;
    if (weight < sizes.colour_in_at()) return grads.density_out + (weight - sizes.density_out_at());
    if (weight < sizes.colour_hidden_at()) return grads.colour_in + (weight - sizes.colour_in_at());
    if (weight < sizes.colour_out_at()) return grads.colour_hidden + (weight - sizes.colour_hidden_at());
    return grads.colour_out + (weight - sizes.colour_out_at());
}

// Thread i of block b adds the gradient of weight b * kRayThreads + i; block 0 also writes the statistics.
__global__ void __launch_bounds__(kRayThreads)
    step_finish_kernel(FastSizes sizes, StepScratch s, FastWeights<float> grads, double* statistics) {
    const std::int64_t weight = ray_of_thread();
    const StepCounters found = *s.counters;
    if (weight < sizes.weights() && found.not_finite == 0)
        *gradient_of_weight(sizes, grads, weight) += s.weight_sums[weight];
    if (blockIdx.x != 0) return;
    float loss = 0.0f, squared_error = 0.0f;
    const std::int64_t blocks = ceil_div(s.rays, std::int64_t{kRayThreads});
    for (std::int64_t b = threadIdx.x; b < blocks; b += kRayThreads) {
        loss += s.loss_parts[2 * b];
        squared_error += s.loss_parts[2 * b + 1];
    }
    float* const of_warps = shared_memory<float>();
    loss = block_sum(loss, of_warps);
    squared_error = block_sum(squared_error, of_warps + kRayThreads / kWarpSize);
    if (threadIdx.x != 0) return;
    const float elements = 3.0f * static_cast<float>(found.rays > 1 ? found.rays : 1);
    statistics[0] = loss / elements;
    statistics[1] = squared_error / elements;
    statistics[2] = found.samples;
    statistics[3] = found.counted;
    statistics[4] = found.not_finite == 0 ? 1.0 : 0.0;
    statistics[5] = found.rays;
}

// One thread.
__global__ void __launch_bounds__(kWarpSize) step_pace_kernel(const double* statistics, StepPace pace) {
    if (threadIdx.x != 0) return;
    const float samples = static_cast<float>(statistics[2]), rays = static_cast<float>(statistics[5]);
    if (rays > 0.0f) {
        const float latest = samples / rays;
        *pace.samples_per_ray = 0.8f * *pace.samples_per_ray + 0.2f * (latest < 0.5f ? 0.5f : latest);
    } else {
        *pace.samples_per_ray *= 2.0f;  // not one ray had room
    }
    const float wanted = pace.batch / *pace.samples_per_ray;
    const int least = pace.least, most = pace.most;
    const int count = wanted < static_cast<float>(least)  ? least
                      : wanted > static_cast<float>(most) ? most
                                                          : static_cast<int>(ceilf(wanted));
    *pace.active_rays = (count + pace.multiple - 1) / pace.multiple * pace.multiple;
    *pace.step += 1;
}

// ---- launches -----------------------------------------------------------------------------------

// Zeroes what kernels add to or may leave unwritten.
__global__ void __launch_bounds__(kWarpSize) step_begin_kernel(StepScratch s) {
    if (threadIdx.x == 0) *s.counters = StepCounters{0, 0, 0, 0};
    if (threadIdx.x < kMaxLevels) s.largest[threadIdx.x] = 0;
}

void launch_step_march(const MarchArguments& rays, const StepScratch& s, Stream stream) {
    MIPNERF_LAUNCH(step_begin_kernel, dim3(1), dim3(kWarpSize), 0, stream, s);
    launch_march_count(rays, s.counts, s.totals, stream);
    launch_ray_starts(rays.rays, rays.active_rays, s.counts, s.totals, s.starts,
                      {s.capacity, &s.counters->rays, &s.counters->samples}, stream);
}

template <typename S, int F>
void launch_train_step(const DeviceModel<S>& model, const MarchArguments& rays, const StepTargets& targets,
                       const StepScratch& s, float* grad_tables, std::int64_t* table_sums,
                       const FastWeights<float>& grads, double* statistics, Stream stream) {
    const FastSizes& sizes = model.networks.sizes;
    const dim3 of_rays = grid_size(ray_blocks(s.rays)), of_tiles = grid_size(s.capacity / kTileSamples);
    const dim3 ray_block(kRayThreads), tile_block(kTileThreads), parts(static_cast<unsigned>(s.parts));
    const std::size_t sum_bytes = 2 * kRayThreads / kWarpSize * sizeof(float);
    const int inputs = std::max(padded_inputs(sizes), gradient_rows(sizes));
    MIPNERF_LAUNCH(step_samples_kernel, of_rays, ray_block, 0, stream, rays, s);
    const auto step_density =
        model.networks.tf32 ? step_density_kernel<S, F, true> : step_density_kernel<S, F, false>;
    MIPNERF_LAUNCH(step_density, of_tiles, tile_block, tile_bytes(encoding_rows(sizes)), stream, model, s);
    MIPNERF_LAUNCH(step_scan_kernel, of_rays, ray_block, sum_bytes, stream, s);
    MIPNERF_LAUNCH(step_list_kernel, of_rays, ray_block, kRayStartBytes, stream, s);
    const auto step_colour = model.networks.tf32 ? step_colour_kernel<true> : step_colour_kernel<false>;
    MIPNERF_LAUNCH(step_colour, of_tiles, tile_block, tile_bytes(kTileWidth), stream, model.networks,
                   rays.directions, s);
    MIPNERF_LAUNCH(step_loss_kernel, of_rays, ray_block, sum_bytes, stream, targets, s);
    const auto step_colour_backward =
        model.networks.tf32 ? step_colour_backward_kernel<true> : step_colour_backward_kernel<false>;
    MIPNERF_LAUNCH(step_colour_backward, parts, tile_block,
                   tile_bytes(sizes.colour_inputs() + 8 + sizes.colour_layers * kTileWidth), stream,
                   model.networks, rays.directions, s);
    const auto step_density_backward = model.networks.tf32 ? step_density_backward_kernel<S, F, true>
                                                           : step_density_backward_kernel<S, F, false>;
    MIPNERF_LAUNCH(step_density_backward, parts, tile_block,
                   tile_bytes(kGeometryFeatures + kTileWidth + inputs), stream, model, s);
    launch_sum_parts(sizes.weights(), s.parts, s.weight_parts, s.weight_sums, &s.counters->not_finite,
                     stream);
    dim3 of_levels = grid_size(ceil_div(s.capacity, std::int64_t{kScatterThreads}));
    of_levels.y = static_cast<unsigned>(model.grid.levels);
    if (table_sums == nullptr) {
        MIPNERF_LAUNCH((step_scatter_kernel<F, FloatSums>), of_levels, dim3(kScatterThreads), 0, stream,
                       model.grid, model.encode, s, FloatSums{grad_tables});
    } else {
        const FixedSums sums{table_sums, s.largest, s.capacity, &s.counters->counted};
        MIPNERF_LAUNCH(step_largest_kernel<F>, of_levels, dim3(kScatterThreads), 0, stream, model.grid,
                       model.encode, s);
        MIPNERF_LAUNCH((step_scatter_kernel<F, FixedSums>), of_levels, dim3(kScatterThreads), 0, stream,
                       model.grid, model.encode, s, sums);
        launch_add_sums<F>(model.grid, sums, &s.counters->not_finite, grad_tables, stream);
    }
    MIPNERF_LAUNCH(step_finish_kernel, grid_size(ceil_div(sizes.weights(), std::int64_t{kRayThreads})),
                   ray_block, sum_bytes, stream, sizes, s, grads, statistics);
}

void launch_step_pace(const double* statistics, const StepPace& pace, Stream stream) {
    MIPNERF_LAUNCH(step_pace_kernel, dim3(1), dim3(kWarpSize), 0, stream, statistics, pace);
}

}  // namespace mipnerf
