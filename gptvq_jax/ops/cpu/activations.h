// Activations as the kernels of products.h and batch.h read them: rounded to int8, in the order in
// which weights come out of the tables, with a scale for every block of columns.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "packed.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr float kBase = 254;  // of activations in several digits: half of it is a digit
// Of those multiplied with tables: where products are added in pairs in 16 bits, a digit of several
// is at most half of what a pair may reach; of one digit a pair's sum, before rounding, one less.
template <int Q>
constexpr int kLargest = !kPairLimit ? 127 : Q > 1 ? kPairLimit / 2 : kPairLimit - 1;
template <int Q>
constexpr float kTableBase = 2 * kLargest<Q>;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// What is rounded to the largest digit: the largest activation, or, of one digit where `pairs` are
// added in 16 bits, the largest sum of the activations of one sign in a pair. Positive floats are
// ordered as their bits are; a NaN or infinity comes out as it is.
inline float bound_of(const float* x, int64_t count, bool pairs) {
  uint32_t peak = 0;
  if (pairs)
    for (int64_t i = 0; i + 1 < count; i += 2) {
      const float a = x[i], b = x[i + 1], c = (a > 0 ? a : 0) + (b > 0 ? b : 0);
      const float d = (a < 0 ? -a : 0) + (b < 0 ? -b : 0);  // neither is negative
      const uint32_t above = bits_of(c), below = bits_of(d);
      peak = std::max(peak, above > below ? above : below);
    }
  for (int64_t i = 0; i < count; i++) peak = std::max(peak, bits_of(x[i]) & 0x7fffffffu);
  float bound;
  std::memcpy(&bound, &peak, 4);
  return bound;
}

// Rounds activations to Q digits, x = scale (q[0] + q[1] / base + q[2] / base^2), the first at most
// `largest`, and returns the scale. Rounding by adding 1.5 x 2^23 is to the nearest, and makes
// vectors of it. A NaN or infinity as the bound makes the scale one, and so all products.
template <int Q>
float round_to_digits(const float* x, int64_t count, float bound, int largest, float base,
                      int8_t* digits, int64_t next) {
  const float inverse = bound > 1e-36f ? largest / bound : 0;  // the quotient must be finite
  for (int64_t i = 0; i < count; i++) {
    float rest = x[i] * inverse;
    for (int q = 0; q < Q; q++) {
      const float shifted = rest + 12582912.0f, digit = shifted - 12582912.0f;
      digits[q * next + i] = static_cast<int8_t>(static_cast<int>(digit));
      rest = (rest - digit) * base;
    }
  }
  return bound / largest;
}
// A row with one scale.
template <int Q>
float round_row(const float* x, int64_t count, int8_t* digits) {
  return round_to_digits<Q>(x, count, bound_of(x, count, false), 127, kBase, digits, count);
}

inline Ints load_ints(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What sums over `count` activations begin with where weights are `bias` too large: minus what that
// adds to each lane, kIntLanes numbers.
constexpr int kIntLanes = sizeof(Ints) / 4;
inline void begin_sum(const int8_t* x, int64_t count, uint8_t bias, int32_t* start) {
  Ints added = zero_ints();
  for (int64_t i = 0; bias && i < count; i += kLanes)
    added = dot_table(added, simd::fill(bias), load(x + i));
  added = sub(zero_ints(), added);
  std::memcpy(start, &added, sizeof added);
}

// Columns that share a scale, if a chunk has no more: it costs little in 256 of them. Where pairs
// limit it, a pair of large activations should cost the precision of few others.
constexpr int64_t kBlockCols = kPairLimit ? 64 : 256;

// Rows of x as Q rows of digits each. A row is strip after strip, a strip whole chunks, of which
// each has kLanes values for each d of each of the P vectors of codes, or, where entries are looked
// up whole, values as they are; 0 beyond the strip. A strip is one block or several.
template <int Q>
class Digits {
 public:
  // `chunk_cols`: P D kLanes. `whole`: entries are looked up whole.
  template <class Pool>
  Digits(const Format& f, int64_t chunk_cols, bool whole, const float* x, int64_t rows, Pool& pool)
      : strip_size(divide_up(f.strip_cols, chunk_cols) * chunk_cols),
        row_size(f.col_strips * strip_size),
        block_size(std::max<int64_t>(1, kBlockCols / chunk_cols) * chunk_cols),
        blocks(f.col_strips * divide_up(strip_size, block_size)),
        chunk_cols(chunk_cols),
        whole(whole),
        values(divide_up(rows * Q * row_size, sizeof(Line))),
        scales(rows * blocks),
        starts(rows * Q * blocks * kIntLanes) {
    parallel(pool, rows, [&](int64_t n) { round(f, x + n * f.cols, n); });
  }
  // The first digits; those of the next begin row_size values on.
  const int8_t* row(int64_t n) const { return values.data()->at + n * Q * row_size; }
  const float* row_scales(int64_t n) const { return scales.data() + n * blocks; }
  const int32_t* row_starts(int64_t n) const { return starts.data() + n * Q * blocks * kIntLanes; }

  const int64_t strip_size, row_size;  // values
  const int64_t block_size;            // values that share a scale
  const int64_t blocks;  // of a row

 private:
  void round(const Format& f, const float* x, int64_t n) {
    std::vector<float> ordered(strip_size);
    float* scale = scales.data() + n * blocks;
    int32_t* start = starts.data() + n * Q * blocks * kIntLanes;
    for (int64_t s = 0; s < f.col_strips; s++) {
      order(f, s, x, ordered.data());
      for (int64_t i = 0, size; i < strip_size; i += size, scale++, start += kIntLanes) {
        size = std::min(block_size, strip_size - i);
        int8_t* to = values.data()->at + n * Q * row_size + s * strip_size + i;
        const float bound = bound_of(ordered.data() + i, size, kPairLimit && Q == 1);
        *scale = round_to_digits<Q>(ordered.data() + i, size, bound, kLargest<Q>, kTableBase<Q>, to,
                                    row_size);
        for (int q = 0; q < Q; q++)
          begin_sum(to + q * row_size, size, kTableBias, start + q * blocks * kIntLanes);
      }
    }
  }
  void order(const Format& f, int64_t s, const float* x, float* to) const {
    const float* from = x + s * f.strip_cols;
    const int64_t count = f.cols_in(s);
    if (whole) {
      std::copy_n(from, count, to);
      std::fill(to + count, to + strip_size, 0.f);
      return;
    }
    const int64_t together = chunk_cols / kLanes;  // P D values of the codes of a lane
    for (int64_t first = 0; first < strip_size; first += chunk_cols, to += chunk_cols)
      for (int lane = 0; lane < kLanes; lane++) {
        const int64_t c = first + code_at(f.bits, lane) * together;
        for (int64_t i = 0; i < together; i++)
          to[i * kLanes + lane] = c + i < count ? from[c + i] : 0;
      }
  }
  struct alignas(64) Line { int8_t at[64]; };  // so that no vector straddles two
  const int64_t chunk_cols;
  const bool whole;
  std::vector<Line> values;
  std::vector<float> scales;    // row after row, block after block
  std::vector<int32_t> starts;  // digit after digit within a row
};

}  // namespace
