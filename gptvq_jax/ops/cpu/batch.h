// Products with many rows of x: the bytes of a few rows of W are looked up once, and stay in the
// caches while all rows of x are multiplied with them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "activations.h"
#include "packed.h"
#include "simd.h"

namespace {

constexpr int64_t kDecodeOnce = 4;  // rows of x from which on it pays

// What a vector of codes stands for, d-th of D vectors, in the tables of a strip.
template <int B, int D>
struct Weights {
  Weights(const uint8_t* plane, int d) : table(plane + (d << B)) {}
  Bytes operator()(Bytes code) const { return table(code); }
  const Lookup<B> table;
};
template <int B, int D>
  requires(whole_entries(B, D))
struct Weights<B, D> {
  Weights(const uint8_t* plane, int d) : plane(plane), d(d) {}
  Bytes operator()(Bytes code) const { return gather<D>(plane, code, d); }
  const uint8_t* plane;
  const int d;
};

// The value of a sum over Q digits.
template <int Q>
Floats digits_to_float(const Ints (&sum)[Q]) {
  Floats value = to_float(sum[Q - 1]);
  for (int q = Q - 2; q >= 0; q--) value = fma(value, 1 / kBase, to_float(sum[q]));
  return value;
}

// Of several row strips in turn, so that its memory is taken once.
template <int Q>
class DecodedRows {
 public:
  DecodedRows(const Format& f, const Digits<Q>& digits, int64_t batch)
      : f(f), digits(digits), batch(batch), bytes(f.books * digits.row_size * kRows) {}

  // y of rows [row, end) of W, of one row strip, and all rows of x.
  template <int B, int D, int P>
  void products(const Reader<B, P>& read, CodeRows& codes, const Planes<B, D>& planes, int64_t row,
                int64_t end, float* y) {
    for (int64_t count; row < end; row += count) {
      count = std::min(kRows, end - row);
      const Rows rows = codes.rows(row, count);
      for (int64_t t = 0; t < count; t++) decode<B, D, P>(read, planes, rows, t);
      const float* scale = planes.first_scale();
      int64_t n = 0;
      for (; n + kTogether <= batch; n += kTogether) dots<kTogether>(scale, n, count, y + row);
      for (; n < batch; n++) dots<1>(scale, n, count, y + row);
    }
  }

 private:
  static constexpr int64_t kRows = 4;
  // Rows of x at a time: what registers hold sums of, 32 of 64 bytes or of Arm, 16 of 32 bytes.
  static constexpr int kTogether = std::max(1, (kFewRegisters ? 2 : 4) / (Q > 1 ? 2 : 1));

  // The weights of the t-th row in the order of activations, vectors of kRows rows side by side.
  template <int B, int D, int P>
  [[gnu::noinline]] void decode(const Reader<B, P>& read, const Planes<B, D>& planes,
                                const Rows rows, int64_t t) {
    const uint8_t* plane = planes.first_plane();
    uint8_t* to = bytes.data() + t * kLanes;
    for (int64_t m = 0; m < f.books; m++)
      for (int64_t s = 0; s < f.col_strips; s++, plane += D << B) {
        const uint8_t* p = rows.first + m * rows.book + s * rows.strip + t * rows.row;
        for (int64_t c = 0; c < digits.strip_size; c += P * D * kLanes, p += read.step) {
          Bytes found[P];
          read(p, found);
          for (int i = 0; i < P; i++)
            for (int d = 0; d < D; d++, to += kRows * kLanes)
              store(to, Weights<B, D>(plane, d)(found[i]));
        }
      }
  }

  // y of the first `count` decoded rows and N rows of x from n on.
  template <int N>
  [[gnu::noinline]] void dots(const float* scale, int64_t n, int64_t count, float* y) const {
    constexpr int T = kRows;
    Floats total[T][N];
    for (auto& of_row : total)
      for (Floats& value : of_row) value = zero();
    const int64_t next_row = digits.next_row(), next_scale = digits.blocks;
    const uint8_t* weight = bytes.data();
    for (int64_t m = 0; m < f.books; m++) {
      const int8_t* x = digits.row(n);
      const float* x_scale = digits.row_scales(n);
      const int32_t* start = digits.row_starts(n);
      for (int64_t s = 0; s < f.col_strips; s++, scale++) {
        const int8_t* const strip_end = x + digits.strip_size;
        do {
          Ints sum[T][N][Q];
          for (int i = 0; i < N; i++)
            for (int q = 0; q < Q; q++) {
              const Ints first = load_ints(start + (i * Q + q) * next_scale * kIntLanes);
              for (int t = 0; t < T; t++) sum[t][i][q] = first;
            }
          const int8_t* const block_end = std::min(strip_end, x + digits.block_size);
          for (; x < block_end; x += kLanes, weight += T * kLanes) {
            Bytes of_row[T];
            for (int t = 0; t < T; t++) of_row[t] = keep(load(weight + t * kLanes));
            for (int i = 0; i < N; i++)
              for (int q = 0; q < Q; q++) {
                const int8_t* digit = x + i * next_row + q * digits.row_size;
                const Bytes input = keep(load(digit));
                for (int t = 0; t < T; t++) {
                  const Bytes signed_row = with_signs(of_row[t], digit + Q * digits.row_size);
                  sum[t][i][q] = in_order(dot_table(sum[t][i][q], signed_row, input));
                }
              }
          }
          for (int i = 0; i < N; i++) {
            const float together = *scale * x_scale[i * next_scale];
            for (int t = 0; t < T; t++)
              total[t][i] = fma(digits_to_float<Q>(sum[t][i]), together, total[t][i]);
          }
          x_scale++, start += kIntLanes;
        } while (x < strip_end);
      }
    }
    for (int t = 0; t < T; t++)
      for (int i = 0; i < N; i++)
        if (t < count) y[(n + i) * f.rows + t] = sum(total[t][i]);
  }

  const Format& f;
  const Digits<Q>& digits;
  const int64_t batch;
  std::vector<uint8_t> bytes;
};

}  // namespace
