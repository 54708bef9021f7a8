// Rotary embedding and attention on the packed output of the query, key and value projections.
//
// A row of qkv holds the heads of one token, query | key | value. Queries and keys are rotated in
// place, attention reads all three with the stride of a row, and its backward pass writes one
// packed gradient, so that nothing is split, concatenated or copied.
#include "attention_arguments.h"
#include "flash_attention.h"
#include "rotary_embedding.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

struct Heads {
  int64_t batch;
  int64_t q;
  int64_t k;
};

// What rotates queries and keys; no tables: nothing.
struct Rotation {
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  const OptionalTensor& position_ids;
  bool interleaved;
};

FlashAttentionShape attention_shape(const Tensor& qkv, const Heads& heads, float scale,
                                    float softcap) {
  const Shape shape = qkv.shape();
  if (shape.empty() || heads.batch < 1 || heads.q < 1 || heads.k < 1) {
    reject("packed_attention: qkv of shape ", to_string(shape), ", ", heads.batch, " rows, ",
           heads.q, " query heads and ", heads.k, " key heads do not describe attention");
  }
  const int64_t width = shape.back(), all_heads = heads.q + 2 * heads.k;
  const int64_t tokens = num_elements(shape) / width;
  if (width % all_heads != 0 || tokens % heads.batch != 0) {
    reject("packed_attention: qkv must be ", heads.batch, " rows of tokens with ", all_heads,
           " heads each, got shape ", to_string(shape));
  }
  FlashAttentionShape s;
  s.batch = heads.batch;
  s.seq_q = s.seq_k = tokens / heads.batch;
  s.heads_q = heads.q;
  s.heads_k = heads.k;
  s.head_dim = width / all_heads;
  s.token_stride = width;
  s.scale = scale;
  s.softcap = softcap;
  s.dtype = kernel_dtype("packed_attention: qkv", qkv);
  check_attention("packed_attention", s);
  return s;
}

// Rotates the queries and keys of a packed matrix in place.
void rotate(void* packed, const Tensor& like, const FlashAttentionShape& s,
            const Rotation& rotation, bool inverse) {
  if (!rotation.cos) return;
  if (!rotation.sin) reject("packed_attention: cos is given without sin");
  const Tensor &cos = *rotation.cos, &sin = *rotation.sin;
  check_rank("packed_attention: cos", cos, 2);
  check_shape("packed_attention: sin", sin, cos.shape());
  for (const Tensor* table : {&cos, &sin}) {
    check_dtype("packed_attention: cos and sin", *table, paddle::DataType::FLOAT32);
    check_place("packed_attention: cos and sin", *table, like);
  }
  RotaryEmbedding params;
  params.dtype = s.dtype;
  params.q = params.q_out = packed;
  params.batch = s.batch;
  params.sequence = s.seq_q;
  params.q_heads = s.heads_q + s.heads_k;  // the keys follow the queries
  params.head_dim = s.head_dim;
  params.q_stride = s.token_stride;
  params.cos = cos.data<float>();
  params.sin = sin.data<float>();
  params.num_positions = cos.shape()[0];
  params.rotary_dim = 2 * cos.shape()[1];
  params.interleaved = rotation.interleaved;
  params.inverse = inverse;
  if (params.rotary_dim > s.head_dim) {
    reject("packed_attention: ", params.rotary_dim,
           " dimensions are to be rotated, but head_dim is ", s.head_dim);
  }
  if (rotation.position_ids) {
    const Tensor& ids = *rotation.position_ids;
    check_shape("packed_attention: position_ids", ids, {s.batch, s.seq_q});
    check_dtype("packed_attention: position_ids", ids, paddle::DataType::INT64);
    check_place("packed_attention: position_ids", ids, like);
    params.position_ids = ids.data<int64_t>();
  } else if (s.seq_q > params.num_positions) {
    reject("packed_attention: the sequence has ", s.seq_q, " tokens, but cos and sin hold only ",
           params.num_positions, " positions");
  }
  launch(like, PYPKG_FORMS(rotary_embedding), params);
}

// The columns of queries, keys and values in a packed matrix.
struct Columns {
  char* q;
  char* k;
  char* v;

  Columns(void* packed, const FlashAttentionShape& s)
      : q(static_cast<char*>(packed)),
        k(q + dtype_size(s.dtype) * s.head_dim * s.heads_q),
        v(k + dtype_size(s.dtype) * s.head_dim * s.heads_k) {}
};

Shape out_shape(const Shape& qkv, int64_t heads_q, int64_t heads_k) {
  Shape shape = qkv;
  if (!shape.empty()) shape.back() = shape.back() / (heads_q + 2 * heads_k) * heads_q;
  return shape;
}

std::vector<Tensor> forward(const Tensor& qkv, const OptionalTensor& cos, const OptionalTensor& sin,
                            const OptionalTensor& position_ids,
                            const OptionalTensor& prefix_lengths,
                            const OptionalTensor& document_starts,
                            const OptionalTensor& alibi_slopes, int64_t batch, int64_t heads_q,
                            int64_t heads_k, bool interleaved, float scale, float softcap,
                            bool causal, int64_t window, bool overwrite) {
  FlashAttentionForward params;
  FlashAttentionShape& s = params.shape;
  s = attention_shape(qkv, {batch, heads_q, heads_k}, scale, softcap);
  s.mask = check_mask("packed_attention", qkv, s, prefix_lengths, document_starts, alibi_slopes,
                      causal, window);
  // Without a rotation nothing is written to it.
  Tensor rotated = overwrite || !cos ? qkv : paddle::experimental::assign(qkv);
  rotate(raw(&rotated), qkv, s, {cos, sin, position_ids, interleaved},
         /*inverse=*/false);
  Tensor out = empty(out_shape(qkv.shape(), heads_q, heads_k), qkv.dtype(), qkv);
  Tensor softmax_lse = empty({batch, heads_q, s.seq_q}, paddle::DataType::FLOAT32, qkv);
  const Columns columns(raw(&rotated), s);
  params.q = columns.q;
  params.k = columns.k;
  params.v = columns.v;
  params.out = raw(&out);
  params.softmax_lse = softmax_lse.data<float>();
  launch(qkv, PYPKG_FORMS(flash_attention_forward), params);
  return {out, rotated, softmax_lse};
}

std::vector<Tensor> backward(const OptionalTensor& cos, const OptionalTensor& sin,
                             const OptionalTensor& position_ids,
                             const OptionalTensor& prefix_lengths,
                             const OptionalTensor& document_starts,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& out,
                             const Tensor& rotated, const Tensor& softmax_lse,
                             const OptionalTensor& dout_or_none, int64_t batch, int64_t heads_q,
                             int64_t heads_k, bool interleaved, float scale, float softcap,
                             bool causal, int64_t window, bool) {
  FlashAttentionBackward params;
  FlashAttentionShape& s = params.shape;
  s = attention_shape(rotated, {batch, heads_q, heads_k}, scale, softcap);
  s.mask = check_mask("packed_attention", rotated, s, prefix_lengths, document_starts, alibi_slopes,
                      causal, window);
  const Tensor dout = gradient_or_zeros(dout_or_none, out->shape(), rotated);
  check_shape("packed_attention: gradient of out", dout, out->shape());
  check_dtype("packed_attention: gradient of out", dout, rotated.dtype());
  Tensor dqkv = empty(rotated.shape(), rotated.dtype(), rotated);
  Tensor scratch = workspace(rotated, PYPKG_FORMS(flash_attention_backward_workspace), s);
  const Columns columns(const_cast<void*>(raw(rotated)), s), gradients(raw(&dqkv), s);
  params.dout = raw(dout);
  params.q = columns.q;
  params.k = columns.k;
  params.v = columns.v;
  params.out = raw(*out);
  params.softmax_lse = softmax_lse.data<float>();
  params.dq = gradients.q;
  params.dk = gradients.k;
  params.dv = gradients.v;
  params.workspace = scratch.data<float>();
  launch(rotated, PYPKG_FORMS(flash_attention_backward), params);
  rotate(raw(&dqkv), rotated, s, {cos, sin, position_ids, interleaved},
         /*inverse=*/true);
  return {dqkv};
}

}  // namespace
}  // namespace pypkg

// Rotated is qkv itself where that is overwritten. It is an output because the backward pass needs
// it; its gradient has no use. For dynamic graphs: nothing here tells a static one what is written.
PD_BUILD_OP(pypkg_packed_attention)
    .Inputs({"Qkv", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes")})
    .Outputs({paddle::Optional("Out"), "Rotated", "SoftmaxLse"})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t", "overwrite: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::forward));

PD_BUILD_GRAD_OP(pypkg_packed_attention)
    .Inputs({paddle::Optional("Cos"), paddle::Optional("Sin"), paddle::Optional("PositionIds"),
             paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes"), paddle::Optional("Out"), "Rotated", "SoftmaxLse",
             paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("Qkv")})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t", "overwrite: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::backward));
