// Levels of trellis codes by lookups of several rows at once: the windows of successive rows overlap,
// so that those of 2 or 4 rows are one number of L + K or L + 3 K bits. Tables of their levels are
// larger, as far as they stay in a core's caches, and a lookup costs the same: cut out, load, store.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

namespace {

constexpr int64_t kRunBytes = 1 << 16;  // of a table at most

// For every rate how many rows a lookup takes, and the table: those of the windows themselves, or,
// where the levels are those of many layers, of runs of them.
template <class T>
struct RunTables {
  struct Table {
    int run = 1;
    const T* levels;
    std::vector<T> stored;
  };
  std::array<Table, 7> of_rate;

  RunTables(const T* levels, int bits, bool runs) {
    for (int rate = 1; rate <= std::min(6, bits); rate++) {
      Table& table = of_rate[rate];
      table.levels = levels;
      for (int run : {4, 2}) {
        const int width = bits + (run - 1) * rate;
        if (!runs || int64_t(run * sizeof(T)) << width > kRunBytes) continue;
        table.run = run, table.stored.resize(int64_t{run} << width);
        const uint32_t mask = (1u << bits) - 1;
        for (uint32_t window = 0; window < 1u << width; window++)
          for (int i = 0; i < run; i++)
            table.stored[run * window + i] = levels[window >> i * rate & mask];
        table.levels = table.stored.data();
        break;
      }
    }
  }
};

// Tables of levels that many layers share are kept, those that were used last.
template <class T>
std::shared_ptr<const RunTables<T>> run_tables(const T* levels, int bits, bool shared) {
  if (!shared) return std::make_shared<RunTables<T>>(levels, bits, false);
  struct Kept {
    std::vector<T> levels;
    std::shared_ptr<const RunTables<T>> tables;
  };
  constexpr size_t kMost = 8;
  static std::mutex mutex;
  static std::list<Kept> kept;
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t count = size_t{1} << bits;
  auto at = std::find_if(kept.begin(), kept.end(), [&](const Kept& k) {
    return k.levels.size() == count && !std::memcmp(k.levels.data(), levels, count * sizeof(T));
  });
  if (at == kept.end()) {
    kept.push_front({std::vector<T>(levels, levels + count), nullptr});
    // Of the copy: where nothing is longer, tables point to the levels themselves.
    kept.front().tables = std::make_shared<RunTables<T>>(kept.front().levels.data(), bits, true);
    if (kept.size() > kMost) kept.pop_back();
  } else {
    kept.splice(kept.begin(), kept, at);
  }
  return kept.front().tables;
}

// Levels of 8 windows of a stream.
template <int RATE, int RUN, class T>
inline void look_up_8(const uint8_t* stream, const T* table, uint64_t mask, T* found) {
  uint64_t word;
  std::memcpy(&word, stream, 8);
  for (int i = 0; i < 8; i += RUN)
    std::memcpy(found + i, table + RUN * (word >> i * RATE & mask), RUN * sizeof(T));
}
// Of `rows` windows, or of up to 7 more.
template <int RATE, int RUN, class T>
void look_up(const uint8_t* stream, const T* table, int bits, int64_t rows, T* found) {
  const uint64_t mask = (uint64_t{1} << (bits + (RUN - 1) * RATE)) - 1;
  int64_t row = 0;
  for (; row + 32 <= rows; row += 32)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      look_up_8<RATE, RUN>(stream + (row / 8 + i) * RATE, table, mask, found + row + 8 * i);
  for (; row < rows; row += 8)
    look_up_8<RATE, RUN>(stream + row / 8 * RATE, table, mask, found + row);
}
template <class T>
void look_up(int rate, const typename RunTables<T>::Table& table, const uint8_t* stream, int bits,
             int64_t rows, T* found) {
  auto each = [&]<int RUN>() {
    switch (rate) {
      case 1: return look_up<1, RUN>(stream, table.levels, bits, rows, found);
      case 2: return look_up<2, RUN>(stream, table.levels, bits, rows, found);
      case 3: return look_up<3, RUN>(stream, table.levels, bits, rows, found);
      case 4: return look_up<4, RUN>(stream, table.levels, bits, rows, found);
      case 5: return look_up<5, RUN>(stream, table.levels, bits, rows, found);
      case 6: return look_up<6, RUN>(stream, table.levels, bits, rows, found);
    }
  };
  if (table.run == 4) each.template operator()<4>();
  else if (table.run == 2) each.template operator()<2>();
  else each.template operator()<1>();
}

}  // namespace
