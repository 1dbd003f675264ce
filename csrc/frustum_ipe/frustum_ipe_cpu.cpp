// frustum_ipe on the CPU: threads over rays, vectors first over the samples of a ray (moments and range
// reduction), then over the degrees of a sample (features), so that every feature row is written in order.
// float32 inputs give float32, bfloat16 or float16 features; float64 gives float64 and is there for checking.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "../common/for_rays.h"
#include "../common/fresh_pages.h"
#include "../common/storage.h"
#include "frustum_ipe_arguments.h"
#include "frustum_ipe_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSampleBlock = 64;

template <typename T>
struct Rays {
    int64_t intervals;
    bool cylinder;
    int min_deg;
    int degrees;
    const T* t_vals;      // [B, N+1]
    const T* origins;     // [B, 3]
    const T* directions;  // [B, 3]
    const T* radii;       // [B, 1]
};

// 2^degree for each of the (at most kMaxDegrees) degrees; the unused ones are 1.
template <typename T>
struct Scales {
    alignas(64) T value[kMaxDegrees];

    MIPNERF_INLINE explicit Scales(const Rays<T>& rays) {
        for (int l = 0; l < kMaxDegrees; ++l)
            value[l] = l < rays.degrees ? static_cast<T>(int64_t{1} << (rays.min_deg + l)) : T(1);
    }
};

// A block of samples of one ray, coordinates inside.
template <typename T>
struct EncodedBlock {
    alignas(64) T high[3][kSampleBlock];
    alignas(64) T low[3][kSampleBlock];
    alignas(64) T exponent[3][kSampleBlock];

    MIPNERF_INLINE void fill(bool cylinder, const RayConstants<T>& ray, const T* t_vals, int count) {
        if (cylinder)
            fill_shape<FrustumShape::kCylinder>(ray, t_vals, count);
        else
            fill_shape<FrustumShape::kCone>(ray, t_vals, count);
    }

    template <FrustumShape kShape>
    MIPNERF_INLINE void fill_shape(const RayConstants<T>& ray, const T* t_vals, int count) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const FrustumMoments<T> moments = frustum_moments<kShape>(t_vals[i], t_vals[i + 1]);
            for (int k = 0; k < 3; ++k) {
                const EncodedCoordinate<T> coordinate = encoded_coordinate(ray, moments, k);
                high[k][i] = coordinate.half_turns.hi;
                low[k][i] = coordinate.half_turns.lo;
                exponent[k][i] = coordinate.exponent;
            }
        }
    }

    MIPNERF_INLINE EncodedCoordinate<T> at(int k, int i) const {
        return {{high[k][i], low[k][i]}, exponent[k][i]};
    }
};

template <typename T, bool kIntegrated, int kDegrees>
MIPNERF_INLINE void encode_sample(const EncodedBlock<T>& block, int i, const Scales<T>& scales, T* sines,
                                  T* cosines) {
    const EncodedCoordinate<T> x = block.at(0, i), y = block.at(1, i), z = block.at(2, i);
#pragma omp simd
    for (int l = 0; l < kDegrees; ++l) {
        const SinCos<T> fx = encode_degree<kIntegrated>(x, scales.value[l]);
        const SinCos<T> fy = encode_degree<kIntegrated>(y, scales.value[l]);
        const SinCos<T> fz = encode_degree<kIntegrated>(z, scales.value[l]);
        sines[3 * l] = fx.sin;
        sines[3 * l + 1] = fy.sin;
        sines[3 * l + 2] = fz.sin;
        cosines[3 * l] = fx.cos;
        cosines[3 * l + 1] = fy.cos;
        cosines[3 * l + 2] = fz.cos;
    }
}

// A result larger than this is written past the caches: it would push everything else out of them, and every
// line of it would be read from memory before it is overwritten. Measured: 1.4 times faster at 100 MB, slower
// below a few megabytes.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

// 16 bytes past the caches where the processor can; both addresses aligned to 16 bytes.
MIPNERF_INLINE void stream_16_bytes(void* to, const void* from) {
#if defined(__SSE2__)
    _mm_stream_si128(static_cast<__m128i*>(to), _mm_load_si128(static_cast<const __m128i*>(from)));
#else
    std::memcpy(to, from, 16);
#endif
}

// Orders what this thread streamed before what it writes next.
MIPNERF_INLINE void finish_streaming() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

template <typename T, bool kIntegrated>
struct Forward {
    Rays<T> rays;
    void* features;  // [B, N, 6 degrees]
    Storage storage;
    bool stream;  // past the caches; takes all 16 degrees

    // One sample's features to memory, in order.
    MIPNERF_INLINE void write_sample(const EncodedBlock<T>& block, int i, const Scales<T>& scales,
                                     char* out) const {
        constexpr int kHalf = 3 * kMaxDegrees;
        if (storage == Storage::kSame && rays.degrees == kMaxDegrees && !stream) {
            T* const same = reinterpret_cast<T*>(out);
            encode_sample<T, kIntegrated, kMaxDegrees>(block, i, scales, same, same + kHalf);
            return;
        }
        alignas(64) T row[2 * kHalf];
        if (rays.degrees <= kMaxDegrees / 2)
            encode_sample<T, kIntegrated, kMaxDegrees / 2>(block, i, scales, row, row + kHalf);
        else
            encode_sample<T, kIntegrated, kMaxDegrees>(block, i, scales, row, row + kHalf);
        if (stream) {
            alignas(64) char packed[2 * kHalf * sizeof(T)];
            store_numbers(packed, storage, row, 2 * kHalf);
            const int64_t bytes = 2 * kHalf * bytes_of(storage, sizeof(T));
            for (int64_t at = 0; at < bytes; at += 16) stream_16_bytes(out + at, packed + at);
            return;
        }
        const int half = 3 * rays.degrees;
        store_numbers(out, storage, row, half);
        store_numbers(out + half * bytes_of(storage, sizeof(T)), storage, row + kHalf, half);
    }

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const Scales<T> scales(rays);
        const int64_t row_bytes = 6 * rays.degrees * bytes_of(storage, sizeof(T));
        EncodedBlock<T> block;
        for (int64_t ray = begin; ray < end; ++ray) {
            const RayConstants<T> constants =
                ray_constants(rays.origins + 3 * ray, rays.directions + 3 * ray, rays.radii[ray]);
            for (int64_t first = 0; first < rays.intervals; first += kSampleBlock) {
                const int count = static_cast<int>(std::min(kSampleBlock, rays.intervals - first));
                block.fill(rays.cylinder, constants, rays.t_vals + ray * (rays.intervals + 1) + first, count);
                char* out = static_cast<char*>(features) + (ray * rays.intervals + first) * row_bytes;
                for (int i = 0; i < count; ++i) write_sample(block, i, scales, out + i * row_bytes);
            }
        }
        if (stream) finish_streaming();
    }
};

// The gradients of the three coordinates' means and variances of one sample.
template <typename T, bool kIntegrated, int kDegrees>
MIPNERF_INLINE void encode_sample_gradient(const EncodedBlock<T>& block, int i, const Scales<T>& scales,
                                           const T* grad_row, CoordinateGradient<T> grad[3]) {
    const EncodedCoordinate<T> x = block.at(0, i), y = block.at(1, i), z = block.at(2, i);
    const T* grad_sin = grad_row;
    const T* grad_cos = grad_row + 3 * kMaxDegrees;
    T mean_x = 0, mean_y = 0, mean_z = 0, variance_x = 0, variance_y = 0, variance_z = 0;
#pragma omp simd reduction(+ : mean_x, mean_y, mean_z, variance_x, variance_y, variance_z)
    for (int l = 0; l < kDegrees; ++l) {
        const T scale = scales.value[l];
        const CoordinateGradient<T> gx = encode_degree_gradient(encode_degree<kIntegrated>(x, scale), scale,
                                                                grad_sin[3 * l], grad_cos[3 * l]);
        const CoordinateGradient<T> gy = encode_degree_gradient(encode_degree<kIntegrated>(y, scale), scale,
                                                                grad_sin[3 * l + 1], grad_cos[3 * l + 1]);
        const CoordinateGradient<T> gz = encode_degree_gradient(encode_degree<kIntegrated>(z, scale), scale,
                                                                grad_sin[3 * l + 2], grad_cos[3 * l + 2]);
        mean_x += gx.mean;
        mean_y += gy.mean;
        mean_z += gz.mean;
        variance_x += gx.variance;
        variance_y += gy.variance;
        variance_z += gz.variance;
    }
    grad[0] = {mean_x, variance_x};
    grad[1] = {mean_y, variance_y};
    grad[2] = {mean_z, variance_z};
}

// Per sample of a block, the gradients on their way from the coordinates to the fenceposts and the ray. Every
// place in a block has its own running sums over the blocks of the ray, so that nothing depends on the width
// of the vectors.
template <typename T>
struct GradientBlock {
    alignas(64) T mean[3][kSampleBlock];
    alignas(64) T variance[3][kSampleBlock];
    alignas(64) T t0[kSampleBlock];
    alignas(64) T t1[kSampleBlock];
    alignas(64) T sums[12][kSampleBlock];

    template <bool kIntegrated>
    MIPNERF_INLINE void to_fenceposts_and_ray(bool cylinder, const RayConstants<T>& ray, const T* t_vals,
                                              int count) {
        if (cylinder)
            shape_to_fenceposts_and_ray<FrustumShape::kCylinder, kIntegrated>(ray, t_vals, count);
        else
            shape_to_fenceposts_and_ray<FrustumShape::kCone, kIntegrated>(ray, t_vals, count);
    }

    template <FrustumShape kShape, bool kIntegrated>
    MIPNERF_INLINE void shape_to_fenceposts_and_ray(const RayConstants<T>& ray, const T* t_vals, int count) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const FrustumMoments<T> moments = frustum_moments<kShape>(t_vals[i], t_vals[i + 1]);
            const CoordinateGradient<T> grad[3] = {
                {mean[0][i], variance[0][i]}, {mean[1][i], variance[1][i]}, {mean[2][i], variance[2][i]}};
            RaySums<T> part = {};
            const FencepostGradient<T> fenceposts =
                sample_gradient<kShape, kIntegrated>(ray, moments, grad, part);
            t0[i] = fenceposts.t0;
            t1[i] = fenceposts.t1;
            for (int k = 0; k < 3; ++k) {
                sums[k][i] += part.mean[k];
                sums[3 + k][i] += part.mean_distance[k];
                sums[6 + k][i] += part.variance_along[k];
                sums[9 + k][i] += part.variance_across[k];
            }
        }
    }

    MIPNERF_INLINE RaySums<T> ray_sums() const {
        T total[12];
        for (int q = 0; q < 12; ++q) {
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < kSampleBlock; ++i) sum += sums[q][i];
            total[q] = sum;
        }
        RaySums<T> result;
        for (int k = 0; k < 3; ++k) {
            result.mean[k] = total[k];
            result.mean_distance[k] = total[3 + k];
            result.variance_along[k] = total[6 + k];
            result.variance_across[k] = total[9 + k];
        }
        return result;
    }
};

template <typename T, bool kIntegrated>
struct Backward {
    Rays<T> rays;
    const void* grad_features;  // [B, N, 6 degrees]
    Storage storage;
    T* grad_t_vals;      // [B, N+1]
    T* grad_origins;     // [B, 3]
    T* grad_directions;  // [B, 3]
    T* grad_radii;       // [B, 1]

    MIPNERF_INLINE void read_sample(const EncodedBlock<T>& block, int i, const Scales<T>& scales,
                                    const char* grad_out, T* grad_row, GradientBlock<T>& gradients) const {
        const int half = 3 * rays.degrees;
        load_numbers(grad_out, storage, grad_row, half);
        load_numbers(grad_out + half * bytes_of(storage, sizeof(T)), storage, grad_row + 3 * kMaxDegrees,
                     half);
        CoordinateGradient<T> grad[3];
        if (rays.degrees <= kMaxDegrees / 2)
            encode_sample_gradient<T, kIntegrated, kMaxDegrees / 2>(block, i, scales, grad_row, grad);
        else
            encode_sample_gradient<T, kIntegrated, kMaxDegrees>(block, i, scales, grad_row, grad);
        for (int k = 0; k < 3; ++k) {
            gradients.mean[k][i] = grad[k].mean;
            gradients.variance[k][i] = grad[k].variance;
        }
    }

    MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
        const Scales<T> scales(rays);
        const int64_t row_bytes = 6 * rays.degrees * bytes_of(storage, sizeof(T));
        EncodedBlock<T> block;
        GradientBlock<T> gradients;
        alignas(64) T grad_row[6 * kMaxDegrees] = {};  // zero beyond the degrees in use
        for (int64_t ray = begin; ray < end; ++ray) {
            const RayConstants<T> constants =
                ray_constants(rays.origins + 3 * ray, rays.directions + 3 * ray, rays.radii[ray]);
            const T* t_vals = rays.t_vals + ray * (rays.intervals + 1);
            T* grad_t = grad_t_vals + ray * (rays.intervals + 1);
            for (auto& sums : gradients.sums) std::fill(sums, sums + kSampleBlock, T(0));
            grad_t[0] = T(0);
            for (int64_t first = 0; first < rays.intervals; first += kSampleBlock) {
                const int count = static_cast<int>(std::min(kSampleBlock, rays.intervals - first));
                block.fill(rays.cylinder, constants, t_vals + first, count);
                const char* grad_out =
                    static_cast<const char*>(grad_features) + (ray * rays.intervals + first) * row_bytes;
                for (int i = 0; i < count; ++i)
                    read_sample(block, i, scales, grad_out + i * row_bytes, grad_row, gradients);
                gradients.template to_fenceposts_and_ray<kIntegrated>(rays.cylinder, constants,
                                                                      t_vals + first, count);
                grad_t[first] += gradients.t0[0];
                for (int i = 1; i < count; ++i) grad_t[first + i] = gradients.t1[i - 1] + gradients.t0[i];
                grad_t[first + count] = gradients.t1[count - 1];
            }
            const RayGradient<T> grad =
                ray_gradient(rays.directions + 3 * ray, rays.radii[ray], gradients.ray_sums());
            for (int k = 0; k < 3; ++k) {
                grad_origins[3 * ray + k] = grad.origin[k];
                grad_directions[3 * ray + k] = grad.direction[k];
            }
            grad_radii[ray] = grad.radius;
        }
    }
};

template <typename T>
Rays<T> rays_of(const FrustumIpeSizes& sizes, bool cylinder, int64_t min_deg, const Tensor& t_vals,
                const Tensor& origins, const Tensor& directions, const Tensor& radii) {
    return {sizes.intervals,
            cylinder,
            static_cast<int>(min_deg),
            static_cast<int>(sizes.degrees),
            static_cast<const T*>(t_vals.const_data_ptr()),
            static_cast<const T*>(origins.const_data_ptr()),
            static_cast<const T*>(directions.const_data_ptr()),
            static_cast<const T*>(radii.const_data_ptr())};
}

// Calls run(T, integrated) with a null pointer to the dtype of the inputs, and with whether the variance is
// wanted as a type.
template <typename Run>
void with_variant(ScalarType inputs, bool integrated, const Run& run) {
    const auto with_dtype = [&](auto* type) {
        integrated ? run(type, std::true_type()) : run(type, std::false_type());
    };
    if (inputs == ScalarType::Double)
        with_dtype(static_cast<double*>(nullptr));
    else
        with_dtype(static_cast<float*>(nullptr));
}

void check_dtypes(const Checker& check, const char* features_name, ScalarType features,
                  const Tensor& t_vals) {
    check.dtype("t_vals", t_vals, {ScalarType::Float, ScalarType::Double});
    if (t_vals.scalar_type() == ScalarType::Double)
        check.dtype(features_name, features, {ScalarType::Double});
    else
        check.dtype(features_name, features, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

Tensor frustum_ipe_forward_cpu(Tensor t_vals, Tensor origins, Tensor directions, Tensor radii,
                               int64_t min_deg, int64_t max_deg, bool cylinder, bool integrated,
                               ScalarType out_dtype) {
    const Checker check{"frustum_ipe_forward"};
    check_dtypes(check, "out_dtype", out_dtype, t_vals);
    const FrustumIpeSizes sizes =
        check_frustum_ipe(check, t_vals, origins, directions, radii, min_deg, max_deg);
    t_vals = torch::stable::contiguous(t_vals);
    origins = torch::stable::contiguous(origins);
    directions = torch::stable::contiguous(directions);
    radii = torch::stable::contiguous(radii);
    Tensor features =
        torch::stable::new_empty(t_vals, {sizes.rays, sizes.intervals, sizes.features()}, out_dtype);
    const int64_t bytes =
        sizes.rays * sizes.intervals * sizes.features() * static_cast<int64_t>(features.element_size());
    const bool large = bytes >= kStreamBytes;
    if (large) prefer_large_pages(features.mutable_data_ptr(), bytes);
    with_variant(t_vals.scalar_type(), integrated, [&](auto* input, auto is_integrated) {
        using T = std::remove_pointer_t<decltype(input)>;
        const Forward<T, is_integrated()> body{
            rays_of<T>(sizes, cylinder, min_deg, t_vals, origins, directions, radii),
            features.mutable_data_ptr(), storage_of(out_dtype), large && sizes.degrees == kMaxDegrees};
        for_rays<T>(sizes.rays, sizes.intervals, body);
    });
    return features;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frustum_ipe_backward_cpu(Tensor grad_features, Tensor t_vals,
                                                                    Tensor origins, Tensor directions,
                                                                    Tensor radii, int64_t min_deg,
                                                                    int64_t max_deg, bool cylinder,
                                                                    bool integrated) {
    const Checker check{"frustum_ipe_backward"};
    check_dtypes(check, "grad_features", grad_features.scalar_type(), t_vals);
    const FrustumIpeSizes sizes =
        check_frustum_ipe(check, t_vals, origins, directions, radii, min_deg, max_deg);
    check_frustum_ipe_grad(check, grad_features, t_vals, sizes);
    grad_features = torch::stable::contiguous(grad_features);
    t_vals = torch::stable::contiguous(t_vals);
    origins = torch::stable::contiguous(origins);
    directions = torch::stable::contiguous(directions);
    radii = torch::stable::contiguous(radii);
    // Explicit sizes: empty_like would keep the strides of a view that counts as contiguous.
    Tensor grad_t_vals = torch::stable::new_empty(t_vals, {sizes.rays, sizes.intervals + 1});
    Tensor grad_origins = torch::stable::new_empty(t_vals, {sizes.rays, 3});
    Tensor grad_directions = torch::stable::new_empty(t_vals, {sizes.rays, 3});
    Tensor grad_radii = torch::stable::new_empty(t_vals, {sizes.rays, 1});
    with_variant(t_vals.scalar_type(), integrated, [&](auto* input, auto is_integrated) {
        using T = std::remove_pointer_t<decltype(input)>;
        const Backward<T, is_integrated()> body{
            rays_of<T>(sizes, cylinder, min_deg, t_vals, origins, directions, radii),
            grad_features.const_data_ptr(),
            storage_of(grad_features.scalar_type()),
            static_cast<T*>(grad_t_vals.mutable_data_ptr()),
            static_cast<T*>(grad_origins.mutable_data_ptr()),
            static_cast<T*>(grad_directions.mutable_data_ptr()),
            static_cast<T*>(grad_radii.mutable_data_ptr())};
        for_rays<T>(sizes.rays, sizes.intervals, body);
    });
    return {grad_t_vals, grad_origins, grad_directions, grad_radii};
}

}  // namespace
}  // namespace mipnerf

STABLE_TORCH_LIBRARY_IMPL(mipnerf_fast, CPU, m) {
    m.impl("frustum_ipe_forward", TORCH_BOX(&mipnerf::frustum_ipe_forward_cpu));
    m.impl("frustum_ipe_backward", TORCH_BOX(&mipnerf::frustum_ipe_backward_cpu));
}
