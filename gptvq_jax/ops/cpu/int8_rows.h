// Products with int8 rows (core/int8_rows.py): W[r, c] = scale[r] (code - 127.5). x is taken in three
// digits, which are as exact as float32: rows are read from memory anyway longer than that takes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "products.h"
#include "simd.h"

namespace {

struct Int8Rows {
  int64_t rows, cols;
  const uint8_t* codes;
  const uint16_t* scales;  // (R,) float16
};

// Codes as `dot` takes weights: with the bias of 128 that they have, or without.
inline Bytes as_weights(Bytes codes) {
#if defined(__aarch64__)
  return kBias ? codes : veorq_u8(codes, fill(128));
#elif defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return codes;
#elif defined(__AVX2__) && defined(__FMA__)
  return kBias ? codes : _mm256_xor_si256(codes, fill(128));
#else
  return each<Bytes>([&](int i) { return kBias ? codes.at[i] : codes.at[i] ^ 128; });
#endif
}

// Products of T rows of codes with a row of x: the value of its Q digits, of which Q whole vectors of
// bytes lie together for each vector of codes. The last one of these may be shorter.
template <int T, int Q>
void int8_tile(const Int8Rows& w, const int8_t* x, int64_t row, float (&values)[T]) {
  Ints total[T][Q];
  for (auto& of_row : total)
    for (Ints& sum : of_row) sum = zero_ints();
  const uint8_t* codes = w.codes + row * w.cols;
  auto add = [&](auto&& codes_of) {
    Bytes input[Q];
    for (int q = 0; q < Q; q++, x += kLanes) input[q] = load(x);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const Bytes weight = as_weights(codes_of(codes + t * w.cols));
      for (int q = 0; q < Q; q++) total[t][q] = in_order(dot(total[t][q], weight, input[q]));
    }
    codes += kLanes;
  };
  for (int64_t i = 0; i < w.cols / kLanes; i++)
    add([&](const uint8_t* from) {
      __builtin_prefetch(from + 2 * T * w.cols);  // of the rows that come next
      return load(from);
    });
  if (const int64_t left = w.cols % kLanes)
    add([&](const uint8_t* from) {
      uint8_t part[kLanes] = {};
      std::copy_n(from, left, part);
      return load(part);
    });
  Floats of_rows[T];
  for (int t = 0; t < T; t++) of_rows[t] = digits_to_float<Q>(total[t]);
  sums(of_rows, values);
}

// y (batch, rows) = x (batch, cols) W^T.
template <class Pool>
void int8_rows_product(const Int8Rows& w, const float* x, int64_t batch, Pool& pool, float* y) {
  constexpr int Q = 3, T = 4;
  const int64_t chunks = divide_up(w.cols, kLanes), size = chunks * Q * kLanes;
  std::vector<int8_t> digits(batch * size), of_row(Q * w.cols);
  std::vector<float> x_scales(batch), centers(batch);  // what 127.5 of every code takes away
  for (int64_t n = 0; n < batch; n++) {
    x_scales[n] = round_row<Q>(x + n * w.cols, w.cols, of_row.data(), w.cols);
    double center = 0, factor = 127.5 - (kBias ? 0 : 128);
    for (int q = 0; q < Q; q++, factor /= kBase) {
      const int8_t* const from = of_row.data() + q * w.cols;
      int32_t sum = 0;
      for (int64_t c = 0; c < w.cols; c++) sum += from[c];
      center += factor * sum;
      for (int64_t c = 0; c < w.cols; c += kLanes)
        std::copy_n(from + c, std::min<int64_t>(kLanes, w.cols - c),
                    digits.data() + n * size + (c * Q + q * kLanes));
    }
    centers[n] = center;
  }
  const int64_t step = item_rows(w.rows, w.cols, 1, pool.num_threads());
  parallel(pool, divide_up(w.rows, step), [&](int64_t item) {
    const int64_t end = std::min(w.rows, (item + 1) * step);
    auto finish = [&](int64_t n, int64_t row, float value) {
      y[n * w.rows + row] = (value - centers[n]) * x_scales[n] * half_to_float(w.scales[row]);
    };
    int64_t row = item * step;
    for (; row + T <= end; row += T)
      for (int64_t n = 0; n < batch; n++) {
        float values[T];
        int8_tile<T, Q>(w, digits.data() + n * size, row, values);
        for (int t = 0; t < T; t++) finish(n, row + t, values[t]);
      }
    for (; row < end; row++)
      for (int64_t n = 0; n < batch; n++) {
        float values[1];
        int8_tile<1, Q>(w, digits.data() + n * size, row, values);
        finish(n, row, values[0]);
      }
  });
}

}  // namespace
