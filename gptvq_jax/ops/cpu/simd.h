// Vectors of bytes in one instruction set, chosen at compile time:
//
//   kLanes        bytes in a vector
//   kBias         what is added to the int8 entries of a table, where `dot` wants unsigned weights
//   Unpack(bits)  reads kLanes codes of `bits` bits, least significant bit first. It may read
//                 kSlack bytes beyond them.
//   code(v, i, n) the code of n bits at bit i of every byte
//                 Both may leave other bits above a code where tables ignore them.
//   keep          its argument, in a register: otherwise compilers load again for each use
//   mask, shift   the low n bits of every byte; bytes shifted down (mask what is left above)
//   Split(K, D)   writes one plane for each d: entry [k, d] of a codebook at k, 0 <= k < 2^B, where
//                 a codebook of fewer than 2^B entries repeats
//   Table<B>      a plane in registers, looked up by the low B bits of every lane
//   whole_entries(B, D), gather<D>
//                 where shuffles would take longer, entries of D bytes are loaded whole: the d-th
//                 vector has those of the lanes from d kLanes / D on
//   dot           adds products of neighbouring bytes, weight x int8, to int32 lanes
//   dot_nibbles   the same for weights of 0 to 15
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
#define SIMD_NAME "avx512"

namespace simd {
constexpr int kLanes = 64, kSlack = 0;
constexpr uint8_t kBias = 128;
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline Bytes keep(Bytes v) {
  asm("" : "+v"(v));
  return v;
}
inline Bytes fill(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Bytes mask(Bytes v, int bits) { return _mm512_and_si512(v, fill((1 << bits) - 1)); }
inline Bytes shift(Bytes v, int n) { return _mm512_srli_epi16(v, n); }
// Tables repeat: bits above a code are ignored.
inline Bytes code(Bytes v, int first, int) { return first ? shift(v, first) : v; }
inline Ints dot(Ints acc, Bytes weight, Bytes x) { return _mm512_dpbusd_epi32(acc, weight, x); }
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }

// A qword takes the `bits` bytes of 8 codes, then shifts each code to a byte of its own.
struct Unpack {
  explicit Unpack(int bits) : bytes(bits == 8 ? ~0ull : (1ull << 8 * bits) - 1), whole(bits == 8) {
    alignas(64) uint8_t from[64], start[64];
    for (int i = 0; i < 64; i++) from[i] = (i / 8 * bits + i % 8) % 64, start[i] = i % 8 * bits;
    spread = load(from), shift = load(start);
  }
  Bytes operator()(const uint8_t* p) const {
    Bytes packed = _mm512_maskz_loadu_epi8(bytes, p);
    if (whole) return packed;
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, packed));
  }
  __mmask64 bytes;
  bool whole;
  Bytes spread, shift;
};

// Codebooks of at most 128 bytes are permuted as a whole.
struct Split {
  Split(int size, int dim, uint8_t bias) : size(size), dim(dim), bytes(size * dim), bias(bias) {
    for (int d = 0; d < dim; d++) {
      alignas(64) uint8_t at[64];
      for (int i = 0; i < 64; i++) at[i] = i % size * dim + d;
      from[d] = load(at);
    }
    auto mask = [&](int first) {
      int count = bytes - first;
      return count >= 64 ? ~0ull : count <= 0 ? 0ull : (1ull << count) - 1;
    };
    low = mask(0), high = mask(64);
  }
  template <int B>
  void operator()(const int8_t* book, uint8_t* planes) const {
    if (B > 6 || bytes > 128) {
      for (int d = 0; d < dim; d++)
        split_plane(book + d, size, dim, bias, 1 << B, planes + (d << B));
      return;
    }
    Bytes first = _mm512_maskz_loadu_epi8(low, book);
    Bytes second = bytes > 64 ? _mm512_maskz_loadu_epi8(high, book + 64) : first;
    for (int d = 0; d < dim; d++) {
      Bytes plane = _mm512_permutex2var_epi8(first, from[d], second);
      _mm512_storeu_si512(planes + 64 * d, _mm512_xor_si512(plane, fill(bias)));
    }
  }
  int size, dim, bytes;
  uint8_t bias;
  __mmask64 low, high;
  Bytes from[8];
};

template <int B>
struct Table {
  explicit Table(const uint8_t* t) {
    for (int i = 0; i < kParts; i++) part[i] = load(t + 64 * i);
  }
  Bytes operator()(Bytes code) const {
    if constexpr (B == 6) return _mm512_permutexvar_epi8(code, part[0]);
    if constexpr (B == 7) return _mm512_permutex2var_epi8(part[0], code, part[1]);
    if constexpr (B == 8)
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code),
                                    _mm512_permutex2var_epi8(part[0], code, part[1]),
                                    _mm512_permutex2var_epi8(part[2], code, part[3]));
  }
  static constexpr int kParts = B == 6 ? 1 : B == 7 ? 2 : 4;
  Bytes part[kParts];
};
constexpr int kSmallTable = 6;  // bits of the smallest table
constexpr bool whole_entries(int, int) { return false; }
template <int D>
Bytes gather(const uint8_t* entries, Bytes code, int d);

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fma(Floats a, float b, Floats c) { return fma(a, _mm512_set1_ps(b), c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
}  // namespace simd

#elif defined(__AVX2__) && defined(__FMA__)
#define SIMD_NAME "avx2"

namespace simd {
constexpr int kLanes = 32, kSlack = 16;
constexpr uint8_t kBias = 0;
using Bytes = __m256i;
using Ints = __m256i;
using Floats = __m256;

using Split = PlainSplit;

inline Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bytes keep(Bytes v) {
  asm("" : "+x"(v));
  return v;
}
inline Bytes fill(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints sub(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Bytes mask(Bytes v, int bits) { return _mm256_and_si256(v, fill((1 << bits) - 1)); }
inline Bytes shift(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
inline Bytes code(Bytes v, int first, int bits) { return mask(shift(v, first), bits); }
// |w| as the unsigned operand, its sign moved to x: no pair of products leaves int16.
inline Ints dot(Ints acc, Bytes weight, Bytes x) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(x, weight));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x) {
  __m256i pairs = _mm256_maddubs_epi16(weight, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Codes straddle two bytes at most: each 16-bit lane takes both, moves its code to the top by a
// multiplication and back down.
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
    }
    for (int w = 0; w < 2; w++) {
      spread[w] = load(from[w]), lift[w] = load(up[w]);
    }
  }
  Bytes operator()(const uint8_t* p) const {
    if (bits == 8) return load(p);
    __m256i packed = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 2 * bits)), 1);
    __m256i part[2];
    for (int w = 0; w < 2; w++) {
      __m256i pair = _mm256_shuffle_epi8(packed, spread[w]);
      part[w] = _mm256_srl_epi16(_mm256_mullo_epi16(pair, lift[w]), down);
    }
    return _mm256_packus_epi16(part[0], part[1]);
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
constexpr int kSmallTable = 4;

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

#elif defined(__aarch64__)
#define SIMD_NAME "neon"

namespace simd {
constexpr int kLanes = 16, kSlack = 16;
constexpr uint8_t kBias = 0;
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;

using Split = PlainSplit;

inline Bytes load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline Bytes keep(Bytes v) {
  asm("" : "+w"(v));
  return v;
}
inline Bytes fill(uint8_t value) { return vdupq_n_u8(value); }
inline Ints zero_ints() { return vdupq_n_s32(0); }
inline Ints sub(Ints a, Ints b) { return vsubq_s32(a, b); }
inline Bytes mask(Bytes v, int bits) { return vandq_u8(v, fill((1 << bits) - 1)); }
inline Bytes shift(Bytes v, int n) { return vshlq_u8(v, vdupq_n_s8(-n)); }
inline Bytes code(Bytes v, int first, int bits) { return mask(shift(v, first), bits); }
inline Ints dot(Ints acc, Bytes weight, Bytes x) {
  int8x16_t a = vreinterpretq_s8_u8(weight), b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(acc, a, b);
#else
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vpadalq_s16(vpadalq_s16(acc, low), high);
#endif
}
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }

// Codes straddle two bytes at most: each 16-bit lane takes both and shifts its code down.
struct Unpack {
  explicit Unpack(int bits) : mask(fill(bits == 8 ? 255 : (1 << bits) - 1)) {
    for (int lane = 0; lane < 16; lane++) {
      int bit = lane * bits;
      from[lane / 8][lane % 8 * 2] = bit / 8, from[lane / 8][lane % 8 * 2 + 1] = bit / 8 + 1;
      down[lane / 8][lane % 8] = -(bit % 8);
    }
  }
  Bytes operator()(const uint8_t* p) const {
    Bytes packed = load(p);
    // Of 8-bit codes, the last has no byte after it: the lookup gives 0 there.
    uint16x8_t low = vreinterpretq_u16_u8(vqtbl1q_u8(packed, load(from[0])));
    uint16x8_t high = vreinterpretq_u16_u8(vqtbl1q_u8(packed, load(from[1])));
    low = vshlq_u16(low, vld1q_s16(down[0])), high = vshlq_u16(high, vld1q_s16(down[1]));
    return vandq_u8(vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)), mask);
  }
  Bytes mask;
  uint8_t from[2][16];
  int16_t down[2][8];
};

template <int B>
struct Table {
  explicit Table(const uint8_t* t) {
    for (int i = 0; i < kParts; i++) part[i] = load(t + 16 * i);
  }
  Bytes operator()(Bytes code) const {
    if constexpr (B == 4) return vqtbl1q_u8(part[0], code);
    Bytes found = fill(0);
    for (int i = 0; i < kParts; i += 4) {  // out of range keeps what was found
      uint8x16x4_t four = {part[i], part[i + 1], part[i + 2], part[i + 3]};
      found = vqtbx4q_u8(found, four, vsubq_u8(code, fill(16 * i)));
    }
    return found;
  }
  static constexpr int kParts = 1 << (B - 4);
  Bytes part[kParts];
};
constexpr int kSmallTable = 4;
constexpr bool whole_entries(int, int) { return false; }
template <int D>
Bytes gather(const uint8_t* entries, Bytes code, int d);

inline Floats zero() { return vdupq_n_f32(0); }
inline Floats to_float(Ints v) { return vcvtq_f32_s32(v); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats fma(Floats a, float b, Floats c) { return vfmaq_n_f32(c, a, b); }
inline float sum(Floats v) { return vaddvq_f32(v); }
}  // namespace simd

#else
#define SIMD_NAME "scalar"

namespace simd {
constexpr int kLanes = 16, kSlack = 1;
constexpr uint8_t kBias = 0;
struct Bytes { uint8_t at[16]; };
struct Ints { int32_t at[4]; };
struct Floats { float at[4]; };

template <class V, class F>
inline V each(F f) {
  V v;
  for (unsigned i = 0; i < sizeof v.at / sizeof v.at[0]; i++) v.at[i] = f(i);
  return v;
}
using Split = PlainSplit;

inline Bytes load(const void* p) {
  Bytes v;
  std::memcpy(v.at, p, 16);
  return v;
}
inline Bytes keep(Bytes v) { return v; }
inline Bytes fill(uint8_t value) { return each<Bytes>([=](int) { return value; }); }
inline Ints zero_ints() { return each<Ints>([](int) { return 0; }); }
inline Ints sub(Ints a, Ints b) { return each<Ints>([=](int i) { return a.at[i] - b.at[i]; }); }
inline Bytes mask(Bytes v, int bits) {
  return each<Bytes>([=](int i) { return v.at[i] & ((1 << bits) - 1); });
}
inline Bytes shift(Bytes v, int n) { return each<Bytes>([=](int i) { return v.at[i] >> n; }); }
inline Bytes code(Bytes v, int first, int bits) { return mask(shift(v, first), bits); }
inline Ints dot(Ints acc, Bytes weight, Bytes x) {
  for (int i = 0; i < 16; i++)
    acc.at[i / 4] += static_cast<int8_t>(weight.at[i]) * static_cast<int8_t>(x.at[i]);
  return acc;
}
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }

struct Unpack {
  explicit Unpack(int bits) : bits(bits) {}
  Bytes operator()(const uint8_t* p) const {
    return each<Bytes>([&](int i) {
      int bit = i * bits, pair = p[bit / 8] | p[bit / 8 + 1] << 8;
      return (pair >> bit % 8) & ((1 << bits) - 1);
    });
  }
  int bits;
};

template <int B>
struct Table {
  explicit Table(const uint8_t* t) : entry(t) {}
  Bytes operator()(Bytes code) const {
    return each<Bytes>([&](int i) { return entry[code.at[i]]; });
  }
  const uint8_t* entry;
};
constexpr int kSmallTable = 4;
constexpr bool whole_entries(int, int) { return false; }
template <int D>
Bytes gather(const uint8_t* entries, Bytes code, int d);

inline Floats zero() { return each<Floats>([](int) { return 0.f; }); }
inline Floats to_float(Ints v) { return each<Floats>([=](int i) { return float(v.at[i]); }); }
inline Floats fma(Floats a, Floats b, Floats c) {
  return each<Floats>([=](int i) { return a.at[i] * b.at[i] + c.at[i]; });
}
inline Floats fma(Floats a, float b, Floats c) {
  return each<Floats>([=](int i) { return a.at[i] * b + c.at[i]; });
}
inline float sum(Floats v) { return v.at[0] + v.at[1] + v.at[2] + v.at[3]; }
}  // namespace simd
#endif
