// Runs the products with trellis codes, in the instruction set that they are compiled for and without
// JAX, against loops over the definition in double. Prints the largest relative errors, and exits
// with 1 if one is too large.
#include "trellis.h"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

struct ThisThread {  // a pool that runs tasks at once
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F&& f) { f(); }
};

double worst_int8, worst_exact;

// The level of a window as LongWindows works it out from `parts`, in plain arithmetic.
int level_of(const std::vector<uint8_t>& parts, int bits, uint32_t window) {
  const int low = window & 255, top = window >> (bits - 4), last = (1 << (bits - 8)) - 1;
  const int rank = parts[low] ^ parts[256 + top], more = parts[320 + top];
  const int at = rank & 128 ? rank - 128 : 127 - rank, rest = rank & 128 ? more : last - more;
  const int level = parts[384 + at] - kBias + static_cast<int8_t>(parts[640 + (parts[512 + at] | rest)]);
  return rank & 128 ? level : -level;
}

void check(int bits, int64_t rows, int64_t cols, int64_t stream_rows, int64_t batch, bool shared,
           bool by_parts) {
  std::mt19937 random(bits * 100 + rows);
  auto uniform = [&] { return std::uniform_real_distribution<float>(0.5f, 1.5f)(random); };
  std::vector<int32_t> quads(7), order, starts{0};
  std::vector<float> col_scales, row_scales(rows), x(batch * cols), y(batch * rows);
  for (int rate = 1; rate <= std::min(6, bits); rate++) quads[rate] = random() % 3;
  quads[1] = 18;  // more than a block
  for (int rate = 1; rate <= 6; rate++)
    for (int i = 0; i < 4 * quads[rate]; i++) {
      order.push_back(random() % cols);
      col_scales.push_back(i < 4 * quads[rate] - 2 ? uniform() : 0.f);  // some are not there
    }
  for (auto& v : row_scales) v = uniform();
  for (auto& v : x) v = std::normal_distribution<float>()(random);
  // int8 levels, which the floats are too.
  std::vector<uint8_t> levels(std::max(256, 1 << bits)), parts(by_parts ? kPartBytes : 0);
  std::vector<float> table(1 << bits);
  for (size_t i = 0; i < parts.size(); i++)
    parts[i] = i < 320 ? random() : i < 384 ? random() % (1 << (bits - 8)) : random() % 8;
  for (size_t i = 384; i < 512 && by_parts; i++) parts[i] = kBias + random() % 100;
  for (size_t i = 512; i < 640 && by_parts; i++) parts[i] *= 16;
  for (int i = 0; i < 64 && by_parts; i++)  // by the highest 4 bits, which repeat
    parts[256 + i] = parts[256 + i % 16], parts[320 + i] = parts[320 + i % 16];
  for (int i = 0; i < 256 && by_parts; i++) parts[i] = parts[i % (1 << (bits - 4))];
  for (int i = 0; i < 1 << bits; i++) {
    const int level = by_parts ? level_of(parts, bits, i) : int(random() % 255) - 127;
    levels[i] = level + kBias, table[i] = 0.02f * level;
  }
  for (int i = 1 << bits; i < 256; i++) levels[i] = levels[i % (1 << bits)];
  TrellisFormat f{};
  f.rows = rows, f.cols = cols, f.stream_rows = stream_rows, f.bits = bits;
  f.num_quads = order.size() / 4, f.rate_quads = quads.data(), f.order = order.data();
  f.col_scales = col_scales.data(), f.row_scales = row_scales.data();
  f.table = table.data(), f.levels = levels.data(), f.parts = by_parts ? parts.data() : nullptr;
  f.level_scale = 0.02f, f.shared = shared;
  // Of exactly the bytes that there must be, so that a sanitizer sees what is read beyond them.
  std::vector<uint8_t> codes(f.cuts() * f.cut_bytes() + kTrellisSlack);
  for (auto& v : codes) v = random();
  f.codes = codes.data(), f.num_bytes = codes.size();
  std::vector<int32_t> outlier_rows, outlier_cols;
  std::vector<float> outlier_values;
  for (int64_t cut = 0; cut < f.cuts(); cut++) {
    const int64_t first = cut * stream_rows, count = std::min(stream_rows, rows - first);
    for (int i = 0; i < 3; i++) {
      outlier_rows.push_back(first + random() % count), outlier_cols.push_back(random() % cols);
      outlier_values.push_back(uniform());
    }
    starts.push_back(outlier_rows.size());
  }
  f.num_outliers = outlier_rows.size(), f.outlier_rows = outlier_rows.data();
  f.outlier_cols = outlier_cols.data(), f.outlier_values = outlier_values.data();
  f.outlier_starts = starts.data();
  std::vector<double> expected(batch * rows);
  for (int64_t n = 0; n < batch; n++) {
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* stream = codes.data() + r / stream_rows * f.cut_bytes();
      int64_t slot = 0;
      for (int rate = 1; rate <= 6; rate++)
        for (int i = 0; i < 4 * quads[rate]; i++, slot++, stream += f.stream_bytes(rate)) {
          uint32_t window = 0;
          for (int b = 0; b < bits; b++) {
            const int64_t bit = r % stream_rows * rate + b;
            window |= (stream[bit / 8] >> bit % 8 & 1) << b;
          }
          expected[n * rows + r] += double{row_scales[r]} * col_scales[slot] * table[window] *
                                    x[n * cols + order[slot]];
        }
    }
    for (int64_t i = 0; i < f.num_outliers; i++)
      expected[n * rows + outlier_rows[i]] +=
          double{outlier_values[i]} * x[n * cols + outlier_cols[i]];
  }
  auto error = [&] {
    double sum = 0, norm = 0;
    for (size_t i = 0; i < y.size(); i++) {
      sum += (y[i] - expected[i]) * (y[i] - expected[i]);
      norm += expected[i] * expected[i];
    }
    return std::sqrt(sum / norm);
  };
  if (!f.consistent()) std::puts("refused"), worst_exact = 1;
  ThisThread pool;
  trellis_product<TrellisFloats>(f, x.data(), batch, pool, y.data());
  worst_exact = std::max(worst_exact, error());
  if (bits <= 8) trellis_product<TrellisBytes<1>>(f, x.data(), batch, pool, y.data());
  else trellis_product<TrellisBytes<2>>(f, x.data(), batch, pool, y.data());
  worst_int8 = std::max(worst_int8, error());
  f.num_bytes--;
  if (f.consistent()) std::puts("codes that are too short are taken"), worst_exact = 1;
}

}  // namespace

int main() {
  for (int bits = 4; bits <= 16; bits++) {
    check(bits, 40, 24, std::max(bits, 13), 1, true, false);  // streams that end within a byte
    check(bits, 150, 300, 80, 5, bits % 2, false);            // tiles that are not whole
    if (bits > 8 && bits < 13) check(bits, 130, 90, 130, 4, true, true);
  }
  check(8, 64, 2000, 64, 1, true, false);
  std::printf("%s: int8 %.1e, exact %.1e\n", SIMD_NAME, worst_int8, worst_exact);
  return !(worst_int8 < 1e-2 && worst_exact < 2e-6);
}
