// Threads that wait for work awake. Products of one token follow each other within microseconds,
// and waking a thread that sleeps takes longer than many of them.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

// One job at a time, in items that the threads and the caller take from each other. A thread that
// has found nothing for kAwake sleeps; from kPause on it lets others onto its processor, so that it
// costs little where there are more threads than processors.
class Team {
 public:
  // The team of this process. It is never destroyed: its threads may outlive static objects.
  static Team& get() {
    static std::once_flag once;
    std::call_once(once, [] {
      instance() = new Team;
#if defined(__unix__) || defined(__APPLE__)
      // The child of a fork has none of the threads, and perhaps a job that nobody ends.
      pthread_atfork(nullptr, nullptr, [] { instance() = new Team; });
#endif
    });
    return *instance();
  }

  // Calls work(i) for i < items on `threads` threads, of which this is one; false, and nothing
  // done, while another job is under way.
  template <class Work>
  bool run(int64_t threads, int64_t items, Work& work) {
    if (busy.exchange(true, std::memory_order_acquire)) return false;
    for (; members < threads - 1; members++) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (...) {  // the system has no more of them: the rest of us does the work
        break;
      }
    }
    call = [](void* job, int64_t item) { (*static_cast<Work*>(job))(item); };
    job = &work;
    done.store(0, std::memory_order_relaxed);
    left.store(items);
    if (sleepers.load() > 0) {
      bell.fetch_add(1);
      bell.notify_all();
    }
    while (take()) {}
    for (int spins = 0; done.load(std::memory_order_acquire) < items; spins++)
      spins < kPause ? pause() : std::this_thread::yield();
    busy.store(false, std::memory_order_release);
    return true;
  }

 private:
  Team() = default;
  static Team*& instance() {
    static Team* team = nullptr;
    return team;
  }

  // Does an item, if there is one. Its job cannot end before, so what describes it stays.
  bool take() {
    if (left.load(std::memory_order_relaxed) <= 0) return false;
    const int64_t item = left.fetch_sub(1) - 1;
    if (item < 0) return false;
    call(job, item);
    done.fetch_add(1, std::memory_order_release);
    return true;
  }

  void serve() {
    using Clock = std::chrono::steady_clock;
    for (;;) {
      Clock::time_point start;
      for (int spins = 0; !take();) {
        if (++spins < kPause) {
          pause();
          continue;
        }
        const Clock::time_point now = Clock::now();
        if (spins == kPause) start = now;
        if (now - start < kAwake) {
          std::this_thread::yield();
          continue;
        }
        sleep();
        spins = 0;
      }
    }
  }

  void sleep() {
    const uint32_t heard = bell.load();
    sleepers.fetch_add(1);
    if (left.load() <= 0) bell.wait(heard);
    sleepers.fetch_sub(1);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  static constexpr int kPause = 1000;
  static constexpr std::chrono::microseconds kAwake{100};
  alignas(64) std::atomic<int64_t> left{0};  // items that nobody has taken
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<bool> busy{false};
  std::atomic<int> sleepers{0};
  std::atomic<uint32_t> bell{0};
  int64_t members = 0;  // threads beside the callers'
  void (*call)(void*, int64_t) = nullptr;
  void* job = nullptr;
};

}  // namespace
