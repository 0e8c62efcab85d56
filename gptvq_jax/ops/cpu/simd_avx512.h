// Vectors of 64 bytes in AVX-512 with VBMI and VNNI; see simd.h.
#pragma once
#define SIMD_NAME "avx512"

namespace simd {
constexpr bool kFewRegisters = false;
constexpr int kTile = 8;
constexpr int kLanes = 64, kSlack = 0;
constexpr uint8_t kBias = 128, kTableBias = kBias;
constexpr bool kMagnitudes = false;
using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
inline Bytes keep(Bytes v) {
  asm("" : "+v"(v));
  return v;
}
inline Ints in_order(Ints v) {
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
inline Ints dot_table(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }
inline Bytes with_signs(Bytes weight, const void*) { return weight; }
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x, Bytes weight2, Bytes x2) {
  return dot(dot(acc, weight, x), weight2, x2);
}

// A qword takes the `bits` bytes of 8 codes, then shifts each code to a byte of its own.
inline int code_at(int, int lane) { return lane; }
template <int B>
struct Unpack {
  explicit Unpack(int bits) : bytes(bits == 8 ? ~0ull : (1ull << 8 * bits) - 1) {
    alignas(64) uint8_t from[64], start[64];
    for (int i = 0; i < 64; i++) from[i] = (i / 8 * bits + i % 8) % 64, start[i] = i % 8 * bits;
    spread = load(from), shift = load(start);
  }
  Bytes operator()(const uint8_t* p) const {
    Bytes packed = _mm512_maskz_loadu_epi8(bytes, p);
    if constexpr (B == 8) return packed;
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(spread, packed));
  }
  __mmask64 bytes;
  Bytes spread, shift;
};

// Codebooks of at most 128 bytes are permuted as a whole, larger ones of pairs 128 bytes at a time.
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
    if (dim == 2 && bytes > 128 && size == 1 << B) {
      for (int k = 0; k < size; k += 64) {
        const Bytes first = load(book + 2 * k), second = load(book + 2 * k + 64);
        for (int d = 0; d < 2; d++) {
          const Bytes plane = _mm512_permutex2var_epi8(first, from[d], second);
          store(planes + (d << B) + k, _mm512_xor_si512(plane, fill(bias)));
        }
      }
      return;
    }
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
template <int B>
using Lookup = Table<B>;
constexpr int kSmallTable = 6;  // bits of the smallest table
constexpr bool whole_entries(int, int) { return false; }
template <int D>
Bytes gather(const uint8_t* entries, Bytes code, int d);

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fma(Floats a, float b, Floats c) { return fma(a, _mm512_set1_ps(b), c); }
inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
// Four at once: pairs of lanes, then pairs of these, then the quarters of the vector.
inline void sums(const Floats (&v)[4], float* y) {
  const auto of_two = [](Floats a, Floats b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d first = _mm512_castps_pd(of_two(v[0], v[1]));
  const __m512d second = _mm512_castps_pd(of_two(v[2], v[3]));
  const Floats of_four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                       _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(of_four),
                                    _mm512_extractf32x8_ps(of_four, 1));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
}  // namespace simd
