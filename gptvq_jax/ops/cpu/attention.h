// The attention of one token of each of several sequences, with their caches (models/kv_cache.py).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace {

struct AttentionShape {
  int64_t batch, heads, kv_heads, head_dim;
  int64_t max_len;  // positions of the caches
  int64_t window;   // positions that a token sees, itself included; 0: all earlier ones
  float scale, softcap;  // of the scores; softcap 0: none
  int64_t pairs;  // of a head, which turn with the position
  float rotary_factor;  // of cosines and sines

  int64_t q_size() const { return heads * head_dim; }
  int64_t kv_size() const { return kv_heads * head_dim; }
};

// Turns the pairs (x[i], x[i + pairs]) of every head.
inline void rotate(const AttentionShape& a, const float* cosine, const float* sine, int64_t heads,
                   float* x) {
  for (int64_t h = 0; h < heads; h++, x += a.head_dim)
    for (int64_t i = 0; i < a.pairs; i++) {
      const float first = x[i], second = x[a.pairs + i];
      x[i] = first * cosine[i] - second * sine[i];
      x[a.pairs + i] = second * cosine[i] + first * sine[i];
    }
}

// Of one head of queries, and the keys and values (positions, head_dim) that it sees.
inline void attend(const AttentionShape& a, const float* q, const float* k, const float* v,
                   int64_t position, float* y) {
  constexpr int T = 4;
  const int64_t dim = a.head_dim;
  const int64_t first = a.window ? std::max<int64_t>(0, position + 1 - a.window) : 0;
  const int64_t count = position + 1 - first;
  k += first * dim, v += first * dim;
  std::vector<float> scores(count);
  int64_t s = 0;
  for (; s + T <= count; s += T) inner_products<T>(q, k + s * dim, dim, dim, &scores[s]);
  for (; s < count; s++) scores[s] = inner_product(q, k + s * dim, dim);
  for (float& score : scores) score *= a.scale;
  if (a.softcap)
    for (float& score : scores) score = a.softcap * std::tanh(score / a.softcap);
  softmax(scores.data(), count);
  weighted_sum(scores.data(), v, count, dim, y);
}

// Turns q (batch, heads, head_dim) and k (batch, kv_heads, head_dim), stores k and v in the caches
// (batch * kv_heads, max_len, head_dim) at the positions, and attends: y like q. `frequencies` are
// the radians per position of the pairs.
template <class Pool>
void attention(const AttentionShape& a, float* q, float* k, const float* v,
               const int32_t* positions, const float* frequencies, Pool& pool, float* k_cache,
               float* v_cache, float* y) {
  const int64_t group = a.heads / a.kv_heads, next = a.max_len * a.head_dim;
  std::vector<float> cosine(a.pairs), sine(a.pairs);
  int64_t longest = 0;
  for (int64_t n = 0; n < a.batch; n++) {
    for (int64_t i = 0; i < a.pairs; i++) {
      const float angle = static_cast<float>(positions[n]) * frequencies[i];
      cosine[i] = std::cos(angle) * a.rotary_factor, sine[i] = std::sin(angle) * a.rotary_factor;
    }
    rotate(a, cosine.data(), sine.data(), a.heads, q + n * a.q_size());
    rotate(a, cosine.data(), sine.data(), a.kv_heads, k + n * a.kv_size());
    longest = std::max<int64_t>(longest, positions[n] + 1);
  }
  for (int64_t row = 0; row < a.batch * a.kv_heads; row++) {
    const int64_t to = row * next + positions[row / a.kv_heads] * a.head_dim;
    std::copy_n(k + row * a.head_dim, a.head_dim, k_cache + to);
    std::copy_n(v + row * a.head_dim, a.head_dim, v_cache + to);
  }
  auto of_head = [&](int64_t head) {
    const int64_t at = head * a.head_dim, of = head / group * next;
    attend(a, q + at, k_cache + of, v_cache + of, positions[head / a.heads], y + at);
  };
  constexpr int64_t kWorthThreads = 1 << 16;  // multiplications
  const int64_t heads = a.batch * a.heads;
  if (heads * longest * a.head_dim > kWorthThreads) parallel(pool, heads, of_head);
  else
    for (int64_t head = 0; head < heads; head++) of_head(head);
}

}  // namespace
