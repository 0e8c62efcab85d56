// Vectors of 16 bytes in plain C++; see simd.h.
#pragma once
#define SIMD_NAME "scalar"

namespace simd {
constexpr bool kFewRegisters = false;
constexpr int kTile = 4;
constexpr int kLanes = 16, kSlack = 1;
constexpr uint8_t kBias = 0, kTableBias = kBias;
constexpr bool kMagnitudes = false;
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
inline void store(void* p, Bytes v) { std::memcpy(p, v.at, 16); }
inline Bytes keep(Bytes v) { return v; }
inline Ints in_order(Ints v) { return v; }
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
inline Ints dot_table(Ints acc, Bytes weight, Bytes x) { return dot(acc, weight, x); }
inline Bytes with_signs(Bytes weight, const void*) { return weight; }
inline Ints dot_nibbles(Ints acc, Bytes weight, Bytes x, Bytes weight2, Bytes x2) {
  return dot(dot(acc, weight, x), weight2, x2);
}

inline int code_at(int, int lane) { return lane; }
template <int B>
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
template <int B>
using Lookup = Table<B>;
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
