// Products for what has no kernel of its own in products.h or lookup.h (float16 centroids,
// codebooks of up to 65536 entries, factored codebooks, block scales): a row is decoded to floats,
// which stay in the first-level cache, and multiplied. A code costs a load of D floats and their
// addition.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace {

struct DirectFormat {
  int64_t books, rows, row_bytes;             // of codes (M, R, bytes)
  int64_t col_strips, row_strips, size, dim;  // of centroids (M, S, G, K, D)
  int64_t cols, strip_rows, strip_cols, bits;
  int64_t blocks, block_size;  // scales in a row of a strip, 0 if there are none, and their weights
  const uint8_t* codes;
  const float* centroids;
  const float* scales;  // (R, S, blocks)
};

class RowDecoder {
 public:
  explicit RowDecoder(const DirectFormat& f)
      : f(f), packed(f.row_bytes + 4), row(f.col_strips * f.strip_cols + f.dim) {}

  // The weights of a row, valid until the next call; `cols` of them, then padding.
  template <int D>
  const float* decode(int64_t r) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int64_t m = 0; m < f.books; m++) {
      std::memcpy(packed.data(), f.codes + (m * f.rows + r) * f.row_bytes, f.row_bytes);
      int64_t bit = 0, left = (f.cols + D - 1) / D;
      for (int64_t s = 0; s < f.col_strips; s++, left -= f.strip_cols / D) {
        const int64_t group = (m * f.col_strips + s) * f.row_strips + r / f.strip_rows;
        const float* table = f.centroids + group * f.size * D;
        float* to = row.data() + s * f.strip_cols;
        const int64_t count = std::min(left, f.strip_cols / D);
        for (int64_t v = 0; v < count; v++, to += D, bit += f.bits) {
          uint32_t word;
          std::memcpy(&word, packed.data() + bit / 8, 4);
          const float* entry = table + (word >> bit % 8 & ((1u << f.bits) - 1)) * D;
          for (int d = 0; d < D; d++) to[d] += entry[d];
        }
      }
    }
    for (int64_t i = 0; i < f.col_strips * f.blocks; i++) {
      const int64_t s = i / f.blocks, first = i % f.blocks * f.block_size;
      float* block = row.data() + s * f.strip_cols + first;
      const int64_t count = std::min(f.block_size, f.strip_cols - first);
      for (int64_t c = 0; c < count; c++) block[c] *= f.scales[r * f.col_strips * f.blocks + i];
    }
    return row.data();
  }

 private:
  const DirectFormat& f;
  std::vector<uint8_t> packed;
  std::vector<float> row;
};

inline float dot_floats(const float* a, const float* b, int64_t count) {
  float lanes[16] = {}, rest = 0;  // separate sums, of which the compiler makes vectors
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int lane = 0; lane < 16; lane++) lanes[lane] += a[i + lane] * b[i + lane];
  for (; i < count; i++) rest += a[i] * b[i];
  for (float lane : lanes) rest += lane;
  return rest;
}

template <int D, class Pool>
void direct_product(const DirectFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  const int64_t step = item_rows(f.rows, f.cols, 1, pool.num_threads());
  parallel(pool, divide_up(f.rows, step), [&](int64_t item) {
    RowDecoder decoder(f);
    for (int64_t r = item * step; r < std::min(f.rows, (item + 1) * step); r++) {
      const float* weights = decoder.template decode<D>(r);
      for (int64_t n = 0; n < batch; n++)
        y[n * f.rows + r] = dot_floats(x + n * f.cols, weights, f.cols);
    }
  });
}

}  // namespace
