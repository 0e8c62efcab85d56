// Vectors of 16 bytes in Arm NEON; see simd.h.
#pragma once
#define SIMD_NAME "neon"

namespace simd {
constexpr bool kFewRegisters = false;
constexpr int kTile = 4;
constexpr int kLanes = 16, kSlack = 16;
constexpr uint8_t kBias = 0, kTableBias = kBias;
constexpr bool kMagnitudes = false;
using Bytes = uint8x16_t;
using Ints = int32x4_t;
using Floats = float32x4_t;

using Split = PlainSplit;

inline Bytes load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
inline void store(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
inline Bytes keep(Bytes v) {
  asm("" : "+w"(v));
  return v;
}
inline Ints in_order(Ints v) { return v; }
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
inline Ints dot_table(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }
inline Bytes with_signs(Bytes weight, const void*) { return weight; }
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x, Bytes weight2, Bytes x2) {
  return dot(dot(acc, weight, x), weight2, x2);
}

// Codes straddle two bytes at most: each 16-bit lane takes both and shifts its code down.
inline int code_at(int, int lane) { return lane; }
template <int B>
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
    if constexpr (B == 4) {
      return vqtbl1q_u8(part[0], code);
    } else if constexpr (B == 5) {
      return vqtbl2q_u8({part[0], part[1]}, code);
    } else {
      Bytes found = fill(0);
      for (int i = 0; i < kParts; i += 4) {  // out of range keeps what was found
        uint8x16x4_t four = {part[i], part[i + 1], part[i + 2], part[i + 3]};
        found = vqtbx4q_u8(found, four, vsubq_u8(code, fill(16 * i)));
      }
      return found;
    }
  }
  static constexpr int kParts = 1 << (B - 4);
  Bytes part[kParts];
};
template <int B>
using Lookup = Table<B>;
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
