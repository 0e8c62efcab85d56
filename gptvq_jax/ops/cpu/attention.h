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

// Of one head of keys, and the `group` heads of queries that share it.
inline void attend(const AttentionShape& a, const float* q, const float* k, const float* v,
                   int64_t position, float* scores, float* y) {
  const int64_t group = a.heads / a.kv_heads, dim = a.head_dim;
  const int64_t first = a.window ? std::max<int64_t>(0, position + 1 - a.window) : 0;
  const int64_t count = position + 1 - first;
  for (int64_t s = 0; s < count; s++)
    for (int64_t h = 0; h < group; h++) {
      const float score = inner_product(q + h * dim, k + (first + s) * dim, dim) * a.scale;
      scores[h * count + s] = a.softcap ? a.softcap * std::tanh(score / a.softcap) : score;
    }
  for (int64_t h = 0; h < group; h++) {
    softmax(scores + h * count, count);
    weighted_sum(scores + h * count, v + first * dim, count, dim, y + h * dim);
  }
}

// Turns q (batch, heads, head_dim) and k (batch, kv_heads, head_dim), stores k and v in the caches
// (batch * kv_heads, max_len, head_dim) at the positions, and attends: y like q. `frequencies` are
// the radians per position of the pairs.
template <class Pool>
void attention(const AttentionShape& a, float* q, float* k, const float* v,
               const int32_t* positions, const float* frequencies, Pool& pool, float* k_cache,
               float* v_cache, float* y) {
  const int64_t group = a.heads / a.kv_heads, rows = a.batch * a.kv_heads;
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
  auto of_row = [&](int64_t row) {
    const int64_t position = positions[row / a.kv_heads], to = row * a.max_len * a.head_dim;
    std::copy_n(k + row * a.head_dim, a.head_dim, k_cache + to + position * a.head_dim);
    std::copy_n(v + row * a.head_dim, a.head_dim, v_cache + to + position * a.head_dim);
    std::vector<float> scores(group * (position + 1));
    attend(a, q + row * group * a.head_dim, k_cache + to, v_cache + to, position, scores.data(),
           y + row * group * a.head_dim);
  };
  constexpr int64_t kWorthThreads = 1 << 15;  // multiplications
  if (rows * longest * group * a.head_dim > kWorthThreads) parallel(pool, rows, of_row);
  else
    for (int64_t row = 0; row < rows; row++) of_row(row);
}

}  // namespace
