// A block of the decoder for one token of each of several sequences: what models/llama.py's
// DecoderBlock computes, in one call. Products with weights are handed in.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "parallel.h"
#include "vector_math.h"

namespace {

// A vector of parameters; without values where the block has none.
using Values = std::vector<float>;

enum LayerIndex { kQ, kK, kV, kO, kGate, kUp, kDown, kLayers };
enum NormIndex { kBeforeAttention, kAfterAttention, kBeforeFeed, kAfterFeed, kQNorm, kKNorm,
                 kNorms };

struct Block {
  AttentionShape attention;
  int64_t hidden, inner;
  float eps, residual_scale;
  bool gelu;  // tanh's approximation of it, in place of silu
  Values norms[kNorms];  // factors; of kQNorm and kKNorm for a head, or for all heads together
  Values row_scales[kLayers], biases[kLayers];
};

inline float activation(float x, bool gelu) {
  if (!gelu) return x / (1 + exponential(-x));
  const float u = 1.5957691216f * (x + 0.044715f * x * x * x);  // twice the argument of tanh
  return x / (1 + exponential(-u));
}

// Runs rows of x (batch, hidden) through a block, in place, and updates the caches.
//
// `product(layers, x, y)` multiplies rows by the weights of layers, each into its own y; false where
// it could not, and so is the result.
template <class Pool, class Product>
bool run_block(const Block& b, float* x, const int32_t* positions, const float* frequencies,
               Pool& pool, Product&& product, float* k_cache, float* v_cache) {
  const AttentionShape& a = b.attention;
  const int64_t batch = a.batch, q_size = a.q_size(), kv_size = a.kv_size();
  std::vector<float> memory(batch * (2 * b.hidden + 2 * q_size + 2 * kv_size + 2 * b.inner));
  float* next = memory.data();
  auto rows = [&](int64_t size) {
    float* const first = next;
    next += batch * size;
    return first;
  };
  float *normed = rows(b.hidden), *output = rows(b.hidden), *q = rows(q_size), *mixed = rows(q_size);
  float *k = rows(kv_size), *v = rows(kv_size), *gate = rows(b.inner), *up = rows(b.inner);

  const int64_t widths[kLayers] = {q_size, kv_size, kv_size, b.hidden, b.inner, b.inner, b.hidden};
  auto layers = [&](const std::vector<LayerIndex>& which, const float* from,
                    const std::vector<float*>& to) {
    if (!product(which, from, to)) return false;
    for (size_t l = 0; l < which.size(); l++) {
      const Values &scales = b.row_scales[which[l]], &bias = b.biases[which[l]];
      const int64_t size = widths[which[l]];
      for (float* row = to[l]; row < to[l] + batch * size; row += size) {
        if (!scales.empty())
          for (int64_t i = 0; i < size; i++) row[i] *= scales[i];
        if (!bias.empty())
          for (int64_t i = 0; i < size; i++) row[i] += bias[i];
      }
    }
    return true;
  };
  // Rows of `size` values after a norm of as many, or of parts of them; themselves without it.
  auto norm = [&](NormIndex index, float* from, int64_t size, float* to) -> float* {
    const Values& scale = b.norms[index];
    const int64_t part = scale.size();
    if (!part) return from;
    for (int64_t i = 0; i < batch * size; i += part)
      rms_norm(from + i, scale.data(), b.eps, part, to + i);
    return to;
  };
  auto add = [&](NormIndex index) {
    const float* of_block = norm(index, output, b.hidden, output);
    for (int64_t i = 0; i < batch * b.hidden; i++) x[i] += of_block[i] * b.residual_scale;
  };

  const float* read = norm(kBeforeAttention, x, b.hidden, normed);
  if (!layers({kQ, kK, kV}, read, {q, k, v})) return false;
  norm(kQNorm, q, q_size, q), norm(kKNorm, k, kv_size, k);
  attention(a, q, k, v, positions, frequencies, pool, k_cache, v_cache, mixed);
  if (!layers({kO}, mixed, {output})) return false;
  add(kAfterAttention);

  read = norm(kBeforeFeed, x, b.hidden, normed);
  if (!layers({kGate, kUp}, read, {gate, up})) return false;
  for (int64_t i = 0; i < batch * b.inner; i++) gate[i] = activation(gate[i], b.gelu) * up[i];
  if (!layers({kDown}, gate, {output})) return false;
  add(kAfterFeed);
  return true;
}

}  // namespace
