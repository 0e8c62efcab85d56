// The kernels as XLA calls them.
#include "block_call.h"
#include "direct.h"
#include "int8_rows_call.h"
#include "lookup.h"
#include "int4.h"
#include "trellis_call.h"
#include "viterbi.h"
#include "vq_call.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using U8Matrix = ffi::Buffer<ffi::U8, 2>;
using F16Matrix = ffi::Buffer<ffi::F16, 2>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using F32Books = ffi::Buffer<ffi::F32, 5>;
using F32Scales = ffi::Buffer<ffi::F32, 3>;
using Scalar = ffi::Buffer<ffi::S32, 0>;
using Integers = ffi::Buffer<ffi::S32, 2>;
using IntVector = ffi::Buffer<ffi::S32, 1>;

ffi::Error DirectMatmul(ffi::ThreadPool pool, Matrix x, U8 codes, F32Books centroids,
                        F32Scales scales, int64_t strip_rows, int64_t strip_cols, int64_t bits,
                        int64_t block_size, Result y) {
  const int64_t batch = x.dimensions()[0], cols = x.dimensions()[1];
  const auto c = codes.dimensions(), b = centroids.dimensions();
  const DirectFormat f{c[0], c[1], c[2], b[1], b[2], b[3], b[4],
                       cols, strip_rows, strip_cols, bits, scales.dimensions()[2], block_size,
                       codes.typed_data(), centroids.typed_data(), scales.typed_data()};
  const auto s = scales.dimensions(), n = y->dimensions();
  const bool blocks = f.blocks == 0 ||
                      (block_size > 0 && f.blocks == divide_up(strip_cols, block_size));
  if (!consistent(f, centroids, batch, n[0], n[1]) || s[0] != f.rows || s[1] != f.col_strips || !blocks)
    return ffi::Error::InvalidArgument(kMismatch);
  return done(direct(f, x.typed_data(), batch, pool, y->typed_data()));
}

ffi::Error Int4Matmul(ffi::ThreadPool pool, Matrix x, U8Matrix codes, F16Matrix scales, Result y) {
  const int64_t rows = codes.dimensions()[0], cols = x.dimensions()[1];
  if (cols % Int4::kGroup) return ffi::Error::InvalidArgument("columns must be in groups of 128");
  const auto c = codes.dimensions(), s = scales.dimensions(), n = y->dimensions();
  if (2 * c[1] != cols || s[0] != rows || s[1] != cols / Int4::kGroup ||
      n[0] != x.dimensions()[0] || n[1] != rows)
    return ffi::Error::InvalidArgument(kMismatch);
  const Int4 w{rows, cols, cols / Int4::kGroup, codes.typed_data(),
               reinterpret_cast<const uint16_t*>(scales.typed_data())};
  int4_product(w, x.typed_data(), x.dimensions()[0], pool, y->typed_data());
  return ffi::Error::Success();
}

int64_t log2_of(int64_t size) {  // -1: not a power of two
  int64_t bits = 0;
  while (int64_t{1} << bits < size) bits++;
  return int64_t{1} << bits == size ? bits : -1;
}

ffi::Error ViterbiSearch(ffi::ThreadPool pool, Matrix target, Matrix weight, Vector table,
                         Scalar rate, IntVector overlap, int64_t trace_back,
                         ffi::Result<Integers> windows, ffi::Result<Vector> loss) {
  const auto z = target.dimensions(), w = weight.dimensions(), s = windows->dimensions();
  const int64_t bits = log2_of(table.dimensions()[0]), k = *rate.typed_data();
  if (z[0] != w[0] || z[1] != w[1] || s[0] != z[0] || s[1] != z[1] ||
      loss->dimensions()[0] != z[0] || overlap.dimensions()[0] != z[0] || bits < 1 || k < 0 || k > 6 || k > bits ||
      z[1] < bits)
    return ffi::Error::InvalidArgument(kMismatch);
  if (k == 0) {
    std::fill_n(windows->typed_data(), z[0] * z[1], 0);
    std::fill_n(loss->typed_data(), z[0], 0.0f);
    return ffi::Error::Success();
  }
  tail_biting(target.typed_data(), weight.typed_data(), table.typed_data(), bits, k, z[0], z[1],
              overlap.typed_data(), trace_back * divide_up(bits, k), pool, windows->typed_data(),
              loss->typed_data());
  return ffi::Error::Success();
}

}  // namespace

extern "C" const char* simd_name() { return SIMD_NAME; }
extern "C" int weight_bias() { return simd::kBias; }  // of int8 levels of trellis codes

XLA_FFI_DEFINE_HANDLER_SYMBOL(vq_direct_matmul, DirectMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<U8>()
                                  .Arg<F32Books>()
                                  .Arg<F32Scales>()
                                  .Attr<int64_t>("strip_rows")
                                  .Attr<int64_t>("strip_cols")
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("block_size")
                                  .Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(int4_matmul, Int4Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<U8Matrix>()
                                  .Arg<F16Matrix>()
                                  .Ret<Matrix>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(viterbi, ViterbiSearch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<Matrix>()
                                  .Arg<Vector>()
                                  .Arg<Scalar>()
                                  .Arg<IntVector>()
                                  .Attr<int64_t>("trace_back")
                                  .Ret<Integers>()
                                  .Ret<Vector>());

// Those whose arguments are x (N, C) and the arrays of a weight (R, C), and that give (N, R).
namespace {
XLA_FFI_Handler* layer_handler(std::string_view target) {
  if (target == "gptvq_vq_matmul") return vq_matmul;
  if (target == "gptvq_vq_direct_matmul") return vq_direct_matmul;
  if (target == "gptvq_trellis_matmul") return trellis_matmul;
  if (target == "gptvq_trellis_int8_matmul") return trellis_int8_matmul;
  return nullptr;
}
}  // namespace
