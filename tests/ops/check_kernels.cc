// Runs the kernels, in the instruction set that they are compiled for and without JAX, against
// loops over the definition in double. Prints the largest relative errors, and exits with 1 if one
// is too large.
#include "direct.h"
#include "lookup.h"
#include "int4.h"
#include "products.h"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

struct ThisThread {  // a pool that runs tasks at once
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F&& f) { f(); }
};

int code_at(const uint8_t* row, int64_t bit, int bits) {
  int value = 0;
  for (int i = 0; i < bits; i++) value |= (row[(bit + i) / 8] >> (bit + i) % 8 & 1) << i;
  return value;
}

double worst_int8, worst_two_digits, worst_exact, worst_direct, worst_int4;

void check(int dim, int bits, int64_t rows, int64_t cols, int64_t strip_rows, int64_t strip_cols,
           int64_t books, int64_t batch) {
  std::mt19937 random(dim * 100 + bits);
  const int64_t vectors = (cols + dim - 1) / dim, row_bytes = (vectors * bits + 7) / 8;
  const int64_t col_strips = (cols + strip_cols - 1) / strip_cols;
  const int64_t row_strips = (rows + strip_rows - 1) / strip_rows, size = 1 << bits;
  // Of exactly the bytes that are stored, so that a sanitizer sees what is read beyond them.
  std::vector<uint8_t> codes(books * rows * row_bytes);
  std::vector<int8_t> centroids(books * col_strips * row_strips * size * dim);
  std::vector<uint16_t> scales(books * col_strips * row_strips);
  std::vector<float> x(batch * cols), y(batch * rows), floats;
  for (auto& v : codes) v = random();
  for (auto& v : centroids) v = random();
  for (auto& v : scales) v = 0x2000 + random() % 0x400;  // 2^-7 to 2^-6
  for (auto& v : x) v = std::normal_distribution<float>()(random);
  const Format f{books, rows, row_bytes, col_strips, row_strips, size, dim, cols, strip_rows,
                 strip_cols, bits, codes.data(), centroids.data(), scales.data()};
  std::vector<double> expected_weight(rows * cols), expected(batch * rows);
  double norm = 0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) {
      for (int64_t m = 0; m < books; m++) {
        const int code = code_at(codes.data() + (m * rows + r) * row_bytes, c / dim * bits, bits);
        const int64_t group = (m * col_strips + c / strip_cols) * row_strips + r / strip_rows;
        expected_weight[r * cols + c] += std::ldexp(1 + (scales[group] & 0x3ff) / 1024.0, -7) *
                                         centroids[(group * size + code) * dim + c % dim];
      }
      for (int64_t n = 0; n < batch; n++)
        expected[n * rows + r] += expected_weight[r * cols + c] * x[n * cols + c];
    }
  for (double v : expected) norm += v * v;
  auto error = [&] {
    double sum = 0;
    for (size_t i = 0; i < y.size(); i++) sum += (y[i] - expected[i]) * (y[i] - expected[i]);
    return std::sqrt(sum / norm);
  };
  ThisThread pool;
  const bool known = specialize(f, [&]<int B, int D, int P>() {
    product<1, B, D, P>(f, x.data(), batch, pool, y.data());
    worst_int8 = std::max(worst_int8, error());
    product<2, B, D, P>(f, x.data(), batch, pool, y.data());
    worst_two_digits = std::max(worst_two_digits, error());
    product<3, B, D, P>(f, x.data(), batch, pool, y.data());
    worst_exact = std::max(worst_exact, error());
  });
  // The same weight once more, as floats; with scales of blocks that are all 1, or, where all rows
  // share codebooks, without.
  for (size_t i = 0; i < centroids.size(); i++)
    floats.push_back(std::ldexp(1 + (scales[i / (size * dim)] & 0x3ff) / 1024.0, -7) *
                     centroids[i]);
  const int64_t block_size = 3 * dim;
  const int64_t blocks = row_strips == 1 ? 0 : (strip_cols + block_size - 1) / block_size;
  const std::vector<float> ones(rows * col_strips * blocks, 1.f);
  const DirectFormat d{books, rows, row_bytes, col_strips, row_strips, size, dim, cols,
                       strip_rows, strip_cols, bits, blocks, block_size, codes.data(),
                       floats.data(), ones.data()};
  direct(d, x.data(), batch, pool, y.data());
  worst_direct = std::max(worst_direct, error());
  if (!known) std::printf("no kernel for %d bits, dim %d\n", bits, dim), worst_exact = 1;
}

void check_int4(int64_t rows, int64_t cols) {
  std::mt19937 random(4);
  std::vector<uint8_t> codes(rows * cols / 2);
  std::vector<uint16_t> scales(rows * cols / 128);
  std::vector<float> x(2 * cols), y(2 * rows);
  for (auto& v : codes) v = random();
  for (auto& v : scales) v = 0x2000 + random() % 0x400;
  for (auto& v : x) v = std::normal_distribution<float>()(random);
  ThisThread pool;
  int4_product({rows, cols, cols / 128, codes.data(), scales.data()}, x.data(), 2, pool, y.data());
  double sum = 0, norm = 0;
  for (int64_t n = 0; n < 2; n++)
    for (int64_t r = 0; r < rows; r++) {
      double expected = 0;
      for (int64_t c = 0; c < cols; c++) {
        const int code = codes[(r * cols + c) / 2] >> c % 2 * 4 & 15;
        const uint16_t scale = scales[r * (cols / 128) + c / 128];
        expected += std::ldexp(1 + (scale & 0x3ff) / 1024.0, -7) * (code - 8) * x[n * cols + c];
      }
      norm += expected * expected;
      sum += (y[n * rows + r] - expected) * (y[n * rows + r] - expected);
    }
  worst_int4 = std::sqrt(sum / norm);
}

}  // namespace

int main() {
  for (int dim : {1, 2, 4, 8})
    for (int bits = 1; bits <= 8; bits++) {
      check(dim, bits, 13, 512, 4, 256, 1, 1);
      check(dim, bits, 7, 13 * 8 * dim + 3, 3, 5 * dim, 2, 5);  // strips that begin within a byte
      check(dim, bits, 9, 192 * 3, 9, 192, 1, 2);
    }
  check_int4(9, 384);
  std::printf("%s: int8 %.1e, two digits %.1e, exact %.1e, direct %.1e, int4 %.1e\n", SIMD_NAME,
              worst_int8, worst_two_digits, worst_exact, worst_direct, worst_int4);
  return !(worst_int8 < 2e-2 && worst_two_digits < 1e-4 && worst_exact < 1e-6 &&
           worst_direct < 2e-6 && worst_int4 < 2e-2);
}
