// What products with trellis codes need beside simd.h: how columns of windows become a block of
// int8 levels, four columns of a row side by side, and how such a block is multiplied.
//
// A window of L bits at stride K begins at bit r K of its column's stream, so that 8 rows begin with
// a byte. What is read beyond a stream belongs to others, or is kTrellisSlack at the end.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {
using namespace simd;

constexpr int kTile = 64;           // rows that are decoded together
constexpr int kTrellisSlack = 128;  // bytes behind the last stream
constexpr int kPartBytes = 256 + 2 * 64 + 3 * 128;  // of LongWindows: see trellis_parts.py

// Levels of windows of up to 8 bits: 256 of them, repeated where there are fewer, plus kBias.
// `packed` are those of 4 columns, of a tile: [row][column].
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline Bytes quad(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Where the 64 windows of a column are: position 16 l + 4 j + i of a vector has row 16 j + 4 l + i,
// which interleaving four columns brings in order. Four rows come from 32 bits: they begin at bit 0
// or 4 of a byte, and take 3 K + L bits, of at most 12 where K is 6.
struct Spread {
  Spread(int rate, int first) {
    alignas(64) uint8_t bytes[64], bits[64];
    for (int at = 0; at < 64; at++) {
      const int l = at / 16, half = at / 8 % 2, odd = at / 4 % 2;  // j = 2 half + odd
      const int bit = (16 * (2 * half + odd) + 4 * l) * rate;
      bytes[at] = bit / 8 + at % 4;
      bits[at] = 32 * odd + bit % 8 + at % 4 * rate + first;
    }
    from = load(bytes), shift = load(bits);
  }
  Bytes from, shift;
};

// Four columns of 64 rows each, to rows of four.
inline void interleave(const Bytes (&column)[4], uint8_t* packed) {
  const Bytes low01 = _mm512_unpacklo_epi8(column[0], column[1]);
  const Bytes high01 = _mm512_unpackhi_epi8(column[0], column[1]);
  const Bytes low23 = _mm512_unpacklo_epi8(column[2], column[3]);
  const Bytes high23 = _mm512_unpackhi_epi8(column[2], column[3]);
  _mm512_storeu_si512(packed, _mm512_unpacklo_epi16(low01, low23));
  _mm512_storeu_si512(packed + 64, _mm512_unpackhi_epi16(low01, low23));
  _mm512_storeu_si512(packed + 128, _mm512_unpacklo_epi16(high01, high23));
  _mm512_storeu_si512(packed + 192, _mm512_unpackhi_epi16(high01, high23));
}

#define GPTVQ_SHORT_WINDOWS 1
struct ShortWindows {
  ShortWindows(const uint8_t* levels, int rate) : spread(rate, 0), table(levels) {}
  void operator()(const uint8_t* stream, int64_t size, int64_t, uint8_t* packed) const {
    Bytes column[4];
    for (int c = 0; c < 4; c++) {
      const Bytes bytes = _mm512_permutexvar_epi8(spread.from, load(stream + c * size));
      column[c] = table(_mm512_multishift_epi64_epi8(spread.shift, bytes));
    }
    interleave(column, packed);
  }
  const Spread spread;
  const Table<8> table;
};

// Levels of windows of 9 to 12 bits, worked out: the rank of a window is the exclusive or of what its
// lower bits and its highest 4 stand for (trellis_table.py), of which only the sign is needed where
// levels are those of a symmetric distribution. A level is that of the next 7 bits of the rank, and
// what the last ones add to it, which depends on how steep the distribution is there.
#define GPTVQ_LONG_WINDOWS 1
struct LongWindows {
  LongWindows(const uint8_t* parts, int rate, int bits)
      : low(rate, 0), high(rate, bits - 4), of_low(parts), of_high(load(parts + 256)),
        rest(load(parts + 320)), level{load(parts + 384), load(parts + 448)},
        slope{load(parts + 512), load(parts + 576)}, step{load(parts + 640), load(parts + 704)},
        last(fill((1 << (bits - 8)) - 1)) {}
  void operator()(const uint8_t* stream, int64_t size, int64_t, uint8_t* packed) const {
    Bytes column[4];
    for (int c = 0; c < 4; c++) {
      const Bytes bytes = _mm512_permutexvar_epi8(low.from, load(stream + c * size));
      const Bytes top = _mm512_multishift_epi64_epi8(high.shift, bytes);
      Bytes rank = _mm512_xor_si512(of_low(_mm512_multishift_epi64_epi8(low.shift, bytes)),
                                    _mm512_permutexvar_epi8(top, of_high));
      Bytes more = _mm512_permutexvar_epi8(top, rest);
      const __mmask64 lower = ~_mm512_movepi8_mask(rank);  // half, which mirrors the upper one
      rank = _mm512_mask_sub_epi8(rank, lower, fill(127), rank);
      more = _mm512_mask_sub_epi8(more, lower, last, more);
      const Bytes steep = _mm512_permutex2var_epi8(slope[0], rank, slope[1]);
      const Bytes added =
          _mm512_permutex2var_epi8(step[0], _mm512_or_si512(steep, more), step[1]);
      const Bytes found =
          _mm512_add_epi8(_mm512_permutex2var_epi8(level[0], rank, level[1]), added);
      column[c] = _mm512_mask_sub_epi8(found, lower, _mm512_setzero_si512(), found);
    }
    interleave(column, packed);
  }
  const Spread low, high;
  const Table<8> of_low;
  const Bytes of_high, rest, level[2], slope[2], step[2], last;
};

#elif defined(__AVX2__) && defined(__FMA__)

inline Bytes quad(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

#define GPTVQ_SHORT_WINDOWS 1
// 16 rows of a column at a time: of each, the two bytes that hold its window are moved to the top
// by a multiplication. Lanes hold rows 0-3, 8-11 and 4-7, 12-15, which interleaving brings in order.
struct ShortWindows {
  ShortWindows(const uint8_t* levels, int rate) : rate(rate), table(levels) {
    alignas(32) uint8_t bytes[32];
    alignas(32) uint16_t factors[16];
    for (int at = 0; at < 16; at++) {
      const int row = at / 8 * 4 + at / 4 % 2 * 8 + at % 4, bit = row * rate;
      bytes[2 * at] = bit / 8, bytes[2 * at + 1] = bit / 8 + 1;
      factors[at] = 1 << (8 - bit % 8);
    }
    from = load(bytes), lift = load(factors);
  }
  void operator()(const uint8_t* stream, int64_t size, int64_t rows, uint8_t* packed) const {
    for (int64_t row = 0; row < rows; row += 16, stream += 2 * rate, packed += 64) {
      const Bytes first = both(stream, size), second = both(stream + 2 * size, size);
      store(packed, _mm256_unpacklo_epi16(first, second));
      store(packed + 32, _mm256_unpackhi_epi16(first, second));
    }
  }

 private:
  static void store(uint8_t* to, Bytes v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  }
  Bytes lifted(const uint8_t* stream) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream));
    return _mm256_mullo_epi16(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), from), lift);
  }
  Bytes both(const uint8_t* stream, int64_t size) const {  // levels of two columns, side by side
    const Bytes even = _mm256_srli_epi16(lifted(stream), 8), odd = lifted(stream + size);
    return table(_mm256_or_si256(even, _mm256_and_si256(odd, _mm256_set1_epi16(-256))));
  }
  const int rate;
  const Table<8> table;
  Bytes from, lift;
};

#else
inline Bytes quad(const int8_t* x) {
  alignas(16) int8_t four[16];
  for (int i = 0; i < 16; i += 4) std::memcpy(four + i, x, 4);
  return load(four);
}
#endif

// sums[n][row] += factors[n] (starts[n] + products of a tile with x[n]), for G vectors of rows and N
// rows of x. `packed` are `quads` times four columns of a tile.
template <int G, int N>
inline void multiply_tile(const uint8_t* packed, int64_t quads, const int8_t* const* x,
                          const int32_t* starts, const float* factors, float* const* sums) {
  constexpr int kRows = kLanes / 4;  // of a vector
  for (int first = 0; first < kTile / kRows; first += G) {
    Ints sum[G][N];
    for (int n = 0; n < N; n++) {
      alignas(64) int32_t start[kRows];
      for (int32_t& lane : start) lane = starts[n];
      for (int g = 0; g < G; g++) std::memcpy(&sum[g][n], start, sizeof(Ints));
    }
    const uint8_t* p = packed + first * kLanes;
    for (int64_t q = 0; q < quads; q++, p += 4 * kTile) {
      Bytes weight[G];
      for (int g = 0; g < G; g++) weight[g] = load(p + g * kLanes);
      for (int n = 0; n < N; n++) {
        const Bytes input = quad(x[n] + 4 * q);
        for (int g = 0; g < G; g++) sum[g][n] = dot(sum[g][n], weight[g], input);
      }
    }
    for (int n = 0; n < N; n++)
      for (int g = 0; g < G; g++) {
        float* to = sums[n] + (first + g) * kRows;
        Floats total;
        std::memcpy(&total, to, sizeof total);
        total = fma(to_float(sum[g][n]), factors[n], total);
        std::memcpy(to, &total, sizeof total);
      }
  }
}

}  // namespace
