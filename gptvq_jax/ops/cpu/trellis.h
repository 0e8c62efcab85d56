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
      const int64_t first = cut * stream_rows, end = std::min(rows, first + stream_rows);
      if (outlier_starts[cut + 1] < outlier_starts[cut]) return false;
      for (int64_t i = outlier_starts[cut]; i < outlier_starts[cut + 1]; i++)
        if (outlier_rows[i] < first || outlier_rows[i] >= end || outlier_cols[i] < 0 ||
            outlier_cols[i] >= cols)
          return false;
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

// Looks up `rows` windows, or up to 7 more, of a stream; `step` from one to the next in `found`.
template <int RATE, int STEP, class T>
inline void look_up(const uint8_t* stream, const T* table, int64_t bits, int64_t rows, T* found) {
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t row = 0; row < rows; row += 8, stream += RATE, found += 8 * STEP) {
    uint64_t word;
    std::memcpy(&word, stream, 8);
    for (int i = 0; i < 8; i++) found[i * STEP] = table[word >> i * RATE & mask];
  }
}
template <int STEP, class T>
void look_up(int rate, const uint8_t* stream, const T* table, int64_t bits, int64_t rows,
             T* found) {
  constexpr decltype(&look_up<1, STEP, T>) kEach[] = {
      look_up<1, STEP, T>, look_up<2, STEP, T>, look_up<3, STEP, T>,
      look_up<4, STEP, T>, look_up<5, STEP, T>, look_up<6, STEP, T>};
  kEach[rate - 1](stream, table, bits, rows, found);
}

// Float levels, and x as it is.
struct TrellisFloats {
  using Level = float;
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
  static void decode(const TrellisFormat& f, const TrellisBlock& b, const uint8_t* streams,
                     int64_t rows, float* levels) {
    for (int64_t c = 0; c < 4 * b.quads; c++)
      look_up<1>(b.rate, streams + c * b.size, f.table, f.bits, rows, levels + c * kTile);
  }
  static void multiply(const TrellisBlock& b, int64_t, const float* levels, const Input& in,
                       int64_t batch, float* sums, int64_t stride) {
    constexpr int kLane = sizeof(Floats) / 4, kVectors = kTile / kLane;
    for (int64_t n = 0; n < batch; n++) {
      const float *x = &in.x[n * in.slots + 4 * b.first], *p = levels;
      Floats sum[kVectors];
      std::memcpy(sum, sums + n * stride, sizeof sum);
      for (int64_t c = 0; c < 4 * b.quads; c++, p += kTile)
        for (int v = 0; v < kVectors; v++) {
          Floats level;
          std::memcpy(&level, p + v * kLane, sizeof level);
          sum[v] = fma(level, x[c], sum[v]);
        }
      std::memcpy(sums + n * stride, sum, sizeof sum);
    }
  }
};

// int8 levels, and x rounded to int8 with a scale for each block.
struct TrellisBytes {
  using Level = uint8_t;
  struct Input {
    Input(const TrellisFormat& f, const std::vector<TrellisBlock>& blocks, const float* from,
          int64_t batch)
        : slots(4 * f.num_quads), count(blocks.size()), x(batch * slots), starts(batch * count),
          factors(batch * count) {
      float scaled[4 * kBlockQuads];
      for (int64_t n = 0; n < batch; n++)
        for (int64_t i = 0; i < count; i++) {
          const TrellisBlock& b = blocks[i];
          for (int64_t c = 0, slot = 4 * b.first; c < 4 * b.quads; c++, slot++)
            scaled[c] = from[n * f.cols + f.order[slot]] * f.col_scales[slot];
          int8_t* digits = &x[n * slots + 4 * b.first];
          factors[i * batch + n] = f.level_scale * round_row<1>(scaled, 4 * b.quads, digits);
          int32_t sum = 0;
          for (int64_t c = 0; c < 4 * b.quads; c++) sum += digits[c];
          starts[i * batch + n] = -int32_t{kBias} * sum;
        }
    }
    const int64_t slots, count;
    std::vector<int8_t> x;
    std::vector<int32_t> starts;  // block after block, minus what kBias adds
    std::vector<float> factors;
  };

  static void decode(const TrellisFormat& f, const TrellisBlock& b, const uint8_t* streams,
                     int64_t rows, uint8_t* levels) {
    auto each = [&](const auto& windows) {
      for (int64_t q = 0; q < b.quads; q++)
        windows(streams + 4 * q * b.size, b.size, rows, levels + 4 * q * kTile);
    };
#ifdef GPTVQ_SHORT_WINDOWS
    if (f.bits <= 8) return each(ShortWindows(f.levels, b.rate));
#endif
#ifdef GPTVQ_LONG_WINDOWS
    if (f.parts) return each(LongWindows(f.parts, b.rate, f.bits));
#endif
    each([&](const uint8_t* stream, int64_t size, int64_t rows, uint8_t* packed) {
      for (int c = 0; c < 4; c++)
        look_up<4>(b.rate, stream + c * size, f.levels, f.bits, rows, packed + c);
    });
  }
  static void multiply(const TrellisBlock& b, int64_t index, const uint8_t* levels,
                       const Input& in, int64_t batch, float* sums, int64_t stride) {
    constexpr int kAlone = kLanes == 64 ? 4 : 8, kTogether = kLanes == 64 ? 4 : 2;
    const int32_t* starts = &in.starts[index * batch];
    const float* factors = &in.factors[index * batch];
    const int8_t* x[4];
    float* to[4];
    for (int64_t n = 0, count; n < batch; n += count) {
      count = batch - n >= 4 ? 4 : 1;
      for (int64_t i = 0; i < count; i++) {
        x[i] = &in.x[(n + i) * in.slots + 4 * b.first];
        to[i] = sums + (n + i) * stride;
      }
      if (count == 4) multiply_tile<kTogether, 4>(levels, b.quads, x, starts + n, factors + n, to);
      else multiply_tile<kAlone, 1>(levels, b.quads, x, starts + n, factors + n, to);
    }
  }
};

// Shares of the columns of a cut, of which every item takes one: as many as keep threads busy, but
// of no fewer weights than are worth an item.
inline int64_t column_shares(const TrellisFormat& f, int64_t blocks, int64_t threads) {
  const int64_t wanted = divide_up(4 * threads, f.cuts());
  const int64_t most = 4 * f.num_quads * std::min(f.rows, f.stream_rows) / (1 << 15);
  return std::max<int64_t>(1, std::min({wanted, most, blocks}));
}

template <class Kind, class Pool>
void trellis_product(const TrellisFormat& f, const float* x, int64_t batch, Pool& pool, float* y) {
  using Level = typename Kind::Level;
  const std::vector<TrellisBlock> blocks = trellis_blocks(f);
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
        Kind::decode(f, b, streams + at / 8 * b.rate, std::min<int64_t>(kTile, rows - at),
                     levels.get());
        Kind::multiply(b, i, levels.get(), input, batch, &sums[at], stride);
      }
    }
    float* to = shares > 1 ? &partial[share * batch * f.rows] : y;
    const int64_t kept = f.outlier_starts[cut], all = f.outlier_starts[cut + 1] - kept;
    for (int64_t n = 0; n < batch; n++) {
      for (int64_t r = 0; r < rows; r++)
        to[n * f.rows + row + r] = sums[n * stride + r] * f.row_scales[row + r];
      for (int64_t i = kept + share * all / shares; i < kept + (share + 1) * all / shares; i++)
        to[n * f.rows + f.outlier_rows[i]] += x[n * f.cols + f.outlier_cols[i]] * f.outlier_values[i];
    }
  });
  if (shares == 1) return;
  for (int64_t i = 0; i < batch * f.rows; i++) {
    y[i] = partial[i];
    for (int64_t s = 1; s < shares; s++) y[i] += partial[s * batch * f.rows + i];
  }
}

}  // namespace
