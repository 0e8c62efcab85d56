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

//   ints(value)  a vector of int32
//   interleave   four columns of a tile, one after another, to four columns of a row after another
//   ShortWindows, LongWindows
//                levels, plus kBias, of four streams of so many bytes, for all rows of a tile,
//                interleaved
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline Ints ints(int32_t value) { return _mm512_set1_epi32(value); }

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

inline void interleave(const uint8_t* column, uint8_t* packed) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  Bytes four[4];
  for (int c = 0; c < 4; c++)
    four[c] = _mm512_permutexvar_epi32(order, load(column + c * kTile));
  interleave(four, packed);
}

// Levels of windows of up to 8 bits, of which the tables lie in registers: 256 levels, repeated where
// there are fewer.
#define GPTVQ_SHORT_WINDOWS 1
struct ShortWindows {
  ShortWindows(const uint8_t* levels, int rate) : spread(rate, 0), table(levels) {}
  void operator()(const uint8_t* stream, int64_t size, uint8_t* packed) const {
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
struct LongWindows {
  LongWindows(const uint8_t* parts, int rate, int bits)
      : low(rate, 0), high(rate, bits - 4), of_low(parts), of_high(load(parts + 256)),
        rest(load(parts + 320)), level{load(parts + 384), load(parts + 448)},
        slope{load(parts + 512), load(parts + 576)}, step{load(parts + 640), load(parts + 704)},
        last(fill((1 << (bits - 8)) - 1)) {}
  void operator()(const uint8_t* stream, int64_t size, uint8_t* packed) const {
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

inline Ints ints(int32_t value) { return _mm256_set1_epi32(value); }
inline void interleave(const uint8_t* column, uint8_t* packed) {
  for (int row = 0; row < kTile; row += 32, packed += 128) {
    Bytes part[4], quads[4];
    for (int c = 0; c < 4; c++) part[c] = load(column + c * kTile + row);
    const Bytes low01 = _mm256_unpacklo_epi8(part[0], part[1]);
    const Bytes high01 = _mm256_unpackhi_epi8(part[0], part[1]);
    const Bytes low23 = _mm256_unpacklo_epi8(part[2], part[3]);
    const Bytes high23 = _mm256_unpackhi_epi8(part[2], part[3]);
    quads[0] = _mm256_unpacklo_epi16(low01, low23);  // rows 0-3 and 16-19, and so on
    quads[1] = _mm256_unpackhi_epi16(low01, low23);
    quads[2] = _mm256_unpacklo_epi16(high01, high23);
    quads[3] = _mm256_unpackhi_epi16(high01, high23);
    for (int i = 0; i < 4; i++) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + 16 * i),
                       _mm256_castsi256_si128(quads[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + 64 + 16 * i),
                       _mm256_extracti128_si256(quads[i], 1));
    }
  }
}

#elif defined(__aarch64__)

inline Ints ints(int32_t value) { return vdupq_n_s32(value); }
inline void interleave(const uint8_t* column, uint8_t* packed) {
  for (int row = 0; row < kTile; row += 16) {
    uint8x16x4_t four;
    for (int c = 0; c < 4; c++) four.val[c] = vld1q_u8(column + c * kTile + row);
    vst4q_u8(packed + 4 * row, four);
  }
}

#else

inline Ints ints(int32_t value) {
  return each<Ints>([=](int) { return value; });
}
inline void interleave(const uint8_t* column, uint8_t* packed) {
  for (int row = 0; row < kTile; row++)
    for (int c = 0; c < 4; c++) packed[4 * row + c] = column[c * kTile + row];
}
#endif

// `dot` where four neighbouring bytes belong to a lane: those of a row.
inline Ints dot_rows(Ints sum, Bytes weight, Bytes x) {
#if defined(__aarch64__) && !defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t a = vreinterpretq_s8_u8(weight), b = vreinterpretq_s8_u8(x);
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(sum, vpaddq_s16(low, high));  // of levels and digits of at most 127
#else
  return dot(sum, weight, x);
#endif
}

// Four bytes, repeated.
inline Bytes quad(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const Ints repeated = ints(four);
  Bytes same;
  std::memcpy(&same, &repeated, sizeof same);
  return same;
}

// sums[n][row] += factors[n] (products of a tile with x[n]), for G vectors of rows and N rows of x at
// a time. `packed` are `quads` times four columns of a tile; x[n] is `digits` Q times, to the base
// `base`, each the number given by `step` behind the one before, and products with them begin at
// starts[n][q].
template <int G, int N, int Q>
inline void multiply_tile(const uint8_t* packed, int64_t quads, const int8_t* const* x,
                          int64_t step, const int32_t (*starts)[Q], const float* factors,
                          float base, float* const* sums) {
  constexpr int kRows = kLanes / 4;  // of a vector
  const int8_t* rows[N * Q];
  for (int i = 0; i < N * Q; i++) rows[i] = x[i / Q] + i % Q * step;
  for (int first = 0; first < kTile / kRows; first += G) {
    Ints sum[N * Q * G];
#pragma GCC unroll 16
    for (int i = 0; i < N * Q * G; i++) sum[i] = ints(starts[i / (Q * G)][i / G % Q]);
    const uint8_t* p = packed + first * kLanes;
    for (int64_t q = 0; q < quads; q++, p += 4 * kTile) {
      Bytes weight[G];
#pragma GCC unroll 16
      for (int g = 0; g < G; g++) weight[g] = load(p + g * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < N * Q * G; i += G) {
        const Bytes input = quad(rows[i / G] + 4 * q);
#pragma GCC unroll 16
        for (int g = 0; g < G; g++) sum[i + g] = dot_rows(sum[i + g], weight[g], input);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N * G; i++) {
      const int n = i / G, g = i % G;
      float* to = sums[n] + (first + g) * kRows;
      Floats value = to_float(sum[(n * Q + Q - 1) * G + g]), total;
#pragma GCC unroll 16
      for (int q = Q - 2; q >= 0; q--)
        value = fma(value, 1 / base, to_float(sum[(n * Q + q) * G + g]));
      std::memcpy(&total, to, sizeof total);
      total = fma(value, factors[n], total);
      std::memcpy(to, &total, sizeof total);
    }
  }
}

}  // namespace
