// The product as XLA calls it. nvcc makes the kernel of it; a C++ compiler (-x c++) makes the same
// arithmetic with loops in the place of blocks and threads, which tests run where there is no GPU.
#include "decode.h"
#include "xla/ffi/api/ffi.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace ffi = xla::ffi;

namespace gptvq {

using Digits = ffi::Buffer<ffi::U32, 6>;
using Words = ffi::Buffer<ffi::U32, 4>;
using Floats = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::Result<Floats>;

constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

#ifdef __CUDACC__

template <int D, int Rows, int Q, int Batch>
__global__ void __launch_bounds__(kThreads) product_kernel(const Problem p) {
  __shared__ float of_warps[kWarps][Batch * Rows];
  float sums[Batch][Rows];
  const int first = blockIdx.y * Batch;
  thread_sums<D, Rows, Q, Batch>(p, blockIdx.x, first, threadIdx.x, sums);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
#pragma unroll
  for (int n = 0; n < Batch; n++)
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      float sum = sums[n][r];
#pragma unroll
      for (int apart = kLanes / 2; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      if (lane == 0) of_warps[warp][n * Rows + r] = sum;
    }
  __syncthreads();
  const int n = threadIdx.x / Rows, r = threadIdx.x % Rows;
  if (n >= Batch || first + n >= p.batch) return;
  float sum = 0;
  for (int w = 0; w < kWarps; w++) sum += of_warps[w][threadIdx.x];
  p.y[(int64_t{first} + n) * p.row_tiles * Rows + blockIdx.x * Rows + r] = sum;
}

using Stream = cudaStream_t;

template <int D, int Rows, int Q, int Batch>
ffi::Error run(const Problem& p, Stream stream) {
  const dim3 blocks(p.row_tiles, (p.batch + Batch - 1) / Batch);
  product_kernel<D, Rows, Q, Batch><<<blocks, kThreads, 0, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success()
                              : ffi::Error::Internal(cudaGetErrorString(error));
}

#else

using Stream = int;

template <int D, int Rows, int Q, int Batch>
ffi::Error run(const Problem& p, Stream) {
  for (int tile = 0; tile < p.row_tiles; tile++)
    for (int first = 0; first < p.batch; first += Batch) {
      float sums[kThreads][Batch][Rows];
      for (int t = 0; t < kThreads; t++)
        thread_sums<D, Rows, Q, Batch>(p, tile, first, t, sums[t]);
      for (int n = 0; n < Batch && first + n < p.batch; n++)
        for (int r = 0; r < Rows; r++) {
          float total = 0;
          for (int w = 0; w < kWarps; w++) {
            for (int apart = kLanes / 2; apart; apart /= 2)  // as the shuffles add
              for (int lane = 0; lane < apart; lane++)
                sums[w * kLanes + lane][n][r] += sums[w * kLanes + lane + apart][n][r];
            total += sums[w * kLanes][n][r];
          }
          p.y[(int64_t{first} + n) * p.row_tiles * Rows + int64_t{tile} * Rows + r] = total;
        }
    }
  return ffi::Error::Success();
}

#endif

template <int D, int Rows, int Q>
ffi::Error for_batch(const Problem& p, Stream stream) {
  constexpr int kMost = D <= 2 && Q == 2 ? 4 : 2;  // rows of x: more, and registers would not do
  return p.batch == 1 ? run<D, Rows, Q, 1>(p, stream) : run<D, Rows, Q, kMost>(p, stream);
}

template <int D, int Rows>
ffi::Error for_digits(const Problem& p, int64_t digits, Stream stream) {
  return digits == 2 ? for_batch<D, Rows, 2>(p, stream) : for_batch<D, Rows, 3>(p, stream);
}

template <int D>
ffi::Error for_rows(const Problem& p, int64_t rows, int64_t digits, Stream stream) {
  return rows == 4 ? for_digits<D, 4>(p, digits, stream) : for_digits<D, 8>(p, digits, stream);
}

ffi::Error product(Stream stream, Digits x, Floats x_scales, Words codes, Words tables,
                   Floats scales, int64_t strip_tiles, int64_t rows, Result y) {
  const auto a = x.dimensions(), s = x_scales.dimensions(), c = codes.dimensions();
  const auto t = tables.dimensions(), g = scales.dimensions(), out = y->dimensions();
  const int64_t batch = a[0], digits = a[2], units = c[2], dim = t[2];
  // Python has looked already; here a mistake would become a read beyond an array.
  const bool known = (dim == 1 || dim == 2 || dim == 4) && (rows == 4 || rows == 8) &&
                     (digits == 2 || digits == 3) && batch > 0 && g[0] > 0 && strip_tiles > 0;
  if (!known || units % g[0] || units >= int64_t{1} << 15 || a[1] != kUnitWords ||
      a[3] * a[5] != 2 * dim || a[4] != units || s[0] != batch || s[1] != g[0] || t[0] != g[0] ||
      t[1] != g[1] || t[3] != 4 || c[0] != g[1] * strip_tiles ||
      c[1] != kUnitWords * rows / 4 || c[3] != 4 || out[0] != batch || out[1] != c[0] * rows)
    return ffi::Error::InvalidArgument("the shapes of the arrays do not fit each other");
  const int32_t strip_units = units / g[0];
  const Problem p{codes.typed_data(), tables.typed_data(), scales.typed_data(), x.typed_data(),
                  x_scales.typed_data(), y->typed_data(), static_cast<int32_t>(batch),
                  static_cast<int32_t>(c[0]), static_cast<int32_t>(g[1]),
                  static_cast<int32_t>(g[0]), static_cast<int32_t>(strip_tiles),
                  static_cast<int32_t>(units), strip_units,
                  static_cast<uint32_t>(((int64_t{1} << 31) + strip_units - 1) / strip_units)};
  if (dim == 1) return for_rows<1>(p, rows, digits, stream);
  if (dim == 2) return for_rows<2>(p, rows, digits, stream);
  return for_rows<4>(p, rows, digits, stream);
}

// As XLA calls it: on a GPU with the stream that orders its work.
#ifdef __CUDACC__
ffi::Error call(Stream stream, Digits x, Floats x_scales, Words codes, Words tables, Floats scales,
                int64_t strip_tiles, int64_t rows, Result y) {
  return product(stream, x, x_scales, codes, tables, scales, strip_tiles, rows, y);
}
#define GPTVQ_BIND() ffi::Ffi::Bind().Ctx<ffi::PlatformStream<gptvq::Stream>>()
#else
ffi::Error call(Digits x, Floats x_scales, Words codes, Words tables, Floats scales,
                int64_t strip_tiles, int64_t rows, Result y) {
  return product(0, x, x_scales, codes, tables, scales, strip_tiles, rows, y);
}
#define GPTVQ_BIND() ffi::Ffi::Bind()
#endif

}  // namespace gptvq

XLA_FFI_DEFINE_HANDLER_SYMBOL(packed_product, gptvq::call,
                              GPTVQ_BIND()
                                  .Arg<gptvq::Digits>()
                                  .Arg<gptvq::Floats>()
                                  .Arg<gptvq::Words>()
                                  .Arg<gptvq::Words>()
                                  .Arg<gptvq::Floats>()
                                  .Attr<int64_t>("strip_tiles")
                                  .Attr<int64_t>("rows")
                                  .Ret<gptvq::Floats>());
