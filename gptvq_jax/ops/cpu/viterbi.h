// Viterbi search of trellis-coded columns (see moves/viterbi.py, which says what it computes).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"

namespace {

// Of one search: the costs of all windows before and after a row, and the way back.
struct Trellis {
  const float* table;
  int64_t bits, rate;
  std::vector<float> cost, next;
  std::vector<uint8_t> origin;

  int64_t size() const { return int64_t{1} << bits; }
  int64_t rest() const { return size() >> rate; }
};

constexpr int kLanes = 16;  // compilers split what is wider than their registers
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <class V, class T>
V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
void store(V v, T* to) {
  std::memcpy(to, &v, sizeof v);
}

// Lanes PART * 16 / FAN on, each FAN times.
template <int FAN, int PART, int... I>
Floats repeated(Floats v, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (PART * kLanes / FAN + I / FAN)...);
#else
  return __builtin_shuffle(v, Ints{(PART * kLanes / FAN + I / FAN)...});
#endif
}

// Costs after a row of 16 groups of FAN windows, all of which come from one of FAN.
template <int FAN, int... PART>
void step_lanes(const float* from, const float* table, int64_t rest, float z, float w, float* to,
                uint8_t* origin, std::integer_sequence<int, PART...>) {
  Floats least = load<Floats>(from);
  Ints which{};
  for (int b = 1; b < FAN; b++) {
    const Floats other = load<Floats>(from + b * rest);
    const Ints less = other < least;
    which = less ? Ints{} + b : which;
    least = less ? other : least;
  }
  store(__builtin_convertvector(which, Bytes), origin);
  auto extend = [&](Floats best, int part) {
    const Floats gap = z - load<Floats>(table + part * kLanes);
    store(best + w * gap * gap, to + part * kLanes);
  };
  (extend(repeated<FAN, PART>(least, std::make_integer_sequence<int, kLanes>{}), PART), ...);
}

template <int FAN>
void step(const float* from, const float* table, int64_t rest, float z, float w, float* to,
          uint8_t* origin) {
  int64_t i = 0;
  for (; i + kLanes <= rest; i += kLanes)
    step_lanes<FAN>(from + i, table + i * FAN, rest, z, w, to + i * FAN, origin + i,
                    std::make_integer_sequence<int, FAN>{});
  for (; i < rest; i++) {
    int which = 0;
    for (int b = 1; b < FAN; b++)
      if (from[i + b * rest] < from[i + which * rest]) which = b;
    origin[i] = static_cast<uint8_t>(which);
    for (int p = 0; p < FAN; p++) {
      const float gap = z - table[i * FAN + p];
      to[i * FAN + p] = from[i + which * rest] + w * gap * gap;
    }
  }
}

inline void step(Trellis& t, float z, float w, uint8_t* origin) {
  constexpr decltype(&step<2>) kSteps[] = {step<2>, step<4>, step<8>, step<16>, step<32>, step<64>};
  kSteps[t.rate - 1](t.cost.data(), t.table, t.rest(), z, w, t.next.data(), origin);
  t.cost.swap(t.next);
}

// Windows of rows 0 to n - 1 of target and weight; `overlap` below 0: none. Returns the loss.
inline float search(Trellis& t, const float* target, const float* weight, int64_t n,
                    int64_t overlap, int32_t* windows) {
  const int64_t size = t.size(), rest = t.rest();
  const float infinity = std::numeric_limits<float>::infinity();
  t.cost.resize(size), t.next.resize(size), t.origin.resize(n * rest);
  for (int64_t s = 0; s < size; s++) {
    const float gap = target[n - 1] - t.table[s];
    const bool allowed = overlap < 0 || s >> t.rate == overlap;
    t.cost[s] = allowed ? weight[n - 1] * gap * gap : infinity;
  }
  for (int64_t r = n - 2; r >= 0; r--) step(t, target[r], weight[r], &t.origin[r * rest]);
  int64_t first = overlap < 0 ? 0 : overlap;
  for (int64_t s = first; s < size; s += overlap < 0 ? 1 : rest)
    if (t.cost[s] < t.cost[first]) first = s;
  const float loss = t.cost[first];
  windows[0] = static_cast<int32_t>(first);
  for (int64_t r = 0; r + 1 < n; r++) {
    const int64_t group = windows[r] >> t.rate;
    windows[r + 1] = static_cast<int32_t>(t.origin[r * rest + group] * rest + group);
  }
  return loss;
}

// `viterbi` of n streams of T rows, tail-biting with the overlap of each; where it is below 0, with
// that of a search around the cut.
template <class Pool>
void tail_biting(const float* target, const float* weight, const float* table, int64_t bits,
                 int64_t rate, int64_t streams, int64_t rows, const int32_t* overlap,
                 int64_t reach, Pool& pool, int32_t* windows, float* loss) {
  parallel(pool, streams, [&](int64_t i) {
    static thread_local Trellis t;
    t.table = table, t.bits = bits, t.rate = rate;
    const float *z = target + i * rows, *w = weight + i * rows;
    int32_t* out = windows + i * rows;
    if (overlap[i] >= 0) {
      loss[i] = search(t, z, w, rows, overlap[i] % t.rest(), out);
      return;
    }
    const int64_t after = std::min(reach, rows - rows / 2), before = std::min(reach, rows / 2);
    static thread_local std::vector<float> around;
    static thread_local std::vector<int32_t> trial;
    around.resize(2 * (before + after)), trial.resize(before + after);
    float *az = around.data(), *aw = az + before + after;
    std::copy(z + rows - before, z + rows, az), std::copy(z, z + after, az + before);
    std::copy(w + rows - before, w + rows, aw), std::copy(w, w + after, aw + before);
    search(t, az, aw, before + after, -1, trial.data());
    loss[i] = search(t, z, w, rows, trial[before] % t.rest(), out);
  });
}

}  // namespace
