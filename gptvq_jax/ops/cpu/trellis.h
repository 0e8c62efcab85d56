// Products with trellis-coded weights (core/trellis_tensor.py), in the layout of trellis_layout.py:
// columns of one rate, four by four, each with whole streams that go on behind their ends. Some of
// them, a block, are decoded for the rows of a tile, and multiplied with every row of x.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "parallel.h"
#include "products.h"
#include "trellis_runs.h"
#include "trellis_simd.h"

namespace {

constexpr int64_t kBlockQuads = 16;  // of columns that are decoded together, and share a scale of x

struct TrellisFormat {
  int64_t rows, cols, stream_rows, bits, num_bytes, num_quads;
  const uint8_t* codes;
  const int32_t* rate_quads;  // (7,): quads of columns of every rate, 0 of rate 0
  const int32_t* order;       // (4 quads,): the column of each
  const float *col_scales, *row_scales;  // (4 quads,), 0 where a quad is not full; (R,)
  const float* table;                    // (2^L,) of float levels, or
  const uint8_t *levels, *parts;  // (2^L,) plus kBias; of LongWindows, null where there are none
  float level_scale;
  bool shared;  // levels that other layers have too
  int64_t num_outliers;
  const int32_t *outlier_rows, *outlier_cols, *outlier_starts;  // by cut: (cuts + 1,)
  const float* outlier_values;

  int64_t cuts() const { return divide_up(rows, stream_rows); }
  int64_t stream_bytes(int64_t rate) const {
    return divide_up(stream_rows * rate + bits - rate, 8);
  }
  int64_t cut_bytes() const {
    int64_t size = 0;
    for (int64_t rate = 1; rate <= 6; rate++) size += 4 * rate_quads[rate] * stream_bytes(rate);
    return size;
  }

  // Whether nothing lies outside of the arrays.
  bool consistent() const {
    int64_t quads = 0;
    for (int64_t rate = 0; rate <= 6; rate++) {
      if (rate_quads[rate] < 0 || (rate_quads[rate] && (!rate || rate > bits))) return false;
      quads += rate_quads[rate];
    }
    if (quads != num_quads || num_bytes < cuts() * cut_bytes() + kTrellisSlack) return false;
    uint32_t most = 0;
    for (int64_t i = 0; i < 4 * quads; i++) most = std::max<uint32_t>(most, order[i]);
    if (most >= cols || outlier_starts[0] || outlier_starts[cuts()] != num_outliers) return false;
    for (int64_t cut = 0; cut < cuts(); cut++) {
      const int64_t first = cut * stream_rows, count = std::min(stream_rows, rows - first);
      const int64_t begin = outlier_starts[cut], end = outlier_starts[cut + 1];
      if (end < begin || end > num_outliers) return false;
      uint32_t row = 0, col = 0;  // the largest; negative ones are too large as well
      for (int64_t i = begin; i < end; i++) {
        row = std::max<uint32_t>(row, outlier_rows[i] - first);
        col = std::max<uint32_t>(col, outlier_cols[i]);
      }
      if (row >= count || col >= cols) return false;
    }
    return true;
  }
};

struct TrellisBlock {
  int rate;
  int64_t first, quads, offset, size;  // of all quads; bytes within a cut, of a stream
};

inline std::vector<TrellisBlock> trellis_blocks(const TrellisFormat& f) {
  std::vector<TrellisBlock> blocks;
  int64_t first = 0, offset = 0;
  for (int rate = 1; rate <= 6; rate++) {
    const int64_t size = f.stream_bytes(rate);
    for (int64_t left = f.rate_quads[rate], count; left > 0; left -= count) {
      count = std::min(left, kBlockQuads);
      blocks.push_back({rate, first, count, offset, size});
      first += count, offset += 4 * count * size;
    }
  }
  return blocks;
}

// Float levels, and x as it is.
struct TrellisFloats {
  using Level = float;
  explicit TrellisFloats(const TrellisFormat& f)
      : f(f), tables(run_tables(f.table, f.bits, f.shared)) {}
  struct Input {
    Input(const TrellisFormat& f, const std::vector<TrellisBlock>&, const float* from,
          int64_t batch)
        : slots(4 * f.num_quads), x(batch * slots) {
      for (int64_t n = 0; n < batch; n++)
        for (int64_t i = 0; i < slots; i++)
          x[n * slots + i] = from[n * f.cols + f.order[i]] * f.col_scales[i];
    }
    const int64_t slots;
    std::vector<float> x;
  };

  // Columns one after another, of a tile each.
  void decode(const TrellisBlock& b, const uint8_t* streams, int64_t rows, float* levels) const {
    for (int64_t c = 0; c < 4 * b.quads; c++)
      look_up<float>(b.rate, tables->of_rate[b.rate], streams + c * b.size, f.bits, rows,
                     levels + c * kTile);
  }
  static void multiply(const TrellisBlock& b, int64_t, const float* levels, const Input& in,
                       int64_t batch, float* sums, int64_t stride) {
    constexpr int kLane = sizeof(Floats) / 4, kVectors = kTile / kLane;
    for (int64_t n = 0; n < batch; n++) {
      const float *x = &in.x[n * in.slots + 4 * b.first], *p = levels;
      float* const to = sums + n * stride;
      Floats sum[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) std::memcpy(&sum[v], to + v * kLane, sizeof sum[v]);
      for (int64_t c = 0; c < 4 * b.quads; c++, p += kTile) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; v++) {
          Floats level;
          std::memcpy(&level, p + v * kLane, sizeof level);
          sum[v] = fma(level, x[c], sum[v]);
        }
      }
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; v++) std::memcpy(to + v * kLane, &sum[v], sizeof sum[v]);
    }
  }

 private:
  const TrellisFormat& f;
  const std::shared_ptr<const RunTables<float>> tables;
};

// int8 levels, and x rounded to Q digits of int8 with a scale for each block.
template <int Q>
struct TrellisBytes {
  using Level = uint8_t;
  explicit TrellisBytes(const TrellisFormat& f) : f(f) {
    if (!in_registers()) tables = run_tables(f.levels, f.bits, f.shared);
  }
  struct Input {
    Input(const TrellisFormat& f, const std::vector<TrellisBlock>& blocks, const float* from,
          int64_t batch)
        : x(Q * batch * 4 * f.num_quads), starts(batch * blocks.size()),
          factors(batch * blocks.size()) {
      float scaled[4 * kBlockQuads];
      for (size_t i = 0; i < blocks.size(); i++) {
        const TrellisBlock& b = blocks[i];
        const int64_t count = 4 * b.quads;
        for (int64_t n = 0; n < batch; n++) {
          for (int64_t c = 0, slot = 4 * b.first; c < count; c++, slot++)
            scaled[c] = from[n * f.cols + f.order[slot]] * f.col_scales[slot];
          int8_t* digits = &x[Q * (4 * b.first * batch + n * count)];
          factors[i * batch + n] = f.level_scale * round_row<Q>(scaled, count, digits, count);
          for (int q = 0; q < Q; q++) {
            int32_t sum = 0;
            for (int64_t c = 0; c < count; c++) sum += digits[q * count + c];
            starts[i * batch + n].digit[q] = -int32_t{kBias} * sum;
          }
        }
      }
    }
    struct Starts {
      int32_t digit[Q];
    };
    std::vector<int8_t> x;  // block after block, row after row, digit after digit
    std::vector<Starts> starts;  // minus what kBias adds
    std::vector<float> factors;
  };

  void decode(const TrellisBlock& b, const uint8_t* streams, int64_t rows, uint8_t* levels) const {
    auto each = [&](const auto& windows) {
      for (int64_t q = 0; q < b.quads; q++)
        windows(streams + 4 * q * b.size, b.size, levels + 4 * q * kTile);
    };
#ifdef GPTVQ_SHORT_WINDOWS
    if (f.bits <= 8) return each(ShortWindows(f.levels, b.rate));
    if (f.parts) return each(LongWindows(f.parts, b.rate, f.bits));
#endif
    uint8_t columns[4 * kBlockQuads * kTile];  // all, so that none is read while it is written
    for (int64_t c = 0; c < 4 * b.quads; c++)
      look_up<uint8_t>(b.rate, tables->of_rate[b.rate], streams + c * b.size, f.bits, rows,
                       columns + c * kTile);
    for (int64_t q = 0; q < b.quads; q++)
      interleave(columns + 4 * q * kTile, levels + 4 * q * kTile);
  }
  static void multiply(const TrellisBlock& b, int64_t index, const uint8_t* levels,
                       const Input& in, int64_t batch, float* sums, int64_t stride) {
    constexpr int kAlone = kLanes == 64 ? 4 : 8 / Q, kTogether = kLanes == 64 ? 4 / Q : 2 / Q;
    const int64_t count = 4 * b.quads;
    const int8_t* x[4];
    float* to[4];
    for (int64_t n = 0, rows; n < batch; n += rows) {
      rows = batch - n >= 4 ? 4 : 1;
      for (int64_t i = 0; i < rows; i++) {
        x[i] = &in.x[Q * (4 * b.first * batch + (n + i) * count)];
        to[i] = sums + (n + i) * stride;
      }
      const auto* starts = &in.starts[index * batch + n].digit;
      const float* factors = &in.factors[index * batch + n];
      if (rows == 4)
        multiply_tile<kTogether, 4, Q>(levels, b.quads, x, count, starts, factors, kBase, to);
      else multiply_tile<kAlone, 1, Q>(levels, b.quads, x, count, starts, factors, kBase, to);
    }
  }

 private:
  bool in_registers() const {
#ifdef GPTVQ_SHORT_WINDOWS
    return f.bits <= 8 || f.parts;
#else
    return false;
#endif
  }
  const TrellisFormat& f;
  std::shared_ptr<const RunTables<uint8_t>> tables;
};

// Shares of the columns of a cut, of which every item takes one: as many as keep threads busy, but
// of no fewer weights than are worth an item.
inline int64_t column_shares(const TrellisFormat& f, int64_t blocks, int64_t threads) {
  const int64_t wanted = divide_up(4 * threads, f.cuts());
  const int64_t most = 4 * f.num_quads * std::min(f.rows, f.stream_rows) / (1 << 15);
  return std::max<int64_t>(1, std::min({wanted, most, blocks}));
}

// Of `size` bytes at p what is due when a tile begins, of `rows` rows: blocks are read by tiles, and
// their first tile reads all of their lines.
inline void prefetch(const uint8_t* p, int64_t row, int64_t rows, int64_t size) {
  for (int64_t at = row * size / rows; at < std::min(size, (row + kTile) * size / rows); at += 64)
    __builtin_prefetch(p + at);
}

template <class Kind, class Pool>
void trellis_product(const TrellisFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  using Level = typename Kind::Level;
  const std::vector<TrellisBlock> blocks = trellis_blocks(f);
  const Kind kind(f);
  const typename Kind::Input input(f, blocks, x, batch);
  const int64_t count = blocks.size(), shares = column_shares(f, count, pool.num_threads());
  const int64_t tiles = divide_up(f.stream_rows, kTile), stride = tiles * kTile;
  const int64_t cut_bytes = f.cut_bytes();
  std::vector<float> partial(shares > 1 ? shares * batch * f.rows : 0);
  parallel(pool, f.cuts() * shares, [&](int64_t item) {
    const int64_t cut = item / shares, share = item % shares;
    const int64_t row = cut * f.stream_rows, rows = std::min(f.stream_rows, f.rows - row);
    std::vector<float> sums(batch * stride);
    const std::unique_ptr<Level[]> levels(new Level[4 * kBlockQuads * kTile]());
    for (int64_t i = share * count / shares; i < (share + 1) * count / shares; i++) {
      const TrellisBlock& b = blocks[i];
      const uint8_t* streams = f.codes + cut * cut_bytes + b.offset;
      for (int64_t at = 0; at < rows; at += kTile) {
        prefetch(streams + 4 * b.quads * b.size, at, rows, 4 * b.quads * b.size);
        kind.decode(b, streams + at / 8 * b.rate, std::min<int64_t>(kTile, rows - at),
                    levels.get());
        Kind::multiply(b, i, levels.get(), input, batch, &sums[at], stride);
      }
    }
    float* to = shares > 1 ? &partial[share * batch * f.rows] : y;
    const int64_t kept = f.outlier_starts[cut], all = f.outlier_starts[cut + 1] - kept;
    const int64_t kept_first = kept + share * all / shares;
    const int64_t kept_last = kept + (share + 1) * all / shares;
    for (int64_t n = 0; n < batch; n++) {
      for (int64_t r = 0; r < rows; r++)
        to[n * f.rows + row + r] = sums[n * stride + r] * f.row_scales[row + r];
      float *__restrict sum = to + n * f.rows;
      const float* input = x + n * f.cols;
      for (int64_t i = kept_first; i < kept_last; i++)
        sum[f.outlier_rows[i]] += input[f.outlier_cols[i]] * f.outlier_values[i];
    }
  });
  if (shares == 1) return;
  for (int64_t i = 0; i < batch * f.rows; i++) {
    y[i] = partial[i];
    for (int64_t s = 1; s < shares; s++) y[i] += partial[s * batch * f.rows + i];
  }
}

}  // namespace
