// Arithmetic of float32 rows in loops that compilers make vectors of.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

constexpr int kWide = 16;  // partial sums, side by side

// e^x to 2e-7 of it, 0 below -87 and infinity above 88.7: 2^n times a polynomial of degree 6.
inline float exponential(float x) {
  constexpr float kShift = 12582912.0f;  // adding 1.5 x 2^23 rounds to the nearest integer
  const float bounded = x > 89.0f ? 89.0f : x < -87.0f ? -87.0f : x;  // NaN stays NaN
  const float shifted = bounded * 1.44269504f + kShift, n = shifted - kShift;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.38888889e-3f * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = (p * r + 0.5f) * r + 1.0f;
  p = p * r + 1.0f;
  // In two factors: 2^128 alone is no float32.
  const int32_t power = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kShift);
  const int32_t half = power >> 1, rest = power - half;
  const float value = p * std::bit_cast<float>((half + 127) << 23) *
                      std::bit_cast<float>((rest + 127) << 23);
  return x < -87.0f ? 0.0f : value;
}

// In halves, so that additions wait for four others and not for sixteen.
inline float sum_of(float (&parts)[kWide]) {
  for (int width = kWide / 2; width; width /= 2)
    for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
  return parts[0];
}

inline float inner_product(const float* a, const float* b, int64_t count) {
  float parts[kWide] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int lane = 0; lane < kWide; lane++) parts[lane] += a[i + lane] * b[i + lane];
  for (; i < count; i++) sum += a[i] * b[i];
  return sum + sum_of(parts);
}

// The same of `a` and T rows that are `next` apart: their lanes are summed together.
template <int T>
inline void inner_products(const float* a, const float* rows, int64_t next, int64_t count,
                           float* y) {
  constexpr int64_t lanes = sizeof(simd::Floats) / sizeof(float);
  const auto load = [](const float* from) {
    simd::Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
  };
  simd::Floats total[T];
  for (simd::Floats& value : total) value = simd::zero();
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const simd::Floats x = load(a + i);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) total[t] = simd::fma(x, load(rows + t * next + i), total[t]);
  }
  simd::sums(total, y);
  for (; i < count; i++)
    for (int t = 0; t < T; t++) y[t] += a[i] * rows[t * next + i];
}

// x to its root mean square, and times `scale`.
inline void rms_norm(const float* x, const float* scale, float eps, int64_t count, float* y) {
  const float inverse = 1 / std::sqrt(inner_product(x, x, count) / count + eps);
  for (int64_t i = 0; i < count; i++) y[i] = x[i] * inverse * scale[i];
}

// y[i] = sum_s weights[s] x[s, i] of x (count, size), with the sums of some i in registers.
inline void weighted_sum(const float* weights, const float* x, int64_t count, int64_t size,
                         float* y) {
  constexpr int kSums = 4 * kWide;
  int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    float sums[kSums] = {};
    for (int64_t s = 0; s < count; s++)
      for (int lane = 0; lane < kSums; lane++) sums[lane] += weights[s] * x[s * size + i + lane];
    std::memcpy(y + i, sums, sizeof sums);
  }
  std::memset(y + i, 0, (size - i) * sizeof *y);
  for (int64_t s = 0; s < count; s++)
    for (int64_t j = i; j < size; j++) y[j] += weights[s] * x[s * size + j];
}

// In place: e^(x - max) divided by their sum.
inline void softmax(float* x, int64_t count) {
  float largest[kWide], peak = x[0];
  for (float& value : largest) value = x[0];
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int lane = 0; lane < kWide; lane++)
      largest[lane] = x[i + lane] > largest[lane] ? x[i + lane] : largest[lane];
  for (; i < count; i++) peak = x[i] > peak ? x[i] : peak;
  for (const float value : largest) peak = value > peak ? value : peak;
  for (int64_t j = 0; j < count; j++) x[j] = exponential(x[j] - peak);
  float parts[kWide] = {}, sum = 0;
  for (i = 0; i + kWide <= count; i += kWide)
    for (int lane = 0; lane < kWide; lane++) parts[lane] += x[i + lane];
  for (; i < count; i++) sum += x[i];
  const float inverse = 1 / (sum + sum_of(parts));
  for (int64_t j = 0; j < count; j++) x[j] *= inverse;
}

}  // namespace
