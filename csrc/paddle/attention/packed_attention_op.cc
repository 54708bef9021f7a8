// Rotary embedding and attention on the packed output of the query, key and value projections.
//
// A row of qkv holds the heads of one token, query | key | value. Queries and keys are rotated in
// place, attention reads all three with the stride of a row, and its backward pass writes one
// packed gradient, so that nothing is split, concatenated or copied.
#include "attention/attention_arguments.h"
#include "attention/flash_attention.h"
#include "products/products.h"
#include "rms_norm_op.h"
#include "rotary_embedding/rotary_embedding.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

// The arguments other than qkv; without tables nothing is rotated.
struct PackedAttention {
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  const OptionalTensor& position_ids;
  const OptionalTensor& prefix_lengths;
  const OptionalTensor& document_starts;
  const OptionalTensor& alibi_slopes;
  int64_t batch;
  int64_t heads_q;
  int64_t heads_k;
  bool interleaved;
  float scale;
  float softcap;
  bool causal;
  int64_t window;
};

struct PackedAttentionResult {
  Tensor out;
  Tensor rotated;  // qkv itself where that is overwritten
  Tensor softmax_lse;
};

FlashAttentionShape attention_shape(const Tensor& qkv, const PackedAttention& args) {
  const Shape shape = qkv.shape();
  if (shape.empty() || args.batch < 1 || args.heads_q < 1 || args.heads_k < 1) {
    reject("packed_attention: qkv of shape ", to_string(shape), ", ", args.batch, " rows, ",
           args.heads_q, " query heads and ", args.heads_k, " key heads do not describe attention");
  }
  const int64_t width = shape.back(), all_heads = args.heads_q + 2 * args.heads_k;
  const int64_t tokens = num_elements(shape) / width;
  if (width % all_heads != 0 || tokens % args.batch != 0) {
    reject("packed_attention: qkv must be ", args.batch, " rows of tokens with ", all_heads,
           " heads each, got shape ", to_string(shape));
  }
  FlashAttentionShape s;
  s.batch = args.batch;
  s.seq_q = s.seq_k = tokens / args.batch;
  s.heads_q = args.heads_q;
  s.heads_k = args.heads_k;
  s.head_dim = width / all_heads;
  s.token_stride = width;
  s.scale = args.scale;
  s.softcap = args.softcap;
  s.dtype = kernel_dtype("packed_attention: qkv", qkv);
  check_attention("packed_attention", s);
  s.mask = check_mask("packed_attention", qkv, s, args.prefix_lengths, args.document_starts,
                      args.alibi_slopes, args.causal, args.window);
  return s;
}

// Rotates the queries and keys of a packed matrix in place.
void rotate(void* packed, const Tensor& like, const FlashAttentionShape& s,
            const PackedAttention& rotation, bool inverse) {
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

PackedAttentionResult packed_attention_forward(const Tensor& qkv, const PackedAttention& args,
                                               bool overwrite) {
  FlashAttentionForward params;
  FlashAttentionShape& s = params.shape;
  s = attention_shape(qkv, args);
  // Without a rotation nothing is written to it.
  Tensor rotated = overwrite || !args.cos ? qkv : paddle::experimental::assign(qkv);
  rotate(raw(&rotated), qkv, s, args, /*inverse=*/false);
  Tensor out = empty(out_shape(qkv.shape(), args.heads_q, args.heads_k), qkv.dtype(), qkv);
  Tensor softmax_lse = empty({s.batch, s.heads_q, s.seq_q}, paddle::DataType::FLOAT32, qkv);
  const Columns columns(raw(&rotated), s);
  params.q = columns.q;
  params.k = columns.k;
  params.v = columns.v;
  params.out = raw(&out);
  params.softmax_lse = softmax_lse.data<float>();
  launch(qkv, PYPKG_FORMS(flash_attention_forward), params);
  return {out, rotated, softmax_lse};
}

Tensor packed_attention_backward(const Tensor& out, const Tensor& rotated,
                                 const Tensor& softmax_lse, const Tensor& dout,
                                 const PackedAttention& args) {
  FlashAttentionBackward params;
  FlashAttentionShape& s = params.shape;
  s = attention_shape(rotated, args);
  check_shape("packed_attention: gradient of out", dout, out.shape());
  check_dtype("packed_attention: gradient of out", dout, rotated.dtype());
  Tensor dqkv = empty(rotated.shape(), rotated.dtype(), rotated);
  Tensor scratch = workspace(rotated, PYPKG_FORMS(flash_attention_backward_workspace), s);
  const Columns columns(const_cast<void*>(raw(rotated)), s), gradients(raw(&dqkv), s);
  params.dout = raw(dout);
  params.q = columns.q;
  params.k = columns.k;
  params.v = columns.v;
  params.out = raw(out);
  params.softmax_lse = softmax_lse.data<float>();
  params.dq = gradients.q;
  params.dk = gradients.k;
  params.dv = gradients.v;
  params.workspace = scratch.data<float>();
  launch(rotated, PYPKG_FORMS(flash_attention_backward), params);
  rotate(raw(&dqkv), rotated, s, args, /*inverse=*/true);
  return dqkv;
}

std::vector<Tensor> forward(const Tensor& qkv, const OptionalTensor& cos, const OptionalTensor& sin,
                            const OptionalTensor& position_ids,
                            const OptionalTensor& prefix_lengths,
                            const OptionalTensor& document_starts,
                            const OptionalTensor& alibi_slopes, int64_t batch, int64_t heads_q,
                            int64_t heads_k, bool interleaved, float scale, float softcap,
                            bool causal, int64_t window, bool overwrite) {
  const PackedAttentionResult result = packed_attention_forward(
      qkv,
      {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch, heads_q,
       heads_k, interleaved, scale, softcap, causal, window},
      overwrite);
  return {result.out, result.rotated, result.softmax_lse};
}

std::vector<Tensor> backward(const OptionalTensor& cos, const OptionalTensor& sin,
                             const OptionalTensor& position_ids,
                             const OptionalTensor& prefix_lengths,
                             const OptionalTensor& document_starts,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& out,
                             const Tensor& rotated, const Tensor& softmax_lse,
                             const OptionalTensor& dout, int64_t batch, int64_t heads_q,
                             int64_t heads_k, bool interleaved, float scale, float softcap,
                             bool causal, int64_t window, bool) {
  return {packed_attention_backward(
      *out, rotated, softmax_lse, gradient_or_zeros(dout, out->shape(), rotated),
      {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch, heads_q,
       heads_k, interleaved, scale, softcap, causal, window})};
}

// The block: projection to qkv, attention, projection of the result. The host dispatches one
// operator where there are three, forward and backward.
std::vector<Tensor> block_forward(const Tensor& x, const Tensor& qkv_weight, const Tensor& o_weight,
                                  const OptionalTensor& cos, const OptionalTensor& sin,
                                  const OptionalTensor& position_ids,
                                  const OptionalTensor& prefix_lengths,
                                  const OptionalTensor& document_starts,
                                  const OptionalTensor& alibi_slopes, int64_t batch,
                                  int64_t heads_q, int64_t heads_k, bool interleaved, float scale,
                                  float softcap, bool causal, int64_t window) {
  const PackedAttentionResult attention = packed_attention_forward(
      product(x, qkv_weight),
      {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch, heads_q,
       heads_k, interleaved, scale, softcap, causal, window},
      /*overwrite=*/true);
  return {product(attention.out, o_weight), attention.out, attention.rotated,
          attention.softmax_lse};
}

struct QkvGradients {
  Tensor dqkv;
  Tensor do_weight;
};

// The backward pass of the block down to qkv.
QkvGradients qkv_gradients(const Tensor& o_weight, const Tensor& attended, const Tensor& rotated,
                           const Tensor& softmax_lse, const OptionalTensor& dout_or_none,
                           const PackedAttention& args) {
  Shape out_shape = attended.shape();
  out_shape.back() = o_weight.shape()[1];
  const Tensor dout = gradient_or_zeros(dout_or_none, out_shape, attended);
  const Tensor dattended = input_gradient(dout, o_weight);
  const Tensor do_weight = weight_gradient(attended, dout);
  return {packed_attention_backward(attended, rotated, softmax_lse, dattended, args), do_weight};
}

std::vector<Tensor> block_backward(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& o_weight, const OptionalTensor& cos,
    const OptionalTensor& sin, const OptionalTensor& position_ids,
    const OptionalTensor& prefix_lengths, const OptionalTensor& document_starts,
    const OptionalTensor& alibi_slopes, const Tensor& attended, const Tensor& rotated,
    const Tensor& softmax_lse, const OptionalTensor& dout, int64_t batch, int64_t heads_q,
    int64_t heads_k, bool interleaved, float scale, float softcap, bool causal, int64_t window) {
  const QkvGradients inner =
      qkv_gradients(o_weight, attended, rotated, softmax_lse, dout,
                    {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch,
                     heads_q, heads_k, interleaved, scale, softcap, causal, window});
  return {input_gradient(inner.dqkv, qkv_weight), weight_gradient(x, inner.dqkv), inner.do_weight};
}

// The block of rms_norm(x + residual): one operator for two more.
std::vector<Tensor> normed_block_forward(
    const Tensor& x, const Tensor& residual, const Tensor& norm_weight, const Tensor& qkv_weight,
    const Tensor& o_weight, const OptionalTensor& cos, const OptionalTensor& sin,
    const OptionalTensor& position_ids, const OptionalTensor& prefix_lengths,
    const OptionalTensor& document_starts, const OptionalTensor& alibi_slopes, int64_t batch,
    int64_t heads_q, int64_t heads_k, bool interleaved, float scale, float softcap, bool causal,
    int64_t window, float epsilon) {
  const std::vector<Tensor> norm = add_rms_norm(x, residual, norm_weight, epsilon);
  const std::vector<Tensor> block = block_forward(
      norm[0], qkv_weight, o_weight, cos, sin, position_ids, prefix_lengths, document_starts,
      alibi_slopes, batch, heads_q, heads_k, interleaved, scale, softcap, causal, window);
  return {block[0], norm[1], norm[2], block[1], block[2], block[3]};
}

std::vector<Tensor> normed_block_backward(
    const Tensor& norm_weight, const Tensor& qkv_weight, const Tensor& o_weight,
    const OptionalTensor& cos, const OptionalTensor& sin, const OptionalTensor& position_ids,
    const OptionalTensor& prefix_lengths, const OptionalTensor& document_starts,
    const OptionalTensor& alibi_slopes, const OptionalTensor& stream, const Tensor& rstd,
    const Tensor& attended, const Tensor& rotated, const Tensor& softmax_lse,
    const OptionalTensor& dout, const OptionalTensor& dstream, int64_t batch, int64_t heads_q,
    int64_t heads_k, bool interleaved, float scale, float softcap, bool causal, int64_t window,
    float) {
  const QkvGradients inner =
      qkv_gradients(o_weight, attended, rotated, softmax_lse, dout,
                    {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch,
                     heads_q, heads_k, interleaved, scale, softcap, causal, window});
  const Tensor y = input_gradient(inner.dqkv, qkv_weight);  // at first its gradient
  const std::vector<Tensor> norm = add_rms_norm_grad_and_y(stream, norm_weight, rstd, y, dstream);
  return {norm[0], norm[1], norm[2], weight_gradient(y, inner.dqkv), inner.do_weight};
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

// What follows Out are outputs because the backward pass needs them; their gradients have no use.
// For dynamic graphs, as packed_attention is.
PD_BUILD_OP(pypkg_attention_block)
    .Inputs({"X", "QkvWeight", "OWeight", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes")})
    .Outputs({paddle::Optional("Out"), "Attended", "Rotated", "SoftmaxLse"})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_forward));

PD_BUILD_GRAD_OP(pypkg_attention_block)
    .Inputs({"X", "QkvWeight", "OWeight", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes"), "Attended",
             "Rotated", "SoftmaxLse", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("QkvWeight"), paddle::Grad("OWeight")})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_backward));

PD_BUILD_OP(pypkg_normed_attention_block)
    .Inputs({"X", "Residual", "NormWeight", "QkvWeight", "OWeight", paddle::Optional("Cos"),
             paddle::Optional("Sin"), paddle::Optional("PositionIds"),
             paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes")})
    .Outputs({paddle::Optional("Out"), paddle::Optional("Stream"), "Rstd", "Attended", "Rotated",
              "SoftmaxLse"})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::normed_block_forward));

PD_BUILD_GRAD_OP(pypkg_normed_attention_block)
    .Inputs({"NormWeight", "QkvWeight", "OWeight", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes"),
             paddle::Optional("Stream"), "Rstd", "Attended", "Rotated", "SoftmaxLse",
             paddle::Grad(paddle::Optional("Out")), paddle::Grad(paddle::Optional("Stream"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("NormWeight"),
              paddle::Grad("QkvWeight"), paddle::Grad("OWeight")})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::normed_block_backward));
