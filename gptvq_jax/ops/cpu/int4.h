// What vector quantization is compared with, in the same style: products with 4-bit integers in
// groups of 128 columns, activations rounded to int8 with one scale for a row of x.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.h"
#include "parallel.h"
#include "simd.h"

namespace {

// W[r, c] = scale[r, c / 128] * (code - 8), the even column of a pair in the low bits of its byte.
struct Int4 {
  static constexpr int64_t kGroup = 128;
  int64_t rows, cols, groups;
  const uint8_t* codes;
  const uint16_t* scales;  // (R, C / 128) float16
};

// Rows of x in the order of the codes: even columns of two vectors, then odd ones.
struct Int4Activations {
  Int4Activations(const Int4& w, const float* x, int64_t batch)
      : values(batch * w.cols), scales(batch), starts(batch * w.groups * kIntLanes) {
    std::vector<int8_t> rounded(w.cols);
    for (int64_t n = 0; n < batch; n++) {
      int8_t* to = values.data() + n * w.cols;
      scales[n] = round_row<1>(x + n * w.cols, w.cols, rounded.data(), w.cols);
      for (int64_t c = 0; c < w.cols; c += 2 * kLanes)
        for (int odd = 0; odd < 2; odd++)
          for (int i = 0; i < kLanes; i++) to[c + odd * kLanes + i] = rounded[c + 2 * i + odd];
      for (int64_t g = 0; g < w.groups; g++, to += Int4::kGroup)
        begin_sum(Int4::kGroup, &starts[(n * w.groups + g) * kIntLanes],
                  [&](Ints sum, int64_t i) { return dot(sum, fill(8), load(to + i)); });
    }
  }
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> starts;  // minus 8 times the x of a lane
};

// y for T rows of W from `row` on and one row of x; `scales` is room for T rows of them.
template <int T>
[[gnu::noinline]] void int4_tile(const Int4& w, const int8_t* x, const int32_t* start,
                                 float x_scale, int64_t row, float* scales, float* y) {
  Floats total[T];
  for (Floats& value : total) value = zero();
  half_to_floats(w.scales + row * w.groups, T * w.groups, scales);
  const int64_t row_bytes = w.cols / 2;
  const uint8_t* p = w.codes + row * row_bytes;
  const int8_t* const end = x + w.cols;
  for (; x < end; start += kIntLanes, x += Int4::kGroup, scales++) {
    Ints sum[T];
    for (Ints& value : sum) value = load_ints(start);
    for (int i = 0; i < Int4::kGroup; i += 2 * kLanes, p += kLanes) {
      const Bytes even = load(x + i), odd = load(x + i + kLanes);
      for (int t = 0; t < T; t++) {
        __builtin_prefetch(p + (2 * T + t) * row_bytes);  // of the rows that come next
        const Bytes packed = load(p + t * row_bytes);
        sum[t] = dot_nibbles(sum[t], mask(packed, 4), even, mask(shift(packed, 4), 4), odd);
      }
    }
    for (int t = 0; t < T; t++) total[t] = fma(to_float(sum[t]), scales[t * w.groups], total[t]);
  }
  for (int t = 0; t < T; t++) y[t] = x_scale * sum(total[t]);
}

template <class Pool>
void int4_product(const Int4& w, const float* x, int64_t batch, Pool& pool, float* y) {
  const Int4Activations rounded(w, x, batch);
  const int64_t step = item_rows(w.rows, w.cols, 1, pool.num_threads());
  parallel(pool, divide_up(w.rows, step), [&](int64_t item) {
    const int64_t last = std::min(w.rows, (item + 1) * step);
    std::vector<float> scales(4 * w.groups);
    for (int64_t n = 0; n < batch; n++) {
      const int8_t* of_x = rounded.values.data() + n * w.cols;
      const int32_t* start = rounded.starts.data() + n * w.groups * kIntLanes;
      float* to = y + n * w.rows;
      int64_t row = item * step;
      for (; row + 4 <= last; row += 4)
        int4_tile<4>(w, of_x, start, rounded.scales[n], row, scales.data(), to + row);
      for (; row < last; row++)
        int4_tile<1>(w, of_x, start, rounded.scales[n], row, scales.data(), to + row);
    }
  });
}

}  // namespace
