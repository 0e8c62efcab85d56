// A block of the decoder (block.h) as XLA calls it. Its layers are called as XLA would call them,
// as the functions of this library that an attribute of each names.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "block.h"
#include "simd.h"
#include "vq_call.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {
using FloatRows = ffi::Buffer<ffi::F32, 2>;
using FloatRow = ffi::Buffer<ffi::F32, 1>;
using IntRow = ffi::Buffer<ffi::S32, 1>;
using CacheArray = ffi::Buffer<ffi::F32, 3>;

// One layer as an attribute of the call: a dictionary of "target", the name of its function,
// "arrays", how many that takes beside x, and its attributes.
struct LayerCall {
  XLA_FFI_Handler* handler;
  int64_t arrays;
  std::optional<VqSizes> vq;  // where its work can be done beside that of others
  std::vector<XLA_FFI_AttrType> types;
  std::vector<XLA_FFI_ByteSpan*> names;
  std::vector<void*> attributes;
};

XLA_FFI_Handler* layer_handler(std::string_view target);  // null: there is none

// What functions of XLA's interface are called with.
struct Caller {
  const XLA_FFI_Api* api;
  XLA_FFI_ExecutionContext* context;
};

}  // namespace

template <>
struct xla::ffi::AttrDecoding<LayerCall> {
  using Type = LayerCall;
  static std::optional<LayerCall> Decode(XLA_FFI_AttrType type, void* attribute,
                                         DiagnosticEngine& diagnostic) {
    const auto dictionary = AttrDecoding<Dictionary>::Decode(type, attribute, diagnostic);
    if (!dictionary) return std::nullopt;
    const auto target = dictionary->get<std::string_view>("target");
    const auto arrays = dictionary->get<int64_t>("arrays");
    XLA_FFI_Handler* handler = target ? layer_handler(*target) : nullptr;
    if (!handler || !arrays || *arrays < 0)
      return diagnostic.Emit("not a layer of this library"), std::nullopt;
    LayerCall call{handler, *arrays, {}, {}, {}, {}};
    const auto integer = [&](const char* name) { return *dictionary->get<int64_t>(name); };
    if (*target == "gptvq_vq_matmul" && *arrays == 3)
      call.vq = {integer("strip_rows"), integer("strip_cols"), integer("bits"),
                 *dictionary->get<bool>("round_x")};
    const auto* all = static_cast<const XLA_FFI_Attrs*>(attribute);
    for (int64_t i = 0; i < all->size; i++) {
      const std::string_view name(all->names[i]->ptr, all->names[i]->len);
      if (name == "target" || name == "arrays") continue;
      call.types.push_back(all->types[i]), call.names.push_back(all->names[i]);
      call.attributes.push_back(all->attrs[i]);
    }
    return call;
  }
};
template <>
struct xla::ffi::CtxDecoding<Caller> {
  using Type = Caller;
  static std::optional<Caller> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                      DiagnosticEngine&) {
    return Caller{api, context};
  }
};

namespace {

// A float32 matrix as XLA hands it over.
struct MatrixBuffer {
  MatrixBuffer(const float* data, int64_t rows, int64_t cols) : dims{rows, cols} {
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.extension_start = nullptr;
    buffer.dtype = XLA_FFI_DataType_F32;
    buffer.data = const_cast<float*>(data);
    buffer.rank = 2, buffer.dims = dims;
  }
  MatrixBuffer(const MatrixBuffer&) = delete;
  int64_t dims[2];
  XLA_FFI_Buffer buffer;
};

// y (batch, rows) = x (batch, cols) times the layer whose arrays are given; null, or the error.
inline XLA_FFI_Error* call_layer(const Caller& caller, LayerCall& layer,
                                 const std::vector<ffi::AnyBuffer>& arrays, int64_t first,
                                 MatrixBuffer& x, MatrixBuffer& y) {
  constexpr int kMost = 16;
  XLA_FFI_Buffer buffers[kMost];
  void* args[kMost + 1] = {&x.buffer};
  XLA_FFI_ArgType types[kMost + 1] = {XLA_FFI_ArgType_BUFFER};
  for (int64_t i = 0; i < layer.arrays; i++) {
    const ffi::AnyBuffer& array = arrays[first + i];
    const auto dims = array.dimensions();
    buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr,
                  static_cast<XLA_FFI_DataType>(array.element_type()), array.untyped_data(),
                  static_cast<int64_t>(dims.size()), const_cast<int64_t*>(dims.begin())};
    args[i + 1] = &buffers[i], types[i + 1] = XLA_FFI_ArgType_BUFFER;
  }
  void* results[] = {&y.buffer};
  XLA_FFI_RetType result_types[] = {XLA_FFI_RetType_BUFFER};
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = caller.api, frame.ctx = caller.context, frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, layer.arrays + 1, types, args};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, 1, result_types, results};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(layer.types.size()),
                 layer.types.data(), layer.names.data(), layer.attributes.data()};
  return layer.handler(&frame);
}

// A vector of float16 or float32 as numbers; empty for other types.
inline Values values_of(const ffi::AnyBuffer& array) {
  Values values(array.element_count());
  if (array.element_type() == ffi::F32)
    std::memcpy(values.data(), array.untyped_data(), 4 * values.size());
  else if (array.element_type() == ffi::F16)
    simd::half_to_floats(static_cast<const uint16_t*>(array.untyped_data()), values.size(),
                         values.data());
  else values.clear();
  return values;
}

// The arrays behind the caches are: 6 norms; then, of every layer, row scales, bias, and its own.
ffi::Error BlockStep(ffi::ThreadPool pool, Caller caller, FloatRows x, IntRow positions,
                     FloatRow frequencies, CacheArray k_cache, CacheArray v_cache,
                     ffi::RemainingArgs rest, LayerCall q, LayerCall k, LayerCall v, LayerCall o,
                     LayerCall gate, LayerCall up, LayerCall down, ffi::Dictionary sizes,
                     ffi::Result<FloatRows> y, ffi::Result<CacheArray> k_updated,
                     ffi::Result<CacheArray> v_updated) {
  const auto bad = [](const char* why) { return ffi::Error::InvalidArgument(why); };
  const auto integer = [&](const char* name) -> int64_t {
    const auto value = sizes.get<int64_t>(name);
    return value ? *value : -1;
  };
  const auto number = [&](const char* name) {
    const auto value = sizes.get<float>(name);
    return value ? *value : 0;
  };
  LayerCall* layers[kLayers] = {&q, &k, &v, &o, &gate, &up, &down};
  Block block;
  block.hidden = x.dimensions()[1], block.inner = integer("inner");
  block.eps = number("eps"), block.residual_scale = number("residual_scale");
  block.gelu = integer("gelu");
  const auto cache = k_cache.dimensions();
  const int64_t batch = x.dimensions()[0], heads = integer("heads");
  AttentionShape& a = block.attention;
  a = {batch, heads, integer("kv_heads"), cache[2], cache[1], integer("window"),
       number("scale"), number("softcap"), static_cast<int64_t>(frequencies.element_count()),
       number("rotary_factor")};
  if (a.kv_heads < 1 || heads < 1 || heads % a.kv_heads || cache[0] != batch * a.kv_heads ||
      v_cache.element_count() != k_cache.element_count() || 2 * a.pairs > a.head_dim ||
      positions.dimensions()[0] != batch || y->element_count() != x.element_count() ||
      block.inner < 1 || a.window < 0)
    return bad("the shapes of the arrays do not fit each other");
  // XLA may not alias what it was asked to: then the caches are copied.
  const auto follow = [](auto& from, auto& to) {
    if (from.typed_data() != to->typed_data())
      std::copy_n(from.typed_data(), from.element_count(), to->typed_data());
  };
  follow(x, y), follow(k_cache, k_updated), follow(v_cache, v_updated);
  for (int64_t n = 0; n < batch; n++)
    if (positions.typed_data()[n] < 0 || positions.typed_data()[n] >= a.max_len)
      return bad("a position is outside of the cache");

  std::vector<ffi::AnyBuffer> arrays;
  for (size_t i = 0; i < rest.size(); i++) {
    const auto array = rest.get<ffi::AnyBuffer>(i);
    if (!array) return bad("an argument is no array");
    arrays.push_back(*array);
  }
  size_t next = kNorms;
  int64_t first[kLayers];  // of the arrays of a layer
  const int64_t widths[kLayers] = {a.q_size(), a.kv_size(), a.kv_size(), block.hidden,
                                   block.inner, block.inner, block.hidden};
  const int64_t reads[kLayers] = {block.hidden, block.hidden, block.hidden, a.q_size(),
                                  block.hidden, block.hidden, block.inner};
  for (int i = 0; i < kLayers; next = first[i] + layers[i]->arrays, i++) {
    if (next + 2 + layers[i]->arrays > arrays.size() || layers[i]->arrays > 16)
      return bad("an array of a layer is missing");
    block.row_scales[i] = values_of(arrays[next]), block.biases[i] = values_of(arrays[next + 1]);
    for (const Values* values : {&block.row_scales[i], &block.biases[i]})
      if (!values->empty() && static_cast<int64_t>(values->size()) != widths[i])
        return bad("a layer has not as many row scales or biases as outputs");
    first[i] = next + 2;
  }
  const int64_t normed[kNorms] = {block.hidden, block.hidden, block.hidden, block.hidden,
                                  a.q_size(), a.kv_size()};
  for (int i = 0; i < kNorms; i++) {
    block.norms[i] = values_of(arrays[i]);
    const int64_t size = block.norms[i].size();
    if (size && size != normed[i] && !(i >= kQNorm && size == a.head_dim))
      return bad("a norm has another size than what it is of");
  }

  XLA_FFI_Error* error = nullptr;
  auto product = [&](const std::vector<LayerIndex>& which, const float* from,
                     const std::vector<float*>& to) {
    std::vector<Job> jobs;
    for (size_t l = 0; l < which.size(); l++) {
      const LayerIndex i = which[l];
      std::optional<Job> job;
      if (const auto& vq = layers[i]->vq)
        job = vq_layer_job(*vq, &arrays[first[i]], from, batch, reads[i], widths[i], pool, to[l]);
      if (job) {
        jobs.push_back(std::move(*job));
        continue;
      }
      MatrixBuffer in(from, batch, reads[i]), out(to[l], batch, widths[i]);
      error = call_layer(caller, *layers[i], arrays, first[i], in, out);
      if (error) return false;
    }
    parallel(pool, jobs);
    return true;
  };
  run_block(block, y->typed_data(), positions.typed_data(), frequencies.typed_data(), pool, product,
            k_updated->typed_data(), v_updated->typed_data());
  if (!error) return ffi::Error::Success();
  const std::string message = ffi::internal::GetErrorMessage(caller.api, error);
  ffi::internal::DestroyError(caller.api, error);
  return ffi::Error::Internal(message);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(block_step, BlockStep,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Ctx<Caller>()
                                  .Arg<FloatRows>()
                                  .Arg<IntRow>()
                                  .Arg<FloatRow>()
                                  .Arg<CacheArray>()
                                  .Arg<CacheArray>()
                                  .RemainingArgs()
                                  .Attr<LayerCall>("q")
                                  .Attr<LayerCall>("k")
                                  .Attr<LayerCall>("v")
                                  .Attr<LayerCall>("o")
                                  .Attr<LayerCall>("gate")
                                  .Attr<LayerCall>("up")
                                  .Attr<LayerCall>("down")
                                  .Attr<ffi::Dictionary>("sizes")
                                  .Ret<FloatRows>()
                                  .Ret<CacheArray>()
                                  .Ret<CacheArray>());
