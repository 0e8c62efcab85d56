// Products with trellis codes as XLA calls them; read by kernels.cc.
#pragma once
#include "trellis.h"
#include "xla/ffi/api/ffi.h"

namespace {

struct TrellisArrays {
  using Bytes = xla::ffi::Buffer<xla::ffi::U8, 1>;
  using Integers = xla::ffi::Buffer<xla::ffi::S32, 1>;
  using Floats = xla::ffi::Buffer<xla::ffi::F32, 1>;
  using Matrix = xla::ffi::Buffer<xla::ffi::F32, 2>;
  using Result = xla::ffi::ResultBuffer<xla::ffi::F32, 2>;

  template <class Array>
  static int64_t size(const Array& array) {
    return array.dimensions()[0];
  }
  // The arrays that both products have, and whether their sizes fit each other.
  static bool read(const Matrix& x, const Bytes& codes, const Integers& rate_quads,
                   const Integers& order, const Floats& col_scales, const Floats& row_scales,
                   const Integers& outlier_rows, const Integers& outlier_cols,
                   const Floats& outlier_values, const Integers& outlier_starts,
                   int64_t stream_rows, int64_t bits, bool shared, Result& y, TrellisFormat& f) {
    f = {.rows = size(row_scales), .cols = x.dimensions()[1], .stream_rows = stream_rows,
         .bits = bits, .num_bytes = size(codes), .num_quads = size(order) / 4,
         .codes = codes.typed_data(), .rate_quads = rate_quads.typed_data(),
         .order = order.typed_data(), .col_scales = col_scales.typed_data(),
         .row_scales = row_scales.typed_data(), .table = nullptr, .levels = nullptr,
         .parts = nullptr, .level_scale = 1, .shared = shared, .num_outliers = size(outlier_values),
         .outlier_rows = outlier_rows.typed_data(), .outlier_cols = outlier_cols.typed_data(),
         .outlier_starts = outlier_starts.typed_data(),
         .outlier_values = outlier_values.typed_data()};
    return f.cols > 0 && f.rows > 0 && bits >= 1 && bits <= 16 && stream_rows >= bits &&
           size(rate_quads) == 7 && size(order) % 4 == 0 && size(col_scales) == size(order) &&
           size(outlier_rows) == f.num_outliers && size(outlier_cols) == f.num_outliers &&
           size(outlier_starts) == f.cuts() + 1 && size(x) == size(*y) &&
           y->dimensions()[1] == f.rows && f.consistent();
  }
  static xla::ffi::Error mismatch() {
    return xla::ffi::Error::InvalidArgument("the shapes of the arrays do not fit each other");
  }
  static auto binding() {
    return xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().Arg<Matrix>().Arg<Bytes>()
        .Arg<Integers>().Arg<Integers>().Arg<Floats>().Arg<Floats>().Arg<Integers>()
        .Arg<Integers>().Arg<Floats>().Arg<Integers>();
  }
};

xla::ffi::Error TrellisMatmul(xla::ffi::ThreadPool pool, TrellisArrays::Matrix x,
                              TrellisArrays::Bytes codes, TrellisArrays::Integers rate_quads,
                              TrellisArrays::Integers order, TrellisArrays::Floats col_scales,
                              TrellisArrays::Floats row_scales, TrellisArrays::Integers rows,
                              TrellisArrays::Integers cols, TrellisArrays::Floats values,
                              TrellisArrays::Integers starts, TrellisArrays::Floats table,
                              int64_t stream_rows, int64_t bits, bool shared,
                              TrellisArrays::Result y) {
  TrellisFormat f;
  if (!TrellisArrays::read(x, codes, rate_quads, order, col_scales, row_scales, rows, cols, values,
                           starts, stream_rows, bits, shared, y, f) ||
      TrellisArrays::size(table) != int64_t{1} << bits)
    return TrellisArrays::mismatch();
  f.table = table.typed_data();
  trellis_product<TrellisFloats>(f, x.typed_data(), TrellisArrays::size(x), pool, y->typed_data());
  return xla::ffi::Error::Success();
}

xla::ffi::Error TrellisInt8Matmul(xla::ffi::ThreadPool pool, TrellisArrays::Matrix x,
                                  TrellisArrays::Bytes codes, TrellisArrays::Integers rate_quads,
                                  TrellisArrays::Integers order, TrellisArrays::Floats col_scales,
                                  TrellisArrays::Floats row_scales, TrellisArrays::Integers rows,
                                  TrellisArrays::Integers cols, TrellisArrays::Floats values,
                                  TrellisArrays::Integers starts, TrellisArrays::Bytes levels,
                                  TrellisArrays::Floats unit, TrellisArrays::Bytes parts,
                                  int64_t stream_rows, int64_t bits, bool shared,
                              TrellisArrays::Result y) {
  TrellisFormat f;
  const int64_t size = TrellisArrays::size(parts);
  if (!TrellisArrays::read(x, codes, rate_quads, order, col_scales, row_scales, rows, cols, values,
                           starts, stream_rows, bits, shared, y, f) ||
      TrellisArrays::size(levels) != std::max<int64_t>(256, int64_t{1} << bits) ||
      TrellisArrays::size(unit) != 1 || (size && (size != kPartBytes || bits < 9 || bits > 12)))
    return TrellisArrays::mismatch();
  f.levels = levels.typed_data(), f.parts = size ? parts.typed_data() : nullptr;
  f.level_scale = unit.typed_data()[0];
  const int64_t batch = TrellisArrays::size(x);
  if (bits <= 8) trellis_product<TrellisBytes<1>>(f, x.typed_data(), batch, pool, y->typed_data());
  else trellis_product<TrellisBytes<2>>(f, x.typed_data(), batch, pool, y->typed_data());
  return xla::ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(trellis_matmul, TrellisMatmul,
                              TrellisArrays::binding()
                                  .Arg<TrellisArrays::Floats>()
                                  .Attr<int64_t>("stream_rows")
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("shared")
                                  .Ret<TrellisArrays::Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(trellis_int8_matmul, TrellisInt8Matmul,
                              TrellisArrays::binding()
                                  .Arg<TrellisArrays::Bytes>()
                                  .Arg<TrellisArrays::Floats>()
                                  .Arg<TrellisArrays::Bytes>()
                                  .Attr<int64_t>("stream_rows")
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("shared")
                                  .Ret<TrellisArrays::Matrix>());
