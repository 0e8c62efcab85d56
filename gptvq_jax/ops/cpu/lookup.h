// Products by tables of products, for codes of 8 bits and codebooks that all rows share, as AQLM
// (arXiv 2401.06118) has them: for some vectors of x at a time, the products with all 256 entries,
// and then for every row a sum of those that its codes choose. Per code that is one load and one
// addition, whatever D is.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "direct.h"
#include "parallel.h"

namespace {

constexpr int64_t kLookupBatch = 4;  // rows of x, each of which needs tables of its own

inline bool has_lookup(const DirectFormat& f, int64_t batch) {
  return batch <= kLookupBatch && f.bits == 8 && f.size == 256 && f.row_strips == 1 && !f.blocks;
}

template <int D>
class ProductTables {
 public:
  static constexpr int kVectors = 32;  // whose tables stay in the first-level cache
  ProductTables() : entries(D * 256), products(kVectors * 256) {}

  void set_book(const float* centroids) {  // (256, D), transposed: vectors run along entries
    for (int k = 0; k < 256; k++)
      for (int d = 0; d < D; d++) entries[d * 256 + k] = centroids[k * D + d];
  }
  void set_vectors(const float* x, int64_t count, int64_t values) {
    for (int64_t v = 0; v < count; v++) {
      float* to = products.data() + v * 256;
      std::fill_n(to, 256, 0.f);
      for (int64_t d = 0; d < std::min<int64_t>(D, values - v * D); d++)
        for (int k = 0; k < 256; k++) to[k] += x[v * D + d] * entries[d * 256 + k];
    }
  }
  float sum(const uint8_t* codes, int64_t count) const {
    const float* table = products.data();
    float sums[8] = {};  // separate: one addition waits for another as long as several loads take
    int64_t v = 0;
    for (; v + 8 <= count; v += 8, table += 8 * 256) {
      uint64_t eight;
      std::memcpy(&eight, codes + v, 8);  // least significant byte first
      for (int i = 0; i < 8; i++) sums[i] += table[i * 256 + (eight >> 8 * i & 255)];
    }
    for (; v < count; v++, table += 256) sums[0] += table[codes[v]];
    for (int half = 4; half; half /= 2)
      for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
  }

 private:
  std::vector<float> entries, products;
};

// y = x W^T of a format that has_lookup.
template <int D, class Pool>
void lookup_product(const DirectFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  constexpr int64_t kVectors = ProductTables<D>::kVectors;
  // Every item makes all tables, which cost as much as 256 D / 16 rows or so.
  const int64_t step = std::max<int64_t>(1024, divide_up(f.rows, 4 * pool.num_threads()));
  parallel(pool, divide_up(f.rows, step), [&](int64_t item) {
    ProductTables<D> tables;
    const int64_t first = item * step, last = std::min(f.rows, first + step);
    for (int64_t n = 0; n < batch; n++) std::fill(y + n * f.rows + first, y + n * f.rows + last, 0);
    for (int64_t m = 0; m < f.books; m++)
      for (int64_t s = 0; s < f.col_strips; s++) {
        tables.set_book(f.centroids + (m * f.col_strips + s) * 256 * D);
        const int64_t begin = s * f.strip_cols, cols = std::min(f.strip_cols, f.cols - begin);
        for (int64_t c = 0; c < cols; c += kVectors * D) {
          const int64_t values = std::min(cols - c, kVectors * D), count = divide_up(values, D);
          const uint8_t* codes = f.codes + m * f.rows * f.row_bytes + (begin + c) / D;
          for (int64_t n = 0; n < batch; n++) {
            tables.set_vectors(x + n * f.cols + begin + c, count, values);
            for (int64_t r = first; r < last; r++)
              y[n * f.rows + r] += tables.sum(codes + r * f.row_bytes, count);
          }
        }
      }
  });
}

// y = x W^T by whichever is faster; false where there is no kernel for D.
template <class Pool>
bool direct(const DirectFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  auto run = [&]<int D>() {
    if (has_lookup(f, batch)) lookup_product<D>(f, x, batch, pool, y);
    else direct_product<D>(f, x, batch, pool, y);
    return true;
  };
  switch (f.dim) {
    case 1: return run.template operator()<1>();
    case 2: return run.template operator()<2>();
    case 4: return run.template operator()<4>();
    case 8: return run.template operator()<8>();
    case 16: return run.template operator()<16>();
  }
  return false;
}

}  // namespace
