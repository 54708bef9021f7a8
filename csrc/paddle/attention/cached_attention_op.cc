// Attention of a step of generation: on a CPU, in float32, without a gradient. keys and values are
// inputs that are written to: for dynamic graphs, as nothing here tells a static one.
#include "attention/cached_attention.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

// What both operators take beside queries, keys and values of the new tokens.
struct Kept {
  const Tensor& keys;
  const Tensor& values;
  const OptionalTensor& first_keys;
  const OptionalTensor& alibi_slopes;
  int64_t position;
  int64_t window;
  float scale;
  float softcap;
};

CachedAttention checked(const Kept& kept, int64_t heads_q) {
  const auto check = [&](const char* name, const Tensor& tensor, const Shape& shape,
                         paddle::DataType dtype) {
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, dtype);
    if (!tensor.is_cpu()) reject(name, " must be on the CPU, got ", tensor.place());
  };
  check_rank("cached_attention: keys", kept.keys, 4);
  const Shape shape = kept.keys.shape();
  check("cached_attention: keys", kept.keys, shape, paddle::DataType::FLOAT32);
  check("cached_attention: values", kept.values, shape, paddle::DataType::FLOAT32);
  CachedAttention p;
  p.batch = shape[0];
  p.heads_q = heads_q;
  p.heads_k = shape[1];
  p.capacity = shape[2];
  p.head_dim = shape[3];
  if (heads_q < 1 || p.heads_k < 1 || heads_q % p.heads_k != 0) {
    reject("cached_attention: ", heads_q, " query heads must be a multiple of the ", p.heads_k,
           " of keys and values");
  }
  if (kept.position < 0 || kept.position >= p.capacity || kept.window < 0) {
    reject("cached_attention: position ", kept.position, " and window ", kept.window,
           " do not fit keys and values of ", p.capacity, " tokens");
  }
  if (kept.first_keys) {
    check("cached_attention: first_keys", *kept.first_keys, {p.batch}, paddle::DataType::INT64);
    p.first_keys = kept.first_keys->data<int64_t>();
  }
  if (kept.alibi_slopes) {
    check("cached_attention: alibi_slopes", *kept.alibi_slopes, {heads_q},
          paddle::DataType::FLOAT32);
    p.alibi_slopes = kept.alibi_slopes->data<float>();
  }
  p.keys = const_cast<float*>(kept.keys.data<float>());
  p.values = const_cast<float*>(kept.values.data<float>());
  p.position = kept.position;
  p.window = kept.window;
  p.scale = kept.scale;
  p.softcap = kept.softcap;
  return p;
}

std::vector<Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys,
                              const Tensor& values, const OptionalTensor& first_keys,
                              const OptionalTensor& alibi_slopes, int64_t position, int64_t window,
                              float scale, float softcap) {
  check_rank("cached_attention: q", q, 4);
  const int64_t heads_q = q.shape()[2];
  CachedAttention p =
      checked({keys, values, first_keys, alibi_slopes, position, window, scale, softcap}, heads_q);
  check_shape("cached_attention: q", q, {p.batch, 1, heads_q, p.head_dim});
  for (const Tensor* each : {&k, &v}) {
    check_shape("cached_attention: k and v", *each, {p.batch, 1, p.heads_k, p.head_dim});
  }
  for (const Tensor* each : {&q, &k, &v}) {
    check_dtype("cached_attention: q, k and v", *each, paddle::DataType::FLOAT32);
    check_place("cached_attention: q, k and v", *each, keys);
  }
  Tensor out = empty(q.shape(), q.dtype(), q);
  p.q = q.data<float>();
  p.k = k.data<float>();
  p.v = v.data<float>();
  p.q_stride = heads_q * p.head_dim;
  p.k_stride = p.heads_k * p.head_dim;
  p.out = out.data<float>();
  launch(q, cached_attention_cpu, nullptr, p);
  return {out};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_cached_attention)
    .Inputs({"Q", "K", "V", "Keys", "Values", paddle::Optional("FirstKeys"),
             paddle::Optional("AlibiSlopes")})
    .Outputs({"Out"})
    .Attrs({"position: int64_t", "window: int64_t", "scale: float", "softcap: float"})
    .SetKernelFn(PD_KERNEL(pypkg::attention));
