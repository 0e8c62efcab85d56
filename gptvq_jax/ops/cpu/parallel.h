// Work shared by the threads of a pool, which has num_threads() and Schedule(function).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace {

// Calls work(i) for i < items on the threads of XLA's pool and this one. This thread takes items
// too, so that it never waits for a task that has not begun.
template <class Pool, class Work>
void parallel(Pool& pool, int64_t items, Work&& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto* job = &work;
  auto run = [shared, items, job] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < items;) {
      (*job)(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), items) - 1;
  for (int64_t h = 0; h < helpers; h++) pool.Schedule(decltype(run)(run));
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < items; spins++)
    if (spins > 1000) std::this_thread::yield();
}

// Rows of one work item: a few items for each thread, of whole row strips, whose tables are then
// made once; but not so few weights that handing them to a thread costs more than they do.
constexpr int64_t kItemsPerThread = 8, kItemWeights = 1 << 18;
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t item_rows(int64_t rows, int64_t cols, int64_t strip_rows, int64_t threads) {
  const int64_t share = divide_up(rows, kItemsPerThread * threads);
  const int64_t wanted = std::max(share, divide_up(kItemWeights, cols));
  return wanted < strip_rows ? wanted : divide_up(wanted, strip_rows) * strip_rows;
}

}  // namespace
