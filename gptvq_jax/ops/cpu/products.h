// Products with packed weights: y[n, r] = sum_c x[n, c] W[r, c].
//
// The codes of a row are unpacked a vector of bytes at a time and looked up, one table for each of
// the D inputs of a code, in tables that stay in registers for the rows of a group. The int8
// centroids found are multiplied with activations laid out in the same order, and the sum over a
// column strip with the scale of its codebook. Activations are int8 with one scale for a row of x:
// one digit for each of them, or three digits to the base 254, which are as exact as float32.
// Beside it, in the same style, what it is compared with: 4-bit integers in groups of 128.
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

// Rounds a row of x to Q digits, x = scale (q[0] + q[1] / 254 + q[2] / 254^2), of -127 to 127, and
// returns the scale. Rounding by adding 1.5 x 2^23 is to the nearest, and makes vectors of it.
// A NaN or infinity makes the scale one, and so all products of the row.
template <int Q>
float round_row(const float* x, int64_t count, int8_t* digits) {
  uint32_t peak_bits = 0;  // of positive floats: ordered as they are
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    peak_bits = std::max(peak_bits, bits & 0x7fffffffu);
  }
  float peak;
  std::memcpy(&peak, &peak_bits, 4);
  const float inverse = peak > 1e-36f ? 127 / peak : 0;  // the quotient must be finite
  for (int64_t i = 0; i < count; i++) {
    float rest = x[i] * inverse;
    for (int q = 0; q < Q; q++) {
      const float shifted = rest + 12582912.0f, digit = shifted - 12582912.0f;
      digits[q * count + i] = static_cast<int8_t>(static_cast<int>(digit));
      rest = (rest - digit) * kBase;
    }
  }
  return peak / 127;
}

// What sums over `count` activations begin with where weights are `bias` too large: minus what that
// adds to each lane, kIntLanes numbers.
constexpr int kIntLanes = sizeof(Ints) / 4;
inline void begin_sum(const int8_t* x, int64_t count, uint8_t bias, int32_t* start) {
  Ints added = zero_ints();
  for (int64_t i = 0; bias && i < count; i += kLanes)
    added = dot(added, simd::fill(bias), load(x + i));
  added = sub(zero_ints(), added);
  std::memcpy(start, &added, sizeof added);
}

// Activations in the order in which weights come out of the tables: for every row of x and column
// strip, chunk after chunk, kLanes values for each d of each of the P vectors, or, where entries
// are looked up whole, as they are; 0 beyond the strip.
template <class T, int B, int D, int P>
class Activations {
 public:
  static constexpr int kChunkCols = P * D * kLanes;
  Activations(const Format& f, int64_t rows)
      : strip_size(divide_up(f.strip_cols, kChunkCols) * kChunkCols),
        row_size(f.col_strips * strip_size),
        values(rows * row_size) {}
  const T* row(int64_t n) const { return values.data() + n * row_size; }

  void set(const Format& f, int64_t n, const T* x) {
    for (int64_t s = 0; s < f.col_strips; s++) {
      T* to = values.data() + n * row_size + s * strip_size;
      const T* from = x + s * f.strip_cols;
      int64_t left = f.cols_in(s);
      for (; left > 0; left -= kChunkCols, from += kChunkCols, to += kChunkCols) {
        T padded[kChunkCols] = {};
        if (left < kChunkCols) std::copy_n(from, left, padded);
        const T* chunk = left < kChunkCols ? padded : from;
        if constexpr (whole_entries(B, D)) std::copy_n(chunk, kChunkCols, to);
        else
          for (int i = 0; i < P * D; i++)
            for (int lane = 0; lane < kLanes; lane++)
              to[i * kLanes + lane] = chunk[lane * P * D + i];
      }
    }
  }
  const int64_t strip_size, row_size;

 private:
  std::vector<T> values;
};

// Rows of x as Q rows of digits each, and what sums of them begin with: minus what the bias of the
// tables adds to each lane of a strip.
template <int Q, int B, int D, int P>
struct Digits {
  Digits(const Format& f, const float* from, int64_t rows)
      : x(f, rows * Q), scales(rows), starts(rows * Q * f.col_strips * kIntLanes) {
    std::vector<int8_t> digits(Q * f.cols);
    int32_t* start = starts.data();
    for (int64_t n = 0; n < rows; n++) {
      scales[n] = round_row<Q>(from + n * f.cols, f.cols, digits.data());
      for (int64_t row = n * Q, q = 0; q < Q; q++, row++) {
        x.set(f, row, digits.data() + q * f.cols);
        for (int64_t s = 0; s < f.col_strips; s++, start += kIntLanes)
          begin_sum(x.row(row) + s * x.strip_size, x.strip_size, kBias, start);
      }
    }
  }
  Activations<int8_t, B, D, P> x;
  std::vector<float> scales;
  std::vector<int32_t> starts;  // row after row, strip after strip
};

// What a vector of codes stands for, d-th of D vectors, in the tables of a strip.
template <int B, int D>
struct Weights {
  Weights(const uint8_t* plane, int d) : table(plane + (d << B)) {}
  Bytes operator()(Bytes code) const { return table(code); }
  const Table<B> table;
};
template <int B, int D>
  requires(whole_entries(B, D))
struct Weights<B, D> {
  Weights(const uint8_t* plane, int d) : plane(plane), d(d) {}
  Bytes operator()(Bytes code) const { return gather<D>(plane, code, d); }
  const uint8_t* plane;
  const int d;
};

// Products of T rows of W, of one row strip, with N rows of x from `batch` on: y[t * N + n].
template <int T, int N, int Q, int B, int D, int P>
[[gnu::noinline]] void tile(const Format& f, const Digits<Q, B, D, P>& digits,
                            const Reader<P>& read, const Planes<B, D>& planes, const Rows rows,
                            int64_t batch, float* y) {
  Floats total[T][N];
  for (auto& of_row : total)
    for (Floats& value : of_row) value = zero();
  const int64_t strip_size = digits.x.strip_size, row_size = digits.x.row_size, step = read.step;
  const int64_t next_row = f.col_strips * kIntLanes;  // of starts
  const uint8_t* plane = planes.first_plane();
  const float* scale = planes.first_scale();
  for (int64_t m = 0; m < f.books; m++) {
    const int8_t* x = digits.x.row(batch * Q);
    const int8_t* const x_end = x + row_size;
    const int32_t* start = digits.starts.data() + batch * Q * next_row;
    const uint8_t* strip = rows.first + m * rows.book;
    for (; x < x_end; strip += rows.strip, plane += D << B, scale++, start += kIntLanes) {
      Ints sum[T][N * Q];
      for (int t = 0; t < T; t++)
        for (int n = 0; n < N * Q; n++) std::memcpy(&sum[t][n], start + n * next_row, sizeof(Ints));
      const uint8_t* p = strip;
      const int8_t* const strip_end = x + strip_size;
      do {
        Bytes found[T][P];
        for (int t = 0; t < T; t++) {
          read(p + t * rows.row, found[t]);
          __builtin_prefetch(p + (4 * T + t) * rows.row);  // of the rows that come next
        }
        for (int i = 0; i < P; i++)
          for (int d = 0; d < D; d++, x += kLanes) {
            const Weights<B, D> weights(plane, d);
            Bytes input[N * Q];
            for (int n = 0; n < N * Q; n++) input[n] = keep(load(x + n * row_size));
            for (int t = 0; t < T; t++) {
              const Bytes weight = weights(found[t][i]);
              for (int n = 0; n < N * Q; n++) sum[t][n] = dot(sum[t][n], weight, input[n]);
            }
          }
        p += step;
      } while (x < strip_end);
      for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
          Floats value = to_float(sum[t][n * Q + Q - 1]);
          for (int q = Q - 2; q >= 0; q--)
            value = fma(value, 1 / kBase, to_float(sum[t][n * Q + q]));
          total[t][n] = fma(value, *scale, total[t][n]);
        }
    }
  }
  for (int t = 0; t < T; t++)
    for (int n = 0; n < N; n++) y[t * N + n] = digits.scales[batch + n] * sum(total[t][n]);
}

// y of rows [row, end) of W, of one row strip, and N rows of x.
template <int N, int Q, int B, int D, int P>
void tiles(const Format& f, const Digits<Q, B, D, P>& digits, const Reader<P>& read,
           CodeRows& codes, const Planes<B, D>& planes, int64_t row, int64_t end, int64_t batch,
           float* y) {
  constexpr int T = 4;
  float part[T * N];
  for (int64_t count; row < end; row += count) {
    count = end - row >= T ? T : 1;
    const Rows rows = codes.rows(row, count);
    if (count == T) tile<T, N>(f, digits, read, planes, rows, batch, part);
    else tile<1, N>(f, digits, read, planes, rows, batch, part);
    for (int64_t t = 0; t < count; t++)
      for (int n = 0; n < N; n++) y[(batch + n) * f.rows + row + t] = part[t * N + n];
  }
}

template <int Q, int B, int D, int P, class Pool>
void product(const Format& f, const float* x, int64_t batch, Pool& pool, float* y) {
  const Digits<Q, B, D, P> digits(f, x, batch);
  const Reader<P> read(f);
  const int64_t step = item_rows(f.rows, f.cols, f.strip_rows, pool.num_threads());
  parallel(pool, divide_up(f.rows, step), [&](int64_t item) {
    Planes<B, D> planes(f, kBias);
    CodeRows codes(f, D * Reader<P>::kChunk, read.step);
    const int64_t last = std::min(f.rows, (item + 1) * step);
    for (int64_t row = item * step, end; row < last; row = end) {
      end = std::min(last, (row / f.strip_rows + 1) * f.strip_rows);
      planes.seek(row / f.strip_rows);
      int64_t n = 0;
      if constexpr (Q == 1)  // of more digits, there are not the registers for more rows
        for (; n + 4 <= batch; n += 4) tiles<4>(f, digits, read, codes, planes, row, end, n, y);
      for (; n < batch; n++) tiles<1>(f, digits, read, codes, planes, row, end, n, y);
    }
  });
}

// W[r, c] = scale[r, c / 128] * (code - 8), the even column of a pair in the low bits of its byte.
// Activations are int8 as above, and in the order of the codes: P = 2.
struct Int4 {
  static constexpr int64_t kGroup = 128;
  int64_t rows, cols, groups;
  const uint8_t* codes;
  const uint16_t* scales;  // (R, C / 128) float16
};

// y for T rows of W from `row` on and one row of x; `scales` is room for T rows of them.
template <int T>
void int4_tile(const Int4& w, const int8_t* x, const int32_t* starts, float x_scale, int64_t row,
               float* scales, float* y) {
  Floats total[T];
  for (Floats& value : total) value = zero();
  for (int t = 0; t < T; t++)
    for (int64_t g = 0; g < w.groups; g++)
      scales[t * w.groups + g] = half_to_float(w.scales[(row + t) * w.groups + g]);
  for (int64_t g = 0; g < w.groups; g++, starts += kIntLanes, x += Int4::kGroup) {
    Ints sum[T];
    for (int t = 0; t < T; t++) std::memcpy(&sum[t], starts, sizeof sum[t]);
    for (int i = 0; i < Int4::kGroup; i += 2 * kLanes) {
      const Bytes even = load(x + i), odd = load(x + i + kLanes);
      for (int t = 0; t < T; t++) {
        const uint8_t* p = w.codes + ((row + t) * w.cols + g * Int4::kGroup + i) / 2;
        __builtin_prefetch(p + 2 * T * w.cols / 2);  // of the rows that come next
        const Bytes packed = load(p);
        sum[t] = dot_nibbles(sum[t], mask(packed, 4), even);
        sum[t] = dot_nibbles(sum[t], mask(shift(packed, 4), 4), odd);
      }
    }
    for (int t = 0; t < T; t++)
      total[t] = fma(to_float(sum[t]), scales[t * w.groups + g], total[t]);
  }
  for (int t = 0; t < T; t++) y[row + t] = x_scale * sum(total[t]);
}

template <class Pool>
void int4_product(const Int4& w, const float* x, int64_t batch, Pool& pool, float* y) {
  std::vector<int8_t> ordered(batch * w.cols), rounded(w.cols);
  std::vector<float> x_scale(batch);
  std::vector<int32_t> starts(batch * w.groups * kIntLanes);  // minus 8 times the x of a lane
  for (int64_t n = 0; n < batch; n++) {
    int8_t* to = ordered.data() + n * w.cols;
    x_scale[n] = round_row<1>(x + n * w.cols, w.cols, rounded.data());
    for (int64_t c = 0; c < w.cols; c += 2 * kLanes)
      for (int odd = 0; odd < 2; odd++)
        for (int i = 0; i < kLanes; i++) to[c + odd * kLanes + i] = rounded[c + 2 * i + odd];
    for (int64_t g = 0; g < w.groups; g++)
      begin_sum(to + g * Int4::kGroup, Int4::kGroup, 8, &starts[(n * w.groups + g) * kIntLanes]);
  }
  const int64_t step = item_rows(w.rows, w.cols, 1, pool.num_threads());
  parallel(pool, divide_up(w.rows, step), [&](int64_t item) {
    const int64_t last = std::min(w.rows, (item + 1) * step);
    std::vector<float> scales(4 * w.groups);
    for (int64_t n = 0; n < batch; n++) {
      const int8_t* of_x = ordered.data() + n * w.cols;
      const int32_t* start = starts.data() + n * w.groups * kIntLanes;
      int64_t row = item * step;
      for (; row + 4 <= last; row += 4)
        int4_tile<4>(w, of_x, start, x_scale[n], row, scales.data(), y + n * w.rows);
      for (; row < last; row++)
        int4_tile<1>(w, of_x, start, x_scale[n], row, scales.data(), y + n * w.rows);
    }
  });
}

}  // namespace
