// What one thread of the CUDA kernel computes, as C++ that any compiler takes: tests run it on a CPU.
//
// Codes have 4 bits. The 16 int8 values of one of the D places of a centroid are four 32-bit words,
// held in registers, and a lookup of four codes is three byte permutations: one among the first eight
// values, one among the last eight, and one that chooses by the highest bit of each code. No memory
// is asked, so no two lanes wait for a bank of it. A word of four decoded int8 weights meets a word of
// four digits of x in one dp4a.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define GPTVQ_DEVICE __host__ __device__ __forceinline__
#define GPTVQ_UNROLL _Pragma("unroll")
#else
#define GPTVQ_DEVICE inline
#define GPTVQ_UNROLL
#endif

namespace gptvq {

constexpr int kThreads = 128;    // of a block, which takes one tile of rows
constexpr int kUnitWords = 2;    // words of 8 codes of a row that a thread takes at a time
constexpr int kDigitBase = 254;  // x = scale (q0 + q1 / base + q2 / base^2)

// The arrays as layout.py makes them; see there for their shapes.
struct Problem {
  const uint32_t* codes;
  const uint32_t* tables;
  const float* scales;
  const uint32_t* x;
  const float* x_scales;
  float* y;
  int32_t batch, row_tiles, row_strips, col_strips, strip_tiles, units, strip_units;
  uint32_t strip_magic;  // ceil(2^31 / strip_units)
};

// Four bytes of the eight in `low` and `high`, by the four low nibbles of `select`, each 0 to 7.
GPTVQ_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, select);
#else
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++)
    result |= static_cast<uint32_t>(bytes >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return result;
#endif
}

// sum + the products of four pairs of int8.
GPTVQ_DEVICE int32_t dot4(uint32_t a, uint32_t b, int32_t sum) {
#ifdef __CUDA_ARCH__
  return __dp4a(static_cast<int32_t>(a), static_cast<int32_t>(b), sum);
#else
  for (int i = 0; i < 32; i += 8)
    sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
#endif
}

// `Count` words, 2 or 4, from where they are aligned to their size.
template <int Count>
GPTVQ_DEVICE void load(const uint32_t* from, uint32_t* to) {
#ifdef __CUDA_ARCH__
  if constexpr (Count == 4) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
    to[0] = v.x, to[1] = v.y;
  }
#else
  std::memcpy(to, from, 4 * Count);
#endif
}

// What selects the values of four codes: `place` among eight values, `half` between the two eights.
struct Selectors {
  uint32_t place, half;
};

// For the eight codes of a word; those of the last four are 16 bits higher.
GPTVQ_DEVICE Selectors selectors(uint32_t word) {
  return {word & 0x77777777u, (word >> 1 & 0x44444444u) | 0x32103210u};
}

// Of table t[4], the values of four codes.
GPTVQ_DEVICE uint32_t lookup(const uint32_t* t, Selectors s) {
  return permute(permute(t[0], t[1], s.place), permute(t[2], t[3], s.place), s.half);
}

// The share of thread `thread` in the products of `Rows` rows of the weight, tile `tile`, with
// `Batch` rows of x from `first` on. `Digits` of 8 bits hold x. Rows of x past the last are the last
// one again.
template <int D, int Rows, int Digits, int Batch>
GPTVQ_DEVICE void thread_sums(const Problem& p, int tile, int first, int thread,
                              float (&sums)[Batch][Rows]) {
  constexpr int kQuads = kUnitWords * Rows / 4;    // of code words in a unit
  constexpr int kPiece = 2 * D < 4 ? 2 * D : 4;    // words of x side by side
  constexpr int kPieces = 2 * D / kPiece;          // of a digit, for the eight codes of a word
  GPTVQ_UNROLL for (int n = 0; n < Batch; n++) GPTVQ_UNROLL for (int r = 0; r < Rows; r++)
      sums[n][r] = 0;
  const int row_strip = tile / p.strip_tiles;
  const int64_t x_row = int64_t{kUnitWords} * Digits * 2 * D * p.units;
  const uint32_t* const codes = p.codes + int64_t{4} * kQuads * p.units * tile;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int unit = thread; unit < p.units; unit += kThreads) {
    const int strip = static_cast<int>(static_cast<uint64_t>(unit) * p.strip_magic >> 31);
    const int group = strip * p.row_strips + row_strip;
    uint32_t table[D][4];
    GPTVQ_UNROLL for (int d = 0; d < D; d++) load<4>(p.tables + 4 * (int64_t{D} * group + d), table[d]);
    int32_t dots[Batch][Rows][Digits] = {};
    GPTVQ_UNROLL for (int u = 0; u < kUnitWords; u++) {
      uint32_t words[Rows], x[Batch][Digits][2 * D];
      GPTVQ_UNROLL for (int q = 0; q < Rows / 4; q++)
          load<4>(codes + 4 * (int64_t{u * Rows / 4 + q} * p.units + unit), words + 4 * q);
      GPTVQ_UNROLL for (int n = 0; n < Batch; n++) {
        const int row = first + n < p.batch ? first + n : p.batch - 1;
        GPTVQ_UNROLL for (int q = 0; q < Digits; q++) GPTVQ_UNROLL for (int i = 0; i < kPieces; i++) {
          const int64_t piece = (u * Digits + q) * kPieces + i;
          load<kPiece>(p.x + x_row * row + kPiece * (piece * p.units + unit), x[n][q] + kPiece * i);
        }
      }
      GPTVQ_UNROLL for (int r = 0; r < Rows; r++) {
        Selectors s = selectors(words[r]);
        GPTVQ_UNROLL for (int four = 0; four < 2; four++) {
          GPTVQ_UNROLL for (int d = 0; d < D; d++) {
            const uint32_t weights = lookup(table[d], s);
            GPTVQ_UNROLL for (int n = 0; n < Batch; n++) GPTVQ_UNROLL for (int q = 0; q < Digits; q++)
                dots[n][r][q] = dot4(weights, x[n][q][2 * d + four], dots[n][r][q]);
          }
          s = {s.place >> 16, s.half >> 16};
        }
      }
    }
    const float scale = p.scales[group];
    GPTVQ_UNROLL for (int n = 0; n < Batch; n++) {
      const int row = first + n < p.batch ? first + n : p.batch - 1;
      const float step = scale * p.x_scales[int64_t{row} * p.col_strips + strip] *
                         (1.0f / kDigitBase);
      GPTVQ_UNROLL for (int r = 0; r < Rows; r++) {
        // Two digits as one integer: at most 16 D weights, so below 2^28.
        float dot = static_cast<float>(dots[n][r][0] * kDigitBase + dots[n][r][1]);
        if constexpr (Digits == 3) dot += static_cast<float>(dots[n][r][2]) * (1.0f / kDigitBase);
        sums[n][r] += dot * step;
      }
    }
  }
}

}  // namespace gptvq
