// Products with packed weights: y[n, r] = sum_c x[n, c] W[r, c].
//
// The codes of a row are unpacked a vector of bytes at a time and looked up, one table for each of
// the D inputs of a code, in tables that stay in registers for the rows of a group. The int8
// centroids found are multiplied with activations laid out in the same order (activations.h), and
// the sum over a block of columns with the scale of its codebook. Activations are bytes: one digit
// for each of them, or three digits, which are as exact as float32. Of many rows of x, the bytes
// that were looked up are kept for all of them (batch.h).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "activations.h"
#include "batch.h"
#include "packed.h"
#include "parallel.h"
#include "simd.h"

namespace {

// Adds products with a chunk of codes at p. With few registers one row after the other, for which
// activations are read again; otherwise one table after the other, and activations stay.
template <int T, int Q, int B, int D, int P>
[[gnu::always_inline]] inline void multiply(const Reader<B, P>& read, const uint8_t* p, int64_t row,
                                            const uint8_t* plane, const int8_t* x,
                                            int64_t row_size, Ints (&sum)[T][Q]) {
  Bytes found[T][P];
  auto add = [&](int t, int i, int d) {
    const Bytes weight = Weights<B, D>(plane, d)(found[t][i]);
    const int8_t* input = x + (i * D + d) * kLanes;
    for (int q = 0; q < Q; q++) {
      const int8_t* digit = input + q * row_size;
      const Bytes signed_weight = with_signs(weight, digit + Q * row_size);
      sum[t][q] = in_order(dot_table(sum[t][q], signed_weight, load(digit)));
    }
  };
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
    read(p + t * row, found[t]);
    __builtin_prefetch(p + (4 * T + t) * row);  // of the rows that come next
    for (int i = 0; kFewRegisters && i < P; i++)
      for (int d = 0; d < D; d++) add(t, i, d);
  }
  for (int i = 0; !kFewRegisters && i < P; i++)
    for (int d = 0; d < D; d++)
      for (int t = 0; t < T; t++) add(t, i, d);
}

// Products of T rows of W, of one row strip, with row n of x: y[t].
template <int T, int Q, int B, int D, int P>
[[gnu::noinline]] void tile(const Format& f, const Digits<Q>& digits,
                            const Reader<B, P>& read, const Planes<B, D>& planes, const Rows rows,
                            int64_t n, float* y) {
  Floats total[T];
  for (Floats& value : total) value = zero();
  const int64_t strip_size = digits.strip_size, row_size = digits.row_size, step = read.step;
  const uint8_t* plane = planes.first_plane();
  const float* scale = planes.first_scale();
  for (int64_t m = 0; m < f.books; m++) {
    const int8_t* x = digits.row(n);
    const int8_t* const x_end = x + row_size;
    const float* x_scale = digits.row_scales(n);
    const int32_t* start = digits.row_starts(n);
    const uint8_t* strip = rows.first + m * rows.book;
    for (; x < x_end; strip += rows.strip, plane += D << B, scale++) {
      const uint8_t* p = strip;
      const int8_t* const strip_end = x + strip_size;
      do {
        Ints sum[T][Q];
        for (int q = 0; q < Q; q++) {
          const Ints first = load_ints(start + q * digits.blocks * kIntLanes);
          for (int t = 0; t < T; t++) sum[t][q] = first;
        }
        const int8_t* const block_end = std::min(strip_end, x + digits.block_size);
        do {
          multiply<T, Q, B, D, P>(read, p, rows.row, plane, x, row_size, sum);
          x += P * D * kLanes;
          p += step;
        } while (x < block_end);
        for (int t = 0; t < T; t++)
          total[t] = fma(digits_to_float<Q>(sum[t]), *scale * *x_scale, total[t]);
        x_scale++, start += kIntLanes;
      } while (x < strip_end);
    }
  }
  sums(total, y);
}

// y of rows [row, end) of W, of one row strip, and row n of x.
template <int Q, int B, int D, int P>
void tiles(const Format& f, const Digits<Q>& digits, const Reader<B, P>& read,
           CodeRows& codes, const Planes<B, D>& planes, int64_t row, int64_t end, int64_t n,
           float* y) {
  const auto of_rows = [&]<int T>() {
    for (; row + T <= end; row += T)
      tile<T, Q, B, D, P>(f, digits, read, planes, codes.rows(row, T), n, y + n * f.rows + row);
  };
  if constexpr (Q < 3 && kTile > 4) of_rows.template operator()<kTile>();
  of_rows.template operator()<4>();
  of_rows.template operator()<1>();
}

// y = x W^T with activations of Q digits, in items of some rows of W.
template <int Q, int B, int D, int P>
class Product {
 public:
  template <class Pool>
  Product(const Format& format, const float* x, int64_t batch, Pool& pool, float* y)
      : f(format),
        digits(f, P * D * kLanes, whole_entries(B, D), x, batch, pool),
        read(f),
        batch(batch),
        step(item_rows(f.rows, f.cols, f.strip_rows, pool.num_threads())),
        y(y) {}
  int64_t items() const { return divide_up(f.rows, step); }
  void operator()(int64_t item) const {
    const int64_t last = std::min(f.rows, (item + 1) * step);
    Planes<B, D> planes(f, kTableBias, divide_up(last, f.strip_rows));
    CodeRows codes(f, D * Reader<B, P>::kChunk, read.step);
    std::optional<DecodedRows<Q>> decoded;
    if (batch >= kDecodeOnce) decoded.emplace(f, digits, batch);
    for (int64_t row = item * step, end; row < last; row = end) {
      end = std::min(last, (row / f.strip_rows + 1) * f.strip_rows);
      planes.seek(row / f.strip_rows);
      if (decoded) decoded->products(read, codes, planes, row, end, y);
      else
        for (int64_t n = 0; n < batch; n++)
          tiles<Q, B, D, P>(f, digits, read, codes, planes, row, end, n, y);
    }
  }

 private:
  const Format f;
  const Digits<Q> digits;
  const Reader<B, P> read;
  const int64_t batch, step;
  float* const y;
};

// Its work. x is read at once.
template <int Q, int B, int D, int P, class Pool>
Job product_job(const Format& f, const float* x, int64_t batch, Pool& pool, float* y) {
  const auto product = std::make_shared<Product<Q, B, D, P>>(f, x, batch, pool, y);
  return {product->items(), [product](int64_t item) { (*product)(item); }};
}

template <int Q, int B, int D, int P, class Pool>
void product(const Format& f, const float* x, int64_t batch, Pool& pool, float* y) {
  parallel(pool, product_job<Q, B, D, P>(f, x, batch, pool, y));
}

}  // namespace
