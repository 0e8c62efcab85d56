// Products with vector quantized weights as XLA calls them, and as a block does (block_call.h).
#pragma once
#include <algorithm>
#include <optional>

#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using U8 = ffi::Buffer<ffi::U8, 3>;
using S8 = ffi::Buffer<ffi::S8, 5>;
using F16 = ffi::Buffer<ffi::F16, 3>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::ResultBuffer<ffi::F32, 2>;

constexpr char kMismatch[] = "the shapes of the arrays do not fit each other";

// The attributes of a call.
struct VqSizes {
  int64_t strip_rows, strip_cols, bits;
  bool round_x;
};

// Arrays of any buffers, whose types and ranks are those of VqMatmul.
template <class Codes, class Books, class Scales>
Format format_of(const Codes& codes, const Books& centroids, const Scales& scales, int64_t cols,
                 const VqSizes& sizes) {
  const auto c = codes.dimensions(), b = centroids.dimensions();
  return {c[0], c[1], c[2], b[1], b[2], b[3], b[4], cols, sizes.strip_rows, sizes.strip_cols,
          sizes.bits, static_cast<const uint8_t*>(codes.untyped_data()),
          static_cast<const int8_t*>(centroids.untyped_data()),
          static_cast<const uint16_t*>(scales.untyped_data())};
}

// Whether the arrays have the sizes that the kernels take for granted. Python has looked already;
// this costs nothing and is where a mistake would become a write beyond an array.
template <class F, class Books>
bool consistent(const F& f, const Books& books, int64_t batch, int64_t y_rows, int64_t y_cols) {
  if (std::min({f.books, f.rows, f.cols, f.dim, f.bits}) < 1 || f.bits > 16) return false;
  if (std::min(f.strip_rows, f.strip_cols) < 1 || f.strip_cols % f.dim) return false;
  return books.dimensions()[0] == f.books && f.size == int64_t{1} << f.bits &&
         f.strip_cols < f.cols + f.dim && f.col_strips == divide_up(f.cols, f.strip_cols) &&
         f.row_strips == divide_up(f.rows, f.strip_rows) &&
         f.row_bytes == divide_up(divide_up(f.cols, f.dim) * f.bits, 8) && y_rows == batch &&
         y_cols == f.rows;
}
template <class Books, class Scales>
bool same_groups(const Books& centroids, const Scales& scales) {
  const auto b = centroids.dimensions(), s = scales.dimensions();
  return s[0] == b[0] && s[1] == b[1] && s[2] == b[2];
}

ffi::Error done(bool known) {
  return known ? ffi::Error::Success()
               : ffi::Error::InvalidArgument("no kernel for this index_bits and dim");
}

// The work of y = x W^T; none where there is no kernel. x is read before it returns. Rounded
// activations have one digit where that will do, and two elsewhere, which move a row of x by a
// tenth of a thousandth.
template <class Pool>
std::optional<Job> vq_job(const Format& f, bool round_x, const float* x, int64_t batch, Pool& pool,
                          float* y) {
  const int digits = !round_x ? 3 : one_digit_will_do(x, batch, f.cols) ? 1 : 2;
  std::optional<Job> job;
  specialize(f, [&]<int B, int D, int P>() {
    job = digits == 1   ? product_job<1, B, D, P>(f, x, batch, pool, y)
          : digits == 2 ? product_job<2, B, D, P>(f, x, batch, pool, y)
                        : product_job<3, B, D, P>(f, x, batch, pool, y);
  });
  return job;
}

ffi::Error VqMatmul(ffi::ThreadPool pool, Matrix x, U8 codes, S8 centroids, F16 scales,
                    int64_t strip_rows, int64_t strip_cols, int64_t bits, bool round_x, Result y) {
  const int64_t batch = x.dimensions()[0];
  const VqSizes sizes{strip_rows, strip_cols, bits, round_x};
  const Format f = format_of(codes, centroids, scales, x.dimensions()[1], sizes);
  const auto n = y->dimensions();
  if (!consistent(f, centroids, batch, n[0], n[1]) || !same_groups(centroids, scales))
    return ffi::Error::InvalidArgument(kMismatch);
  std::optional<Job> job = vq_job(f, round_x, x.typed_data(), batch, pool, y->typed_data());
  if (job) parallel(pool, *job);
  return done(job.has_value());
}

// The job of a layer, whose arrays are codes, centroids and scales; none where these do not fit.
template <class Pool>
std::optional<Job> vq_layer_job(const VqSizes& sizes, const ffi::AnyBuffer* arrays, const float* x,
                                int64_t batch, int64_t cols, int64_t rows, Pool& pool, float* y) {
  const ffi::AnyBuffer &codes = arrays[0], &centroids = arrays[1], &scales = arrays[2];
  const auto is = [](const ffi::AnyBuffer& array, ffi::DataType type, size_t rank) {
    return array.element_type() == type && array.dimensions().size() == rank;
  };
  if (!is(codes, ffi::U8, 3) || !is(centroids, ffi::S8, 5) || !is(scales, ffi::F16, 3)) return {};
  const Format f = format_of(codes, centroids, scales, cols, sizes);
  if (!consistent(f, centroids, batch, batch, rows) || !same_groups(centroids, scales)) return {};
  return vq_job(f, sizes.round_x, x, batch, pool, y);
}

}  // namespace

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
