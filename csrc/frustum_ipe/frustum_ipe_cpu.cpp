// frustum_ipe on the CPU: threads over rays, vectors first over the samples of a ray (moments and range reduction), then over
// the degrees of a sample (features), so that every feature row is written in order. float32 inputs give float32, bfloat16 or
// float16 features; float64 gives float64 and is there for checking.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../common/cpu_dispatch.h"
#include "frustum_ipe_arguments.h"
#include "frustum_ipe_math.h"

namespace mipnerf {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSampleBlock = 64;

// A 16-bit float in memory, told apart from the other kind by its type.
struct Bfloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

MIPNERF_INLINE void store_feature(float* to, float value) { *to = value; }
MIPNERF_INLINE void store_feature(double* to, double value) { *to = value; }
MIPNERF_INLINE void store_feature(Bfloat16Bits* to, float value) { to->bits = to_bfloat16_bits(value); }
MIPNERF_INLINE void store_feature(HalfBits* to, float value) { to->bits = to_half_bits(value); }
MIPNERF_INLINE float load_feature(const float* from) { return *from; }
MIPNERF_INLINE double load_feature(const double* from) { return *from; }
MIPNERF_INLINE float load_feature(const Bfloat16Bits* from) { return from_bfloat16_bits(from->bits); }
MIPNERF_INLINE float load_feature(const HalfBits* from) { return from_half_bits(from->bits); }

template <typename T>
struct Rays {
  int64_t intervals;
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

  template <FrustumShape kShape>
  MIPNERF_INLINE void fill(const RayConstants<T>& ray, const T* t_vals, int count) {
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

  MIPNERF_INLINE EncodedCoordinate<T> at(int k, int i) const { return {{high[k][i], low[k][i]}, exponent[k][i]}; }
};

template <typename T, bool kIntegrated, int kDegrees, typename Out>
MIPNERF_INLINE void encode_sample(const EncodedBlock<T>& block, int i, const Scales<T>& scales, Out* sines, Out* cosines) {
  const EncodedCoordinate<T> x = block.at(0, i), y = block.at(1, i), z = block.at(2, i);
#pragma omp simd
  for (int l = 0; l < kDegrees; ++l) {
    const SinCos<T> fx = encode_degree<kIntegrated>(x, scales.value[l]);
    const SinCos<T> fy = encode_degree<kIntegrated>(y, scales.value[l]);
    const SinCos<T> fz = encode_degree<kIntegrated>(z, scales.value[l]);
    store_feature(sines + 3 * l, fx.sin);
    store_feature(sines + 3 * l + 1, fy.sin);
    store_feature(sines + 3 * l + 2, fz.sin);
    store_feature(cosines + 3 * l, fx.cos);
    store_feature(cosines + 3 * l + 1, fy.cos);
    store_feature(cosines + 3 * l + 2, fz.cos);
  }
}

template <typename T, typename Out, FrustumShape kShape, bool kIntegrated>
struct Forward {
  Rays<T> rays;
  Out* features;  // [B, N, 6 degrees]

  MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
    const Scales<T> scales(rays);
    const int half = 3 * rays.degrees;
    EncodedBlock<T> block;
    alignas(64) T row[6 * kMaxDegrees];
    for (int64_t ray = begin; ray < end; ++ray) {
      const RayConstants<T> constants =
          ray_constants(rays.origins + 3 * ray, rays.directions + 3 * ray, rays.radii[ray]);
      for (int64_t first = 0; first < rays.intervals; first += kSampleBlock) {
        const int count = static_cast<int>(std::min(kSampleBlock, rays.intervals - first));
        block.template fill<kShape>(constants, rays.t_vals + ray * (rays.intervals + 1) + first, count);
        Out* out = features + (ray * rays.intervals + first) * 2 * half;
        for (int i = 0; i < count; ++i, out += 2 * half) {
          if constexpr (std::is_same_v<T, Out>) {
            if (rays.degrees == kMaxDegrees) {
              encode_sample<T, kIntegrated, kMaxDegrees>(block, i, scales, out, out + half);
              continue;
            }
          }
          if (rays.degrees <= kMaxDegrees / 2)
            encode_sample<T, kIntegrated, kMaxDegrees / 2>(block, i, scales, row, row + 3 * kMaxDegrees);
          else
            encode_sample<T, kIntegrated, kMaxDegrees>(block, i, scales, row, row + 3 * kMaxDegrees);
#pragma omp simd
          for (int j = 0; j < half; ++j) store_feature(out + j, row[j]);
#pragma omp simd
          for (int j = 0; j < half; ++j) store_feature(out + half + j, row[3 * kMaxDegrees + j]);
        }
      }
    }
  }
};

// The gradients of the three coordinates' means and variances of one sample.
template <typename T, bool kIntegrated, int kDegrees>
MIPNERF_INLINE void encode_sample_gradient(const EncodedBlock<T>& block, int i, const Scales<T>& scales, const T* grad_row,
                                           CoordinateGradient<T> grad[3]) {
  const EncodedCoordinate<T> x = block.at(0, i), y = block.at(1, i), z = block.at(2, i);
  const T* grad_sin = grad_row;
  const T* grad_cos = grad_row + 3 * kMaxDegrees;
  T mean_x = 0, mean_y = 0, mean_z = 0, variance_x = 0, variance_y = 0, variance_z = 0;
#pragma omp simd reduction(+ : mean_x, mean_y, mean_z, variance_x, variance_y, variance_z)
  for (int l = 0; l < kDegrees; ++l) {
    const T scale = scales.value[l];
    const CoordinateGradient<T> gx =
        encode_degree_gradient(encode_degree<kIntegrated>(x, scale), scale, grad_sin[3 * l], grad_cos[3 * l]);
    const CoordinateGradient<T> gy =
        encode_degree_gradient(encode_degree<kIntegrated>(y, scale), scale, grad_sin[3 * l + 1], grad_cos[3 * l + 1]);
    const CoordinateGradient<T> gz =
        encode_degree_gradient(encode_degree<kIntegrated>(z, scale), scale, grad_sin[3 * l + 2], grad_cos[3 * l + 2]);
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

template <typename T, typename Out, FrustumShape kShape, bool kIntegrated>
struct Backward {
  Rays<T> rays;
  const Out* grad_features;  // [B, N, 6 degrees]
  T* grad_t_vals;            // [B, N+1]
  T* grad_origins;           // [B, 3]
  T* grad_directions;        // [B, 3]
  T* grad_radii;             // [B, 1]

  MIPNERF_INLINE void operator()(int64_t begin, int64_t end) const {
    const Scales<T> scales(rays);
    const int half = 3 * rays.degrees;
    EncodedBlock<T> block;
    alignas(64) T grad_row[6 * kMaxDegrees] = {};  // zero beyond the degrees in use
    for (int64_t ray = begin; ray < end; ++ray) {
      const RayConstants<T> constants =
          ray_constants(rays.origins + 3 * ray, rays.directions + 3 * ray, rays.radii[ray]);
      const T* t_vals = rays.t_vals + ray * (rays.intervals + 1);
      T* grad_t = grad_t_vals + ray * (rays.intervals + 1);
      RaySums<T> sums = {};
      T carried = 0;  // the gradient of the fencepost that the next interval shares
      for (int64_t first = 0; first < rays.intervals; first += kSampleBlock) {
        const int count = static_cast<int>(std::min(kSampleBlock, rays.intervals - first));
        block.template fill<kShape>(constants, t_vals + first, count);
        const Out* grad_out = grad_features + (ray * rays.intervals + first) * 2 * half;
        for (int i = 0; i < count; ++i, grad_out += 2 * half) {
#pragma omp simd
          for (int j = 0; j < half; ++j) grad_row[j] = load_feature(grad_out + j);
#pragma omp simd
          for (int j = 0; j < half; ++j) grad_row[3 * kMaxDegrees + j] = load_feature(grad_out + half + j);
          CoordinateGradient<T> grad[3];
          encode_sample_gradient<T, kIntegrated, kMaxDegrees>(block, i, scales, grad_row, grad);
          const FrustumMoments<T> moments = frustum_moments<kShape>(t_vals[first + i], t_vals[first + i + 1]);
          const FencepostGradient<T> fenceposts =
              sample_gradient<kShape, kIntegrated>(constants, moments, grad, sums);
          grad_t[first + i] = carried + fenceposts.t0;
          carried = fenceposts.t1;
        }
      }
      grad_t[rays.intervals] = carried;
      const RayGradient<T> grad = ray_gradient(rays.directions + 3 * ray, rays.radii[ray], sums);
      for (int k = 0; k < 3; ++k) {
        grad_origins[3 * ray + k] = grad.origin[k];
        grad_directions[3 * ray + k] = grad.direction[k];
      }
      grad_radii[ray] = grad.radius;
    }
  }
};

// At least this many samples to a thread: below, starting a thread costs more than it saves.
constexpr int64_t kSamplesPerThread = 2048;

template <typename Body>
void run_over_rays(const Body& body, int64_t rays, int64_t intervals) {
  const int64_t grain = std::max<int64_t>(1, kSamplesPerThread / intervals);
  torch::stable::parallel_for(0, rays, grain, [&](int64_t begin, int64_t end) { run_vectorized(body, begin, end); });
}
