// Work shared by the threads of a pool, which has num_threads() and Schedule(function).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "team.h"

namespace {

// Calls work(i) for i < items, on as many threads as the pool has: those of the team, or, while it
// is at work for another call, the pool's own. This thread takes items too, so that it never waits
// for a task that has not begun.
template <class Pool, class Work>
void parallel(Pool& pool, int64_t items, Work&& work) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), items);
  if (threads <= 1) {
    for (int64_t i = 0; i < items; i++) work(i);
    return;
  }
  if (Team::get().run(threads, items, work)) return;
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
  for (int64_t h = 1; h < threads; h++) pool.Schedule(decltype(run)(run));
  run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < items; spins++)
    if (spins > 1000) std::this_thread::yield();
}

// Work that may be done beside other work: work(i) for i < items.
struct Job {
  int64_t items;
  std::function<void(int64_t)> work;
};

template <class Pool>
void parallel(Pool& pool, const Job& job) {
  parallel(pool, job.items, [&](int64_t item) { job.work(item); });
}

// All of them at once, so that threads wait for each other once, and not after each.
template <class Pool>
void parallel(Pool& pool, const std::vector<Job>& jobs) {
  int64_t items = 0;
  for (const Job& job : jobs) items += job.items;
  parallel(pool, items, [&](int64_t item) {
    auto job = jobs.begin();
    for (; item >= job->items; job++) item -= job->items;
    job->work(item);
  });
}

// Rows of one work item: as many items for each thread, a few where there are many weights, so that
// threads end together; fewer, or one in all, where handing them over would cost more than they do.
// They are whole tiles of rows, and, where that is no detour, whole row strips, whose tables are
// then made once.
constexpr int64_t kItemsPerThread = 8, kItemWeights = 1 << 16, kTileRows = 4;
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t item_rows(int64_t rows, int64_t cols, int64_t strip_rows, int64_t threads) {
  const int64_t most = rows * cols / kItemWeights;  // items
  const int64_t each = std::clamp<int64_t>(most / threads, 1, kItemsPerThread);
  const int64_t share = most < 1 ? rows : divide_up(rows, each * threads);
  const int64_t whole = divide_up(share, strip_rows) * strip_rows;
  return 8 * (whole - share) <= share ? whole : divide_up(share, kTileRows) * kTileRows;
}

}  // namespace
