// Vector quantized weights as they are stored (see vq_tensor.py), and how kernels read them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace {
using namespace simd;

struct Format {
  int64_t books, rows, row_bytes;               // of codes (M, R, bytes)
  int64_t col_strips, row_strips, size, dim;    // of centroids (M, S, G, K, D)
  int64_t cols, strip_rows, strip_cols, bits;
  const uint8_t* codes;
  const int8_t* centroids;
  const uint16_t* scales;  // (M, S, G) float16

  int64_t cols_in(int64_t strip) const { return std::min(strip_cols, cols - strip * strip_cols); }
};

// Reads a chunk of codes: P vectors of them, where a byte holds P whole codes, the first vector
// with the first code of every byte; otherwise one vector.
template <int B, int P>
class Reader {
 public:
  static constexpr int kChunk = P * kLanes;
  explicit Reader(const Format& f) : step(kChunk / 8 * f.bits), unpack(f.bits) {}
  void operator()(const uint8_t* p, Bytes (&codes)[P]) const {
    if constexpr (P == 1) {
      codes[0] = unpack(p);
    } else {
      const Bytes packed = keep(load(p));
      for (int i = 0; i < P; i++) codes[i] = code(packed, 8 / P * i, 8 / P);
    }
  }
  const int64_t step;  // bytes from one chunk to the next

 private:
  const Unpack<B> unpack;
};

// The codes of some rows, where every strip begins with a byte and whole chunks can be read.
struct Rows {
  const uint8_t* first;
  int64_t row, strip, book;  // bytes from one to the next
};

// Gives rows as they are stored, or, at the end of the array and where strips begin within a byte,
// copies of them.
class CodeRows {
 public:
  CodeRows(const Format& f, int64_t chunk_cols, int64_t step)
      : f(f), strip_step(divide_up(f.strip_cols, chunk_cols) * step),
        stored_strip(f.strip_cols / f.dim * f.bits) {}

  Rows rows(int64_t row, int64_t count) {
    const uint8_t* start = f.codes + row * f.row_bytes;
    const int64_t book = f.rows * f.row_bytes;
    const uint8_t* last_strip = start + (f.books - 1) * book + (count - 1) * f.row_bytes +
                                (f.col_strips - 1) * stored_strip / 8;
    if (stored_strip % 8 == 0 && last_strip + strip_step + kSlack <= f.codes + f.books * book)
      return {start, f.row_bytes, stored_strip / 8, book};
    const int64_t row_size = f.col_strips * strip_step;
    copy.assign(f.books * count * row_size + kSlack, 0);
    for (int64_t m = 0; m < f.books; m++)
      for (int64_t r = 0; r < count; r++)
        for (int64_t s = 0; s < f.col_strips; s++)
          copy_strip(start + m * book + r * f.row_bytes, s * stored_strip,
                     copy.data() + (m * count + r) * row_size + s * strip_step);
    return {copy.data(), row_size, strip_step, count * row_size};
  }

 private:
  void copy_strip(const uint8_t* row, int64_t bit, uint8_t* to) const {
    const uint8_t *from = row + bit / 8, *end = row + f.row_bytes;
    const int shift = bit % 8;
    for (int64_t i = 0; i < strip_step && from + i < end; i++)
      to[i] = from[i] >> shift | (shift && from + i + 1 < end ? from[i + 1] << (8 - shift) : 0);
  }
  const Format& f;
  const int64_t strip_step, stored_strip;  // bytes of whole chunks, bits
  std::vector<uint8_t> copy;
};

// What the weights of a row strip are looked up in: for every codebook and column strip D planes of
// 2^B bytes, and the scale. Those of several row strips are made together, because they lie side by
// side where they are stored.
template <int B, int D>
class Planes {
 public:
  // Of row strips before `end`.
  Planes(const Format& f, uint8_t bias, int64_t end)
      : f(f),
        split(f.size, D, bias),
        bias(bias),
        end(end),
        strips(f.books * f.col_strips),
        together(std::clamp<int64_t>(kCacheBytes / (strips * D << B), 1, 16)),
        planes(new uint8_t[(together * strips * D << B) + kOverread]),
        scales(new float[together * strips]) {}

  // Makes row strip `wanted` ready.
  void seek(int64_t wanted) {
    if (wanted < begin || wanted >= begin + together) fill(wanted);
    at = (wanted - begin) * strips;
  }
  const uint8_t* first_plane() const { return planes.get() + (at * D << B); }  // strip by strip
  const float* first_scale() const { return scales.get() + at; }

 private:
  void fill(int64_t first) {
    begin = first;
    const int64_t count = std::min(together, end - first);
    for (int64_t s = 0; s < strips; s++)
      for (int64_t g = 0; g < count; g++) {
        const int64_t group = s * f.row_strips + first + g;
        const int64_t to = g * strips + s;
        const int64_t next = (group + together) * f.size * D;  // for the next call
        for (int64_t line = 0; line < f.size * D; line += 64)
          __builtin_prefetch(f.centroids + next + line);
        const int8_t* book = f.centroids + group * f.size * D;
        uint8_t* plane = planes.get() + (to * D << B);
        if constexpr (whole_entries(B, D)) {
          for (int64_t i = 0; i < f.size * D; i++) plane[i] = static_cast<uint8_t>(book[i]) ^ bias;
        } else split.template operator()<B>(book, plane);
        scales[to] = half_to_float(f.scales[group]);
      }
  }
  static constexpr int64_t kCacheBytes = 1 << 14, kOverread = 4;
  const Format& f;
  const Split split;
  const uint8_t bias;
  const int64_t end, strips, together;
  int64_t begin = -1 - (int64_t{1} << 40), at = 0;
  std::unique_ptr<uint8_t[]> planes;
  std::unique_ptr<float[]> scales;
};

// Calls run<B, D, P>() for the smallest table that holds K entries and P codes to a byte; false
// where there is no kernel.
template <int B, int P, class Run>
bool with_dim(int64_t dim, Run&& run) {
  if (dim == 1) return run.template operator()<B, 1, P>(), true;
  if (dim == 2) return run.template operator()<B, 2, P>(), true;
  if constexpr (P <= 2)
    if (dim == 4) return run.template operator()<B, 4, P>(), true;
  if constexpr (P == 1)
    if (dim == 8) return run.template operator()<B, 8, P>(), true;
  return false;
}
template <class Run>
bool specialize(const Format& f, Run&& run) {
  if constexpr (kSmallTable < 5)
    if (f.bits == 5) return with_dim<5, 1>(f.dim, run);
  return (f.bits == 2 && with_dim<kSmallTable, 4>(f.dim, run)) ||
         (f.bits == 4 && with_dim<kSmallTable, 2>(f.dim, run)) ||
         (f.bits <= kSmallTable && with_dim<kSmallTable, 1>(f.dim, run)) ||
         (f.bits == 6 && with_dim<6, 1>(f.dim, run)) ||
         (f.bits == 7 && with_dim<7, 1>(f.dim, run)) ||
         (f.bits == 8 && with_dim<8, 1>(f.dim, run));
}

}  // namespace
