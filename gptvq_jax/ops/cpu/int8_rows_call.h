// Products with int8 rows as XLA calls them.
#pragma once
#include "int8_rows.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {
using RowsOfX = ffi::Buffer<ffi::F32, 2>;
using RowCodes = ffi::Buffer<ffi::U8, 2>;
using RowScales = ffi::Buffer<ffi::F16, 1>;

ffi::Error Int8RowsMatmul(ffi::ThreadPool pool, RowsOfX x, RowCodes codes, RowScales scales,
                          ffi::Result<RowsOfX> y) {
  const auto c = codes.dimensions(), n = y->dimensions();
  const int64_t batch = x.dimensions()[0];
  if (x.dimensions()[1] != c[1] || scales.dimensions()[0] != c[0] || n[0] != batch || n[1] != c[0])
    return ffi::Error::InvalidArgument("the shapes of the arrays do not fit each other");
  const Int8Rows w{c[0], c[1], codes.typed_data(),
                   reinterpret_cast<const uint16_t*>(scales.typed_data())};
  int8_rows_product(w, x.typed_data(), batch, pool, y->typed_data());
  return ffi::Error::Success();
}
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(int8_rows_matmul, Int8RowsMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<RowsOfX>()
                                  .Arg<RowCodes>()
                                  .Arg<RowScales>()
                                  .Ret<RowsOfX>());
