// Runs what a step has beside its products with packed weights, in the instruction set that it is
// compiled for and without JAX: the threads, int8 rows, exponentials. Exits with 1 on an error.
#include "attention.h"
#include "int8_rows.h"
#include "parallel.h"
#include "vector_math.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <sys/wait.h>
#include <unistd.h>

namespace {

struct Threads {  // a pool whose tasks run at once
  int64_t num_threads() const { return 3; }
  template <class F>
  void Schedule(F&& f) { f(); }
};

bool good = true;
void expect(bool holds, const char* what) {
  if (!holds) std::printf("wrong: %s\n", what);
  good = good && holds;
}

// Whether every item of many small jobs is done once, with jobs within jobs.
bool all_done() {
  Threads pool;
  for (int job = 0; job < 2000; job++) {
    std::vector<std::atomic<int>> count(job % 7);
    parallel(pool, count.size(), [&](int64_t i) {
      std::atomic<int> inner{0};
      if (job % 50 == 0) parallel(pool, 4, [&](int64_t) { inner++; });
      count[i] += job % 50 == 0 ? inner == 4 : 1;
    });
    for (const auto& c : count)
      if (c != 1) return false;
    if (job % 500 == 0) usleep(1000);  // the threads go to sleep
  }
  return true;
}

// Whether every item of jobs that are done together is done once, with its own number.
bool all_jobs_done() {
  Threads pool;
  std::vector<std::vector<std::atomic<int>>> counts;
  for (const int64_t items : {5, 0, 1, 40}) counts.emplace_back(items);
  std::vector<Job> jobs;
  for (auto& count : counts)
    jobs.push_back({static_cast<int64_t>(count.size()), [&](int64_t i) { count.at(i)++; }});
  parallel(pool, jobs);
  parallel(pool, std::vector<Job>());
  for (const auto& count : counts)
    for (const auto& c : count)
      if (c != 1) return false;
  return true;
}

void check_threads() {
  expect(all_jobs_done(), "items of jobs that are done together");
  expect(all_done(), "items of jobs");
  std::thread other([] { expect(all_done(), "items of jobs of another thread"); });
  expect(all_done(), "items of jobs beside another thread");
  other.join();
  const pid_t child = fork();
  if (child == 0) _exit(all_done() ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  expect(status == 0, "jobs of a forked process");
}

void check_rows(int64_t rows, int64_t cols, int64_t batch) {
  std::mt19937 random(cols);
  std::vector<uint8_t> codes(rows * cols);
  std::vector<uint16_t> scales(rows);
  std::vector<float> x(batch * cols), y(batch * rows);
  for (auto& v : codes) v = random();
  for (auto& v : scales) v = 0x2000 + random() % 0x400;
  for (auto& v : x) v = std::normal_distribution<float>()(random);
  Threads pool;
  int8_rows_product({rows, cols, codes.data(), scales.data()}, x.data(), batch, pool, y.data());
  double error = 0, norm = 0;
  for (int64_t n = 0; n < batch; n++)
    for (int64_t r = 0; r < rows; r++) {
      double value = 0;
      for (int64_t c = 0; c < cols; c++) value += (codes[r * cols + c] - 127.5) * x[n * cols + c];
      value *= simd::half_to_float(scales[r]);
      error += std::pow(value - y[n * rows + r], 2), norm += value * value;
    }
  expect(std::sqrt(error / norm) < 1e-6, "products with int8 rows");
}

void check_exponential() {
  double worst = 0;
  for (float x = -86; x < 88.5f; x += 0.0137f)
    worst = std::max(worst, std::abs(exponential(x) / std::exp(double(x)) - 1));
  expect(worst < 3e-7, "exponentials");
  expect(exponential(-90) == 0 && exponential(-INFINITY) == 0, "small exponentials");
  expect(std::isinf(exponential(90)) && std::isinf(exponential(INFINITY)), "large exponentials");
  expect(std::isnan(exponential(NAN)), "the exponential of what is no number");
}

void check_sums() {
  std::mt19937 random(1);
  std::vector<float> weights(17), x(17 * 150), y(150, 9.0f);
  for (auto* values : {&weights, &x})
    for (float& v : *values) v = std::normal_distribution<float>()(random);
  for (const int64_t size : {150, 64, 5}) {  // whole vectors of sums and a rest; no rest; no vector
    weighted_sum(weights.data(), x.data(), 17, size, y.data());
    for (int64_t i = 0; i < size; i++) {
      double expected = 0;
      for (int64_t s = 0; s < 17; s++) expected += double(weights[s]) * x[s * size + i];
      expect(std::abs(expected - y[i]) < 1e-5, "a weighted sum");
    }
  }
  double expected = 0;
  for (int64_t i = 0; i < 83; i++) expected += double(x[i]) * x[100 + i];
  const float product = inner_product(x.data(), x.data() + 100, 83);
  expect(std::abs(expected - product) < 1e-5, "an inner product");
  simd::Floats rows[4];
  float sums_of[4];
  for (int t = 0; t < 4; t++) std::memcpy(&rows[t], x.data() + 40 * t, sizeof rows[t]);
  simd::sums(rows, sums_of);
  for (int t = 0; t < 4; t++) {
    double whole = 0;
    for (size_t i = 0; i < sizeof rows[t] / 4; i++) whole += x[40 * t + i];
    expect(std::abs(whole - sums_of[t]) < 1e-5, "sums of the lanes of four vectors");
  }
}

// Of `heads` that share keys and values, with a softcap and a window, in double precision.
void check_attention(int64_t heads, int64_t dim, int64_t position, int64_t window) {
  std::mt19937 random(dim + position);
  const AttentionShape a{1, heads, 1, dim, 64, window, 0.3f, 5, 0, 1};
  std::vector<float> q(heads * dim), k(64 * dim), v(64 * dim), y(heads * dim, 9.0f);
  for (auto* values : {&q, &k, &v})
    for (float& x : *values) x = std::normal_distribution<float>()(random);
  for (int64_t h = 0; h < heads; h++)
    attend(a, q.data() + h * dim, k.data(), v.data(), position, y.data() + h * dim);
  const int64_t first = window ? std::max<int64_t>(0, position + 1 - window) : 0;
  for (int64_t h = 0; h < heads; h++) {
    std::vector<double> expected(dim);
    double total = 0;
    for (int64_t s = first; s <= position; s++) {
      double score = 0;
      for (int64_t i = 0; i < dim; i++) score += double(q[h * dim + i]) * k[s * dim + i];
      const double weight = std::exp(5 * std::tanh(score * a.scale / 5));
      for (int64_t i = 0; i < dim; i++) expected[i] += weight * v[s * dim + i];
      total += weight;
    }
    for (int64_t i = 0; i < dim; i++)
      expect(std::abs(expected[i] / total - y[h * dim + i]) < 1e-5, "attention");
  }
}

}  // namespace

int main() {
  check_threads();
  for (const int64_t cols : {1, 40, 64, 83, 200}) check_rows(37, cols, cols % 3 + 1);
  check_rows(700, 1024, 2);
  check_exponential();
  check_sums();
  for (const int64_t heads : {1, 3, 5, 6})
    for (const int64_t dim : {5, 16, 64, 128})
      for (const int64_t window : {0, 6}) check_attention(heads, dim, 41, window);
  check_attention(2, 64, 0, 0);
  std::printf("%s: %s\n", SIMD_NAME, good ? "good" : "not good");
  return good ? 0 : 1;
}
