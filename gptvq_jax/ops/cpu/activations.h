// Activations as the kernels of products.h and batch.h read them: rounded to bytes, in the order in
// which weights come out of the tables, with a scale for every block of columns.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "packed.h"
#include "parallel.h"
#include "simd.h"

namespace {

constexpr float kBase = 254;  // of activations in several digits: half of it is a digit

// The largest magnitude, which is rounded to the largest digit. Positive floats are ordered as
// their bits are; a NaN or infinity comes out as it is.
inline float bound_of(const float* x, int64_t count) {
  uint32_t peak = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    peak = std::max(peak, bits & 0x7fffffffu);
  }
  float bound;
  std::memcpy(&bound, &peak, 4);
  return bound;
}

// Rounds activations to Q rows of digits of -127 to 127, each `next` behind the one before:
// x = scale (q[0] + q[1] / base + q[2] / base^2). Returns the scale. Rounding by adding 1.5 x 2^23
// is to the nearest, and makes vectors of it. A NaN or infinity makes the scale one, and so all
// products. With `signs`, digits are stored as magnitudes, and behind the Q rows are Q of their
// signs: 255 where a digit is negative, and 0 elsewhere.
template <int Q, bool signs = false>
float round_row(const float* x, int64_t count, int8_t* digits, int64_t next) {
  const float bound = bound_of(x, count);
  const float inverse = bound > 1e-36f ? 127 / bound : 0;  // the quotient must be finite
  for (int64_t i = 0; i < count; i++) {
    float rest = x[i] * inverse;
    for (int q = 0; q < Q; q++) {
      const float shifted = rest + 12582912.0f, digit = shifted - 12582912.0f;
      const int value = static_cast<int>(digit);
      digits[q * next + i] = static_cast<int8_t>(signs ? std::abs(value) : value);
      if (signs) digits[(Q + q) * next + i] = static_cast<int8_t>(value >> 31);
      rest = (rest - digit) * kBase;
    }
  }
  return bound / 127;
}

inline Ints load_ints(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// What sums over `count` activations begin with, kIntLanes numbers: minus what weights of 0 add, as
// `add(sum, i)` has them for those from i on.
constexpr int kIntLanes = sizeof(Ints) / 4;
template <class Add>
void begin_sum(int64_t count, int32_t* start, Add&& add) {
  Ints added = zero_ints();
  for (int64_t i = 0; i < count; i += kLanes) added = add(added, i);
  added = sub(zero_ints(), added);
  std::memcpy(start, &added, sizeof added);
}

// Columns that share a scale, if a chunk has no more: it costs little in so many of them.
constexpr int64_t kBlockCols = 256;

// Whether one digit is enough for every row of x: whether rounding blocks of kBlockCols moves it by
// less than kMoved of its norm. It moves normal numbers by 0.7 %. A few large activations among many
// small ones, as models have them before some layers, would cost the small ones: such rows get
// several digits. A NaN or infinity is no reason to: all of its products are one.
constexpr float kMoved = 0.01f;
inline bool one_digit_will_do(const float* x, int64_t rows, int64_t cols) {
  for (int64_t n = 0; n < rows; n++, x += cols) {
    float moved = 0, lanes[16] = {};
    for (int64_t c = 0; c < cols; c += kBlockCols) {
      const int64_t count = std::min(kBlockCols, cols - c);
      const float step = bound_of(x + c, count) / 127;
      moved += step * step / 12 * count;
      int64_t i = c;
      for (; i + 16 <= c + count; i += 16)
        for (int lane = 0; lane < 16; lane++) lanes[lane] += x[i + lane] * x[i + lane];
      for (; i < c + count; i++) lanes[0] += x[i] * x[i];
    }
    float whole = 0;
    for (const float lane : lanes) whole += lane;
    if (moved > kMoved * kMoved * whole) return false;
  }
  return true;
}

// Rows of x as Q rows of digits each, and Q of their signs where kMagnitudes. A row is strip after
// strip, a strip whole chunks, of which each has kLanes values for each d of each of the P vectors
// of codes, or, where entries are looked up whole, values as they are; 0 beyond the strip. A strip
// is one block or several.
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
        values(divide_up(rows * next_row(), sizeof(Line))),
        scales(rows * blocks),
        starts(rows * Q * blocks * kIntLanes) {
    parallel(pool, rows, [&](int64_t n) { round(f, x + n * f.cols, n); });
  }
  // The first digits; every row behind them begins row_size values on.
  const int8_t* row(int64_t n) const { return values.data()->at + n * next_row(); }
  int64_t next_row() const { return (kMagnitudes ? 2 : 1) * Q * row_size; }
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
        int8_t* to = values.data()->at + n * next_row() + s * strip_size + i;
        *scale = round_row<Q, kMagnitudes>(ordered.data() + i, size, to, row_size);
        for (int q = 0; q < Q && (kTableBias || kMagnitudes); q++)
          begin_sum(size, start + q * blocks * kIntLanes, [&](Ints sum, int64_t at) {
            const int8_t* digit = to + q * row_size + at;
            return dot_table(sum, with_signs(fill(kTableBias), digit + Q * row_size), load(digit));
          });
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
    std::vector<float> last;                       // a chunk that the strip does not fill
    for (int64_t first = 0; first < strip_size; first += chunk_cols, to += chunk_cols) {
      const float* chunk = from + first;
      if (first + chunk_cols > count) {
        last.assign(chunk_cols, 0);
        if (first < count) std::copy_n(chunk, count - first, last.data());
        chunk = last.data();
      }
      if (together == 2) spread<2>(f.bits, chunk, to);
      else if (together == 4) spread<4>(f.bits, chunk, to);
      else
        for (int64_t i = 0; i < together; i++)
          for (int lane = 0; lane < kLanes; lane++)
            to[i * kLanes + lane] = chunk[code_at(f.bits, lane) * together + i];
    }
  }
  // A chunk with its number of values to a lane known, so that compilers make vectors of it.
  template <int N>
  static void spread(int bits, const float* from, float* __restrict to) {
    for (int lane = 0; lane < kLanes; lane++)
      for (int i = 0; i < N; i++) to[i * kLanes + lane] = from[code_at(bits, lane) * N + i];
  }
  struct alignas(64) Line { int8_t at[64]; };  // so that no vector straddles two
  const int64_t chunk_cols;
  const bool whole;
  std::vector<Line> values;
  std::vector<float> scales;    // row after row, block after block
  std::vector<int32_t> starts;  // digit after digit within a row
};

}  // namespace
