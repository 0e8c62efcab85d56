// Vectors of bytes in one instruction set, chosen at compile time:
//
//   kLanes        bytes in a vector
//   kFewRegisters 16 of them, not 32
//   kTile         rows whose sums and codes stay in registers, of weights in 1 or 2 digits
//   kBias, kTableBias
//                 what is added to int8 weights where `dot`, or `dot_table`, wants unsigned ones
//   kMagnitudes   where `dot_table` takes magnitudes of activations, 0 to 127, and weights in which
//                 `with_signs` has inverted all bits where a byte of signs is 255, and not where it
//                 is 0; elsewhere with_signs changes nothing, and no signs are read
//   Unpack<B>(bits)
//                 reads kLanes codes of `bits` bits, at most B, least significant bit first. It may
//                 read kSlack bytes beyond them. Lane l holds code code_at(bits, l).
//   code(v, i, n) the code of n bits at bit i of every byte
//                 Both may leave other bits above a code where tables ignore them.
//   keep          its argument, in a register: otherwise compilers load again for each use
//   mask, shift   the low n bits of every byte; bytes shifted down (mask what is left above)
//   in_order      its argument: a sum that stays in one register, added to as the program says
//   Split(K, D)   writes one plane for each d: entry [k, d] of a codebook at k, 0 <= k < 2^B, where
//                 a codebook of fewer than 2^B entries repeats; in the form that Lookup<B> reads
//   Table<B>      2^B bytes as they are, looked up by the low B bits of every lane
//   Lookup<B>     the same of a plane, by codes of at most B bits
//   whole_entries(B, D), gather<D>
//                 where shuffles would take longer, entries of D bytes are loaded whole: the d-th
//                 vector has those of the lanes from d kLanes / D on
//   dot, dot_table
//                 adds products of neighbouring bytes, weight x int8, to int32 lanes
//   dot_nibbles   the same for two vectors of weights of 0 to 15
//   sums          y[t], the sum of the lanes of v[t]
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace simd {
inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t rest = h & 0x7fffu, bits = (rest << 13) + (rest >= 0x7c00 ? 224u << 23 : 112u << 23);
  float value;
  std::memcpy(&value, &bits, 4);
  if (rest < 0x400) value = rest * 5.9604644775390625e-8f;  // subnormal: an integer times 2^-24
  return h & 0x8000u ? -value : value;
#endif
}
inline void half_to_floats(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < count; i++) to[i] = half_to_float(from[i]);
}
inline void split_plane(const int8_t* book, int size, int dim, uint8_t bias, int plane_size,
                        uint8_t* plane) {
  for (int k = 0; k < size; k++) plane[k] = static_cast<uint8_t>(book[k * dim]) ^ bias;
  for (int k = size; k < plane_size; k += size) std::memcpy(plane + k, plane, size);
}
struct PlainSplit {
  PlainSplit(int size, int dim, uint8_t bias) : size(size), dim(dim), bias(bias) {}
  template <int B>
  void operator()(const int8_t* book, uint8_t* planes) const {
    for (int d = 0; d < dim; d++) split_plane(book + d, size, dim, bias, 1 << B, planes + (d << B));
  }
  int size, dim;
  uint8_t bias;
};
}  // namespace simd

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace simd {
template <int T>
void sums(const Floats (&v)[T], float* y) {
  if constexpr (T > 4 && T % 4 == 0) {
    for (int t = 0; t < T; t += 4) {
      const Floats four[4] = {v[t], v[t + 1], v[t + 2], v[t + 3]};
      sums(four, y + t);
    }
  } else {
    for (int t = 0; t < T; t++) y[t] = sum(v[t]);
  }
}
}  // namespace simd
