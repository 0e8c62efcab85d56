// Vectors of 32 bytes in AVX2; see simd.h.
#pragma once
#define SIMD_NAME "avx2"

namespace simd {
constexpr bool kFewRegisters = true;
constexpr int kTile = 4;
constexpr int kLanes = 32, kSlack = 16;
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;

#if defined(__AVXVNNI__)
constexpr uint8_t kBias = 0, kTableBias = 128;
constexpr bool kMagnitudes = false;
#else
constexpr uint8_t kBias = 0, kTableBias = 0;
constexpr bool kMagnitudes = true;
#endif

inline Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Bytes keep(Bytes v) {
  asm("" : "+x"(v));
  return v;
}
inline Ints in_order(Ints v) {
  asm("" : "+x"(v));
  return v;
}
inline Bytes fill(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Bytes mask(Bytes v, int bits) { return _mm256_and_si256(v, fill((1 << bits) - 1)); }
inline Bytes shift(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
inline Bytes code(Bytes v, int first, int bits) { return mask(shift(v, first), bits); }
inline Ints add_pairs(Ints acc, __m256i pairs) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// |w| as the unsigned operand, its sign moved to x: no pair of products leaves int16.
inline Ints dot(Ints acc, Bytes weight, Bytes x) {
  return add_pairs(acc,
                   _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight)));
}
// Without VNNI, magnitudes as the unsigned operand: 2 x 127 x -128 is in int16.
inline Ints dot_table(Ints acc, Bytes weight, Bytes x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, weight, x);
#else
  return add_pairs(acc, _mm256_maddubs_epi16(x, weight));
#endif
}
// ~w is -w - 1: x w = |x| ~w + |x| where x is negative, of which sums begin with the last.
inline Bytes with_signs(Bytes weight, const void* signs) {
  if constexpr (kMagnitudes) return _mm256_xor_si256(weight, load(signs));
  return weight;
}
// Two sums of pairs fit 16 bits.
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x, Bytes weight2, Bytes x2) {
#if defined(__AVXVNNI__)
  return dot_table(dot_table(acc, weight, x), weight2, x2);
#else
  return add_pairs(acc, _mm256_add_epi16(_mm256_maddubs_epi16(weight, x),
                                         _mm256_maddubs_epi16(weight2, x2)));
#endif
}

// Codes straddle two bytes at most: each 16-bit lane takes both, moves its code to the top by a
// multiplication and back down. Codes of 6 bits come two by two in words that hold bits 0 to 15 and
// 8 to 23 of four: of each, one is multiplied to the upper byte and one to the lower, the second
// code first.
inline int code_at(int bits, int lane) { return bits == 6 ? lane ^ 1 : lane; }
template <int B>
struct Unpack {
  explicit Unpack(int bits) : bits(bits), down(_mm_cvtsi32_si128(16 - bits)) {
    alignas(32) uint8_t from[2][32];
    alignas(32) uint16_t up[2][16];
    for (int lane = 0; lane < 32; lane++) {
      // packus takes lanes 0-7 of the first, 0-7 of the second, then 8-15 of both.
      int half = lane / 16, word = lane % 16 / 8, at = lane % 8;
      int bit = lane % 16 * bits, slot = half * 8 + at;
      from[word][2 * slot] = bit / 8, from[word][2 * slot + 1] = bit / 8 + 1;
      up[word][slot] = 1 << (16 - bits - bit % 8);
      if (B == 6) from[0][lane] = lane % 16 / 4 * 3 + (lane % 4 + 1) / 2;
    }
    for (int w = 0; w < 2; w++) {
      spread[w] = load(from[w]), lift[w] = load(up[w]);
    }
  }
  Bytes operator()(const uint8_t* p) const {
    if constexpr (B == 8) return load(p);
    const __m256i packed = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * bits)), 1);
    if constexpr (B == 6) return four_in_three(_mm256_shuffle_epi8(packed, spread[0]));
    __m256i part[2];
    for (int w = 0; w < 2; w++) {
      __m256i pair = _mm256_shuffle_epi8(packed, spread[w]);
      part[w] = _mm256_srl_epi16(_mm256_mullo_epi16(pair, lift[w]), down);
    }
    return _mm256_packus_epi16(part[0], part[1]);
  }
  static Bytes four_in_three(Bytes words) {
    auto of = [&](int mask) { return _mm256_and_si256(words, _mm256_set1_epi32(mask)); };
    return _mm256_or_si256(
        _mm256_mulhi_epu16(of(0xfc000fc0), _mm256_set1_epi32(1 << 22 | 1 << 10)),
        _mm256_mullo_epi16(of(0x03f0003f), _mm256_set1_epi32(1 << 20 | 1 << 8)));
  }
  int bits;
  __m128i down;
  Bytes spread[2], lift[2];
};

template <int B>
struct Table {
  explicit Table(const uint8_t* t) {
    for (int i = 0; i < kParts; i++)
      part[i] = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(t + 16 * i)));
  }
  Bytes operator()(Bytes code) const {
    if constexpr (B == 4) return _mm256_shuffle_epi8(part[0], code);
    // A shuffle takes 16 entries: choose between halves of the table bit by bit, from bit 4 up.
    Bytes low = mask(code, 4), found[kParts];
    for (int i = 0; i < kParts; i++) found[i] = _mm256_shuffle_epi8(part[i], low);
    for (int bit = 4, n = kParts / 2; n; bit++, n /= 2) {
      Bytes high = _mm256_slli_epi16(code, 7 - bit);  // bit 7 of a byte chooses in a blend
      for (int i = 0; i < n; i++)
        found[i] = _mm256_blendv_epi8(found[2 * i], found[2 * i + 1], high);
    }
    return found[0];
  }
  static constexpr int kParts = 1 << (B - 4);
  Bytes part[kParts];
};

// A shuffle takes 16 entries, and gives 0 where bit 7 of a code is set. So of larger tables each
// part of 16 entries but the first is stored as its difference (exclusive or) from the one before,
// and looked up by what a code is above its first entry: below it, 0 is found.
template <int B>
struct Lookup {
  explicit Lookup(const uint8_t* t) : entries(t) {}
  Bytes operator()(Bytes code) const {
    if constexpr (B < 8) return parts(0, code);
    const Bytes low = mask(code, 7);
    return _mm256_blendv_epi8(parts(0, low), parts(8, low), code);
  }
  Bytes parts(int first, Bytes code) const {
    Bytes found = shuffle(first, code);
    for (int i = 1; i < kParts; i++)
      found = _mm256_xor_si256(found, shuffle(first + i, _mm256_sub_epi8(code, fill(16 * i))));
    return found;
  }
  Bytes shuffle(int part, Bytes code) const {
    const auto* at = reinterpret_cast<const __m128i*>(entries + 16 * part);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(at)), code);
  }
  static constexpr int kParts = B == 8 ? 8 : 1 << (B - 4);
  const uint8_t* entries;
};
constexpr int kSmallTable = 4;

struct Split {
  Split(int size, int dim, uint8_t bias) : size(size), dim(dim), bias(bias) {}
  template <int B>
  void operator()(const int8_t* book, uint8_t* planes) const {
    if (dim == 2 && size % 16 == 0) pairs(book, planes, 1 << B);
    else
      for (int d = 0; d < dim; d++)
        split_plane(book + d, size, dim, bias, 1 << B, planes + (d << B));
    if constexpr (B > 4)
      for (int part = (dim << (B - 4)) - 1; part > 0; part--)
        if (part % Lookup<B>::kParts) difference(planes + 16 * part);
  }

 private:
  void pairs(const int8_t* book, uint8_t* planes, int plane_size) const {
    const __m256i even_first = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    for (int k = 0; k < plane_size; k += 16) {
      const __m256i both = _mm256_shuffle_epi8(load(book + k % size * 2), even_first);
      const __m256i planar = _mm256_xor_si256(_mm256_permute4x64_epi64(both, 0b11011000),
                                              fill(bias));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + k), _mm256_castsi256_si128(planar));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + plane_size + k),
                       _mm256_extracti128_si256(planar, 1));
    }
  }
  static void difference(uint8_t* part) {
    auto* to = reinterpret_cast<__m128i*>(part);
    _mm_storeu_si128(to, _mm_xor_si128(_mm_loadu_si128(to), _mm_loadu_si128(to - 1)));
  }
  int size, dim;
  uint8_t bias;
};

// A shuffle for every 16 entries takes longer than loads. Two bytes are loaded as four.
constexpr bool whole_entries(int B, int D) { return B == 8 && D > 1; }
template <int D>
inline Bytes gather(const uint8_t* entries, Bytes code, int d) {
  constexpr int kCodes = kLanes / D;  // of this vector
  alignas(32) uint8_t codes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(codes), code);
  const auto* at = reinterpret_cast<const __m128i*>(codes + d * kCodes);
  const int* base = reinterpret_cast<const int*>(entries);
  if constexpr (D == 8) {
    const __m128i index = _mm_cvtepu8_epi32(_mm_loadu_si32(at));
    return _mm256_i32gather_epi64(reinterpret_cast<const long long*>(base), index, 8);
  } else if constexpr (D == 4) {
    return _mm256_i32gather_epi32(base, _mm256_cvtepu8_epi32(_mm_loadl_epi64(at)), 4);
  } else {
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at));
    const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(_mm_load_si128(at), 8));
    const __m256i pair = _mm256_set1_epi32(0xffff);
    const __m256i packed =  // of each half of both
        _mm256_packus_epi32(_mm256_and_si256(_mm256_i32gather_epi32(base, low, 2), pair),
                            _mm256_and_si256(_mm256_i32gather_epi32(base, high, 2), pair));
    return _mm256_permute4x64_epi64(packed, 0b11011000);
  }
}

inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fma(Floats a, float b, Floats c) { return fma(a, _mm256_set1_ps(b), c); }
inline float sum(Floats v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
}  // namespace simd
