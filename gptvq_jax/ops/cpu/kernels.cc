// Products with packed weights on a CPU: y[n, r] = sum_c x[n, c] W[r, c].
//
// Vector quantized weights (see vq_tensor.py for the format): the codes of a row are unpacked a
// vector of bytes at a time and looked up, one table for each of the D inputs of a code, in tables
// that stay in registers for all rows of a group. The int8 centroids found are multiplied with
// activations laid out in the same order, and the sum over a column strip with the scale of its
// codebook. Activations are int8 with one scale for a row of x, or floats.
// Beside it, in the same style, what it is compared with: 4-bit integers in groups of 128.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace simd;

namespace {

float half_to_float(uint16_t h) {
  uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu, bits;
  if (rest >= 0x7c00) {
    bits = 0x7f800000u | rest << 13;
  } else if (rest >= 0x400) {
    bits = (rest << 13) + (112u << 23);
  } else {  // subnormal: an integer times 2^-24
    float value = rest * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Calls work(i) for i < items on the threads of XLA's pool and this one. This thread takes items
// too, so that it never waits for a task that has not begun.
template <class Work>
void parallel(ffi::ThreadPool& pool, int64_t items, Work&& work) {
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

// Rows of one work item: whole row strips, whose tables are then made once, with weights enough to
// be worth handing to a thread, unless that leaves too few items to share.
constexpr int64_t kItemWeights = 1 << 16, kItemsPerThread = 4;
int64_t item_rows(int64_t rows, int64_t cols, int64_t strip_rows, int64_t threads) {
  auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t enough = divide_up(kItemWeights, cols);
  const int64_t whole = divide_up(enough, strip_rows) * strip_rows;
  const int64_t share = divide_up(rows, kItemsPerThread * threads);
  return std::min(whole, std::max(share, enough));
}

struct Format {
  int64_t books, rows, row_bytes;               // of codes (M, R, bytes)
  int64_t col_strips, row_strips, size, dim;    // of centroids (M, S, G, K, D)
  int64_t cols, strip_rows, strip_cols, bits;
  const uint8_t* codes;
  const int8_t* centroids;
  const uint16_t* scales;  // (M, S, G) float16

  int64_t strip_vectors() const { return strip_cols / dim; }
  int64_t num_vectors() const { return (cols + dim - 1) / dim; }
  int64_t vectors_in(int64_t strip) const {
    return std::min(strip_vectors(), num_vectors() - strip * strip_vectors());
  }
  int64_t chunks() const { return (strip_vectors() + kLanes - 1) / kLanes; }
  int64_t group(int64_t m, int64_t s, int64_t g) const {
    return (m * col_strips + s) * row_strips + g;
  }
  float scale(int64_t m, int64_t s, int64_t g) const {
    return half_to_float(scales[group(m, s, g)]);
  }
};

// The codes of one row in one strip, readable a chunk at a time.
class Codes {
 public:
  explicit Codes(const Format& f) : f(f), unpack(f.bits), end(f.codes + f.books * f.rows * f.row_bytes) {}

  void seek(int64_t m, int64_t row, int64_t strip) {
    const uint8_t* start = f.codes + (m * f.rows + row) * f.row_bytes;
    int64_t bit = strip * f.strip_vectors() * f.bits;
    at = start + bit / 8, shift = bit % 8;
    left = (f.vectors_in(strip) * f.bits + 7) / 8;
    row_end = start + f.row_bytes;
  }
  // The next kLanes codes; those beyond the strip are arbitrary.
  Bytes next() {
    const int64_t whole = kLanes / 8 * f.bits;
    Bytes codes;
    if (shift == 0 && at + whole + kSlack <= end && left >= whole) {
      codes = unpack(at);
    } else {  // the end of a strip, or one that does not begin with a byte
      uint8_t aligned[kLanes + kSlack] = {};
      int64_t count = std::min<int64_t>(whole, row_end - at);
      for (int64_t i = 0; i < count; i++)
        aligned[i] = at[i] >> shift | (shift && at + i + 1 < row_end ? at[i + 1] << (8 - shift) : 0);
      codes = unpack(aligned);
    }
    at += whole, left -= whole;
    return codes;
  }

 private:
  const Format& f;
  const Unpack unpack;
  const uint8_t *end, *at = nullptr, *row_end = nullptr;
  int64_t shift = 0, left = 0;
};

// The tables of a row strip: for every codebook and column strip D planes of 2^B bytes, which
// repeat the K values if there are fewer.
template <int B, int D>
class Planes {
 public:
  static constexpr int kSize = 1 << B;
  Planes(const Format& f, uint8_t bias)
      : f(f), bias(bias), bytes(f.books * f.col_strips * D * kSize) {}

  void fill(int64_t row_strip) {
    if (row_strip == filled) return;
    filled = row_strip;
    uint8_t* plane = bytes.data();
    for (int64_t m = 0; m < f.books; m++)
      for (int64_t s = 0; s < f.col_strips; s++, plane += D * kSize)
        split(f.centroids + f.group(m, s, row_strip) * f.size * D, plane);
  }
  const uint8_t* of(int64_t m, int64_t s) const {
    return bytes.data() + (m * f.col_strips + s) * D * kSize;
  }

 private:
  void split(const int8_t* centroids, uint8_t* plane) const {
    for (int d = 0; d < D; d++, plane += kSize) {
      for (int64_t k = 0; k < f.size; k++) plane[k] = centroids[k * D + d] ^ bias;
      for (int64_t k = f.size; k < kSize; k += f.size) std::memcpy(plane + k, plane, f.size);
    }
  }
  const Format& f;
  const uint8_t bias;
  int64_t filled = -1;
  std::vector<uint8_t> bytes;
};

// Activations in the order in which weights come out of the tables: for every row of x and column
// strip, chunk after chunk, D planes of kLanes values, 0 beyond the strip.
template <class T>
class Activations {
 public:
  Activations(const Format& f, int64_t n) : strip_size(f.chunks() * f.dim * kLanes), row_size(f.col_strips * strip_size), values(n * row_size) {}
  T* strip(int64_t n, int64_t s) { return values.data() + n * row_size + s * strip_size; }
  const T* strip(int64_t n, int64_t s) const { return values.data() + n * row_size + s * strip_size; }

  template <class Convert>
  void set(const Format& f, int64_t n, const float* x, Convert convert) {
    for (int64_t s = 0; s < f.col_strips; s++) {
      T* to = strip(n, s);
      const float* from = x + s * f.strip_cols;
      int64_t cols = std::min(f.strip_cols, f.cols - s * f.strip_cols);
      for (int64_t v = 0; v * f.dim < cols; v++)
        for (int64_t d = 0; d < f.dim && v * f.dim + d < cols; d++)
          to[(v / kLanes * f.dim + d) * kLanes + v % kLanes] = convert(from[v * f.dim + d]);
    }
  }
  const int64_t strip_size, row_size;

 private:
  std::vector<T> values;
};

float largest(const float* x, int64_t count) {
  float peak = 0;
  for (int64_t i = 0; i < count; i++) peak = std::max(peak, std::fabs(x[i]));
  return peak;
}

// Rounds a row of x to int8 with one scale, which it returns.
template <class Set>
float round_row(const float* x, int64_t cols, Set set) {
  float peak = largest(x, cols), inverse = peak > 0 ? 127 / peak : 0;
  set([=](float v) { return static_cast<int8_t>(std::lrintf(v * inverse)); });
  return peak / 127;
}

// How one kind of activation is multiplied with centroids.
template <int D>
struct Int8Product {
  using Value = int8_t;
  static constexpr uint8_t kTableBias = kBias;

  Int8Product(const Format& f, const float* x, int64_t rows)
      : x(f, rows), scales(rows), starts(rows * f.col_strips) {
    for (int64_t n = 0; n < rows; n++) {
      scales[n] = round_row(x_row(f, x, n), f.cols, [&](auto q) { this->x.set(f, n, x_row(f, x, n), q); });
      for (int64_t s = 0; s < f.col_strips; s++) {
        Ints biased = zero_ints();
        const int8_t* strip = this->x.strip(n, s);
        for (int64_t i = 0; kBias && i < this->x.strip_size; i += kLanes)
          biased = dot(biased, simd::fill(kBias), load(strip + i));
        starts[n * f.col_strips + s] = sub(zero_ints(), biased);
      }
    }
  }
  static const float* x_row(const Format& f, const float* x, int64_t n) { return x + n * f.cols; }

  struct Sum {
    Ints value;
    void add(Bytes weight, const int8_t* x) { value = dot(value, weight, load(x)); }
    Floats total() const { return to_float(value); }
  };
  Sum start(int64_t n, int64_t s, int64_t strips) const { return {starts[n * strips + s]}; }

  Activations<int8_t> x;
  std::vector<float> scales;

 private:
  std::vector<Ints> starts;  // minus what the bias of the tables adds
};

template <int D>
struct FloatProduct {
  using Value = float;
  static constexpr uint8_t kTableBias = 0;

  FloatProduct(const Format& f, const float* x, int64_t rows) : x(f, rows), scales(rows, 1.0f) {
    for (int64_t n = 0; n < rows; n++)
      this->x.set(f, n, x + n * f.cols, [](float v) { return v; });
  }
  struct Sum {
    Floats even, odd;
    void add(Bytes weight, const float* x) {
      pair<0>(weight, x);
      if constexpr (kLanes / kFloatLanes > 2) pair<2>(weight, x);
    }
    template <int I>
    void pair(Bytes weight, const float* x) {
      even = fma(widen<I>(weight), load_floats(x + I * kFloatLanes), even);
      odd = fma(widen<I + 1>(weight), load_floats(x + (I + 1) * kFloatLanes), odd);
    }
    Floats total() const { return simd::add(even, odd); }
  };
  Sum start(int64_t, int64_t, int64_t) const { return {zero(), zero()}; }

  Activations<float> x;
  std::vector<float> scales;
};

// y for rows [first, last) of W, kMaxRows at most, and N rows of x from `batch` on.
constexpr int64_t kMaxRows = 32;
template <int B, int D, int N, class Product>
void rows_product(const Format& f, const Product& product, Planes<B, D>& planes, int64_t first, int64_t last,
                  int64_t batch, float* y) {
  Codes codes(f);
  alignas(64) float sums[kMaxRows * N * kFloatLanes] = {};
  for (int64_t begin = first, end; begin < last; begin = end) {
    int64_t row_strip = begin / f.strip_rows;
    end = std::min(last, (row_strip + 1) * f.strip_rows);
    planes.fill(row_strip);
    for (int64_t m = 0; m < f.books; m++)
      for (int64_t s = 0; s < f.col_strips; s++) {
        const float scale = f.scale(m, s, row_strip);
        const uint8_t* plane = planes.of(m, s);
        auto table = [&]<int... d>(std::integer_sequence<int, d...>) {
          return std::array<Table<B>, D>{Table<B>(plane + d * Planes<B, D>::kSize)...};
        }(std::make_integer_sequence<int, D>());
        const int64_t chunks = (f.vectors_in(s) + kLanes - 1) / kLanes;
        for (int64_t r = begin; r < end; r++) {
          codes.seek(m, r, s);
          typename Product::Sum sum[N];
          for (int n = 0; n < N; n++) sum[n] = product.start(batch + n, s, f.col_strips);
          for (int64_t c = 0; c < chunks; c++) {
            Bytes code = codes.next();
            for (int d = 0; d < D; d++) {
              Bytes weight = table[d](code);
              for (int n = 0; n < N; n++)
                sum[n].add(weight, product.x.strip(batch + n, s) + (c * D + d) * kLanes);
            }
          }
          float* into = sums + (r - first) * N * kFloatLanes;
          for (int n = 0; n < N; n++, into += kFloatLanes)
            store(into, fma(sum[n].total(), scale, load_floats(into)));
        }
      }
  }
  for (int64_t r = first; r < last; r++)
    for (int n = 0; n < N; n++)
      y[(batch + n) * f.rows + r] =
          product.scales[batch + n] * sum(load_floats(sums + ((r - first) * N + n) * kFloatLanes));
}

template <int B, int D, class Product>
void product(const Format& f, const float* x, int64_t batch, ffi::ThreadPool& pool, float* y) {
  const Product prepared(f, x, batch);
  const int64_t step = item_rows(f.rows, f.cols, f.strip_rows, pool.num_threads());
  parallel(pool, (f.rows + step - 1) / step, [&](int64_t item) {
    Planes<B, D> planes(f, Product::kTableBias);
    const int64_t end = std::min(f.rows, (item + 1) * step);
    for (int64_t first = item * step, last; first < end; first = last) {
      last = std::min(end, first + kMaxRows);
      int64_t n = 0;
      for (; n + 4 <= batch; n += 4)
        rows_product<B, D, 4>(f, prepared, planes, first, last, n, y);
      for (; n < batch; n++) rows_product<B, D, 1>(f, prepared, planes, first, last, n, y);
    }
  });
}

// W in float32, (R, C).
template <int B, int D>
void decode(const Format& f, ffi::ThreadPool& pool, float* weight) {
  const int64_t step = item_rows(f.rows, f.cols, f.strip_rows, pool.num_threads());
  parallel(pool, (f.rows + step - 1) / step, [&](int64_t item) {
    Codes codes(f);
    Planes<B, D> planes(f, 0);
    int64_t last = std::min(f.rows, (item + 1) * step);
    for (int64_t r = item * step; r < last; r++) {
      planes.fill(r / f.strip_rows);
      float* row = weight + r * f.cols;
      std::fill(row, row + f.cols, 0.f);
      for (int64_t m = 0; m < f.books; m++)
        for (int64_t s = 0; s < f.col_strips; s++) {
          const float scale = f.scale(m, s, r / f.strip_rows);
          codes.seek(m, r, s);
          float* to = row + s * f.strip_cols;
          int64_t left = std::min(f.strip_cols, f.cols - s * f.strip_cols);
          for (; left > 0; left -= kLanes * D, to += kLanes * D) {
            alignas(64) uint8_t found[D][kLanes];
            Bytes code = codes.next();
            for (int d = 0; d < D; d++) {
              Bytes plane = Table<B>(planes.of(m, s) + d * Planes<B, D>::kSize)(code);
              std::memcpy(found[d], &plane, kLanes);
            }
            int64_t count = std::min<int64_t>(left, kLanes * D);
            for (int64_t i = 0; i < count; i++)
              to[i] += scale * static_cast<int8_t>(found[i % D][i / D]);
          }
        }
    }
  });
}

// Calls run<B, D>() for the smallest table that holds K entries.
template <int B, class Run>
bool with_dim(int64_t dim, Run&& run) {
  switch (dim) {
    case 1: run.template operator()<B, 1>(); return true;
    case 2: run.template operator()<B, 2>(); return true;
    case 4: run.template operator()<B, 4>(); return true;
    case 8: run.template operator()<B, 8>(); return true;
  }
  return false;
}
template <class Run>
ffi::Error specialize(const Format& f, Run&& run) {
  bool known = false;
  if (f.bits <= kSmallTable) known = with_dim<kSmallTable>(f.dim, run);
  else if (f.bits <= 6) known = with_dim<6>(f.dim, run);
  else if (f.bits == 7) known = with_dim<7>(f.dim, run);
  else if (f.bits == 8) known = with_dim<8>(f.dim, run);
  return known ? ffi::Error::Success() : ffi::Error::InvalidArgument("no kernel for this index_bits and dim");
}

using U8 = ffi::Buffer<ffi::U8, 3>;
using S8 = ffi::Buffer<ffi::S8, 5>;
using F16 = ffi::Buffer<ffi::F16, 3>;
using U8Matrix = ffi::Buffer<ffi::U8, 2>;
using F16Matrix = ffi::Buffer<ffi::F16, 2>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::ResultBuffer<ffi::F32, 2>;

Format format_of(const U8& codes, const S8& centroids, const F16& scales, int64_t cols, int64_t strip_rows,
                 int64_t strip_cols, int64_t bits) {
  auto c = codes.dimensions(), b = centroids.dimensions();
  return {c[0], c[1], c[2], b[1], b[2], b[3], b[4], cols, strip_rows, strip_cols, bits,
          codes.typed_data(), centroids.typed_data(), reinterpret_cast<const uint16_t*>(scales.typed_data())};
}

ffi::Error VqMatmul(ffi::ThreadPool pool, Matrix x, U8 codes, S8 centroids, F16 scales, int64_t strip_rows,
                    int64_t strip_cols, int64_t bits, bool round_x, Result y) {
  auto xd = x.dimensions();
  Format f = format_of(codes, centroids, scales, xd[1], strip_rows, strip_cols, bits);
  return specialize(f, [&]<int B, int D>() {
    auto run = round_x ? product<B, D, Int8Product<D>> : product<B, D, FloatProduct<D>>;
    run(f, x.typed_data(), xd[0], pool, y->typed_data());
  });
}

ffi::Error VqDecode(ffi::ThreadPool pool, U8 codes, S8 centroids, F16 scales, int64_t strip_rows,
                    int64_t strip_cols, int64_t bits, Result weight) {
  int64_t cols = weight->dimensions()[1];
  Format f = format_of(codes, centroids, scales, cols, strip_rows, strip_cols, bits);
  return specialize(f, [&]<int B, int D>() { decode<B, D>(f, pool, weight->typed_data()); });
}

// W[r, c] = scale[r, c / 128] * (code - 8), int8 activations as above.
constexpr int64_t kInt4Group = 128, kInt4Vectors = kInt4Group / (2 * kLanes);
ffi::Error Int4Matmul(ffi::ThreadPool pool, Matrix x, U8Matrix codes, F16Matrix scales, Result y) {
  const int64_t batch = x.dimensions()[0], cols = x.dimensions()[1], rows = codes.dimensions()[0];
  const int64_t groups = cols / kInt4Group;
  const uint16_t* scale = reinterpret_cast<const uint16_t*>(scales.typed_data());
  // As the codes come out: the even columns of 2 kLanes, then the odd ones.
  std::vector<int8_t> q(batch * cols);
  std::vector<float> x_scale(batch);
  std::vector<Ints> starts(batch * groups);  // minus 8 times the activations that each lane sees
  for (int64_t n = 0; n < batch; n++) {
    const float* row = x.typed_data() + n * cols;
    int8_t* to = q.data() + n * cols;
    x_scale[n] = round_row(row, cols, [&](auto round) {
      for (int64_t c = 0; c < cols; c++)
        to[c / (2 * kLanes) * (2 * kLanes) + c % 2 * kLanes + c % (2 * kLanes) / 2] = round(row[c]);
    });
    for (int64_t g = 0; g < groups; g++) {
      Ints sum = zero_ints();
      for (int64_t i = 0; i < kInt4Group; i += kLanes) sum = dot_nibbles(sum, simd::fill(8), load(to + g * kInt4Group + i));
      starts[n * groups + g] = sub(zero_ints(), sum);
    }
  }
  const int64_t step = item_rows(rows, cols, 1, pool.num_threads());
  parallel(pool, (rows + step - 1) / step, [&](int64_t item) {
    std::vector<float> row_scale(groups);
    for (int64_t r = item * step; r < std::min(rows, (item + 1) * step); r++) {
      for (int64_t g = 0; g < groups; g++) row_scale[g] = half_to_float(scale[r * groups + g]);
      for (int64_t n = 0; n < batch; n++) {
        const uint8_t* code = codes.typed_data() + r * (cols / 2);
        const int8_t* act = q.data() + n * cols;
        Floats total = zero();
        for (int64_t g = 0; g < groups; g++) {
          Ints dots = starts[n * groups + g];
          for (int v = 0; v < kInt4Vectors; v++, code += kLanes, act += 2 * kLanes) {
            Bytes packed = load(code);
            dots = dot_nibbles(dots, low_nibbles(packed), load(act));
            dots = dot_nibbles(dots, high_nibbles(packed), load(act + kLanes));
          }
          total = fma(to_float(dots), row_scale[g], total);
        }
        y->typed_data()[n * rows + r] = x_scale[n] * sum(total);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" const char* simd_name() { return SIMD_NAME; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(vq_matmul, VqMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<U8>()
                                  .Arg<S8>()
                                  .Arg<F16>()
                                  .Attr<int64_t>("strip_rows")
                                  .Attr<int64_t>("strip_cols")
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("round_x")
                                  .Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vq_decode, VqDecode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<U8>()
                                  .Arg<S8>()
                                  .Arg<F16>()
                                  .Attr<int64_t>("strip_rows")
                                  .Attr<int64_t>("strip_cols")
                                  .Attr<int64_t>("bits")
                                  .Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(int4_matmul, Int4Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<U8Matrix>()
                                  .Arg<F16Matrix>()
                                  .Ret<Matrix>());
