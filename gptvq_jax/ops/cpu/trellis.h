// Products with trellis-coded weights (core/trellis_tensor.py): a column's streams are decoded one
// after the other, and added to the outputs of their rows. Columns of rate 0 are not read.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace {

struct TrellisFormat {
  int64_t rows, cols, stream_rows, bits, num_bytes;
  const uint8_t* codes;
  const int32_t* rates;    // (C,)
  const int32_t* offsets;  // (cuts, C): where in codes a stream begins
  const float *table, *row_scales, *col_scales;
  int64_t num_outliers;
  const int32_t *outlier_rows, *outlier_cols;
  const float* outlier_values;

  int64_t cuts() const { return divide_up(rows, stream_rows); }
  int64_t stream_bytes(int64_t rate) const { return divide_up(stream_rows * rate, 8); }

  // Whether nothing lies outside of the arrays.
  bool consistent() const {
    for (int64_t i = 0; i < cuts() * cols; i++) {
      const int64_t rate = rates[i % cols];
      if (rate < 0 || rate > std::min<int64_t>(6, bits)) return false;
      if (rate && (offsets[i] < 0 || offsets[i] + stream_bytes(rate) > num_bytes)) return false;
    }
    for (int64_t i = 0; i < num_outliers; i++)
      if (outlier_rows[i] < 0 || outlier_rows[i] >= rows || outlier_cols[i] < 0 ||
          outlier_cols[i] >= cols)
        return false;
    return true;
  }
};

// The bits of a stream, and behind them its first 32 once more.
inline void bite_tail(const uint8_t* stream, int64_t num_bits, std::vector<uint8_t>& whole) {
  const int64_t bytes = divide_up(num_bits, 8), full = num_bits / 8, shift = num_bits % 8;
  whole.assign(bytes + 12, 0);
  std::memcpy(whole.data(), stream, bytes);
  if (shift) whole[full] &= (1 << shift) - 1;
  uint64_t first = 0;
  std::memcpy(&first, whole.data(), std::min<int64_t>(4, bytes));
  uint64_t there;
  std::memcpy(&there, &whole[full], 8);
  there |= first << shift;
  std::memcpy(&whole[full], &there, 8);
}

template <int RATE>
void decode_stream(const uint8_t* stream, const float* table, uint32_t mask, int64_t count,
                   float* values) {
  for (int64_t r = 0; r < count; r++) {
    uint32_t word;
    std::memcpy(&word, stream + r * RATE / 8, 4);
    values[r] = table[word >> r * RATE % 8 & mask];
  }
}

template <class Pool>
void trellis_product(const TrellisFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  constexpr decltype(&decode_stream<1>) kDecode[] = {decode_stream<1>, decode_stream<2>,
                                                     decode_stream<3>, decode_stream<4>,
                                                     decode_stream<5>, decode_stream<6>};
  const uint32_t mask = (1u << f.bits) - 1;
  parallel(pool, f.cuts(), [&](int64_t cut) {
    const int64_t first = cut * f.stream_rows, count = std::min(f.stream_rows, f.rows - first);
    std::vector<float> sums(batch * count, 0.f), values(count);
    std::vector<uint8_t> whole;
    for (int64_t j = 0; j < f.cols; j++) {
      const int64_t rate = f.rates[j];
      if (!rate) continue;
      bite_tail(f.codes + f.offsets[cut * f.cols + j], f.stream_rows * rate, whole);
      kDecode[rate - 1](whole.data(), f.table, mask, count, values.data());
      for (int64_t n = 0; n < batch; n++) {
        const float factor = x[n * f.cols + j] * f.col_scales[j];
        float* __restrict sum = &sums[n * count];
        for (int64_t r = 0; r < count; r++) sum[r] += factor * values[r];
      }
    }
    for (int64_t n = 0; n < batch; n++)
      for (int64_t r = 0; r < count; r++)
        y[n * f.rows + first + r] = sums[n * count + r] * f.row_scales[first + r];
  });
  for (int64_t n = 0; n < batch; n++)
    for (int64_t i = 0; i < f.num_outliers; i++)
      y[n * f.rows + f.outlier_rows[i]] += x[n * f.cols + f.outlier_cols[i]] * f.outlier_values[i];
}

}  // namespace
