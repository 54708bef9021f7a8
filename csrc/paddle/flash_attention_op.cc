#include "attention/flash_attention.h"
#include "attention_arguments.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

FlashAttentionShape check(const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptionalTensor& prefix_lengths,
                          const OptionalTensor& document_starts, const OptionalTensor& alibi_slopes,
                          float scale, float softcap, bool causal, int64_t window) {
  check_rank("flash_attention: q", q, 4);
  check_rank("flash_attention: k", k, 4);
  const Shape q_shape = q.shape(), k_shape = k.shape();
  check_shape("flash_attention: k", k, {q_shape[0], k_shape[1], k_shape[2], q_shape[3]});
  check_shape("flash_attention: v", v, k_shape);
  for (const Tensor* tensor : {&k, &v}) {
    check_dtype("flash_attention: k and v", *tensor, q.dtype());
    check_place("flash_attention: k and v", *tensor, q);
  }
  FlashAttentionShape shape;
  shape.batch = q_shape[0];
  shape.seq_q = q_shape[1];
  shape.seq_k = k_shape[1];
  shape.heads_q = q_shape[2];
  shape.heads_k = k_shape[2];
  shape.head_dim = q_shape[3];
  shape.scale = scale;
  shape.softcap = softcap;
  shape.dtype = kernel_dtype("flash_attention: q", q);
  check_attention("flash_attention", shape);
  shape.mask = check_mask("flash_attention", q, shape, prefix_lengths, document_starts,
                          alibi_slopes, causal, window);
  return shape;
}

Shape lse_shape(const Shape& q) { return {q[0], q[2], q[1]}; }

std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                            const OptionalTensor& prefix_lengths,
                            const OptionalTensor& document_starts,
                            const OptionalTensor& alibi_slopes, float scale, float softcap,
                            bool causal, int64_t window) {
  FlashAttentionForward params;
  params.shape =
      check(q, k, v, prefix_lengths, document_starts, alibi_slopes, scale, softcap, causal, window);
  Tensor out = empty(q.shape(), q.dtype(), q);
  Tensor softmax_lse = empty(lse_shape(q.shape()), paddle::DataType::FLOAT32, q);
  params.q = raw(q);
  params.k = raw(k);
  params.v = raw(v);
  params.out = raw(&out);
  params.softmax_lse = softmax_lse.data<float>();
  launch(q, PYPKG_FORMS(flash_attention_forward), params);
  return {out, softmax_lse};
}

std::vector<Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v,
                             const OptionalTensor& prefix_lengths,
                             const OptionalTensor& document_starts,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& out,
                             const Tensor& softmax_lse, const OptionalTensor& dout_or_none,
                             float scale, float softcap, bool causal, int64_t window) {
  FlashAttentionBackward params;
  params.shape =
      check(q, k, v, prefix_lengths, document_starts, alibi_slopes, scale, softcap, causal, window);
  const Tensor dout = gradient_or_zeros(dout_or_none, q.shape(), q);
  for (const Tensor* tensor : {&*out, &dout}) {
    check_shape("flash_attention: out and its gradient", *tensor, q.shape());
    check_dtype("flash_attention: out and its gradient", *tensor, q.dtype());
  }
  check_shape("flash_attention: softmax_lse", softmax_lse, lse_shape(q.shape()));
  Tensor dq = empty(q.shape(), q.dtype(), q);
  Tensor dk = empty(k.shape(), k.dtype(), q);
  Tensor dv = empty(v.shape(), v.dtype(), q);
  Tensor scratch = workspace(q, PYPKG_FORMS(flash_attention_backward_workspace), params.shape);
  params.dout = raw(dout);
  params.q = raw(q);
  params.k = raw(k);
  params.v = raw(v);
  params.out = raw(*out);
  params.softmax_lse = softmax_lse.data<float>();
  params.dq = raw(&dq);
  params.dk = raw(&dk);
  params.dv = raw(&dv);
  params.workspace = scratch.data<float>();
  launch(q, PYPKG_FORMS(flash_attention_backward), params);
  return {dq, dk, dv};
}

std::vector<Shape> infer_shapes(const Shape& q, const Shape&, const Shape&, const OptionalShape&,
                                const OptionalShape&, const OptionalShape&) {
  return {q, lse_shape(q)};
}

std::vector<Shape> infer_grad_shapes(const Shape& q, const Shape& k, const Shape& v,
                                     const OptionalShape&, const OptionalShape&,
                                     const OptionalShape&, const OptionalShape&, const Shape&,
                                     const OptionalShape&) {
  return {q, k, v};
}

std::vector<paddle::DataType> infer_dtypes(paddle::DataType q, paddle::DataType, paddle::DataType,
                                           const OptionalDataType&, const OptionalDataType&,
                                           const OptionalDataType&) {
  return {q, paddle::DataType::FLOAT32};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_flash_attention)
    .Inputs({"Q", "K", "V", paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes")})
    .Outputs({paddle::Optional("Out"), "SoftmaxLse"})
    .Attrs({"scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::infer_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::infer_dtypes));

PD_BUILD_GRAD_OP(pypkg_flash_attention)
    .Inputs({"Q", "K", "V", paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes"), paddle::Optional("Out"), "SoftmaxLse",
             paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("Q"), paddle::Grad("K"), paddle::Grad("V")})
    .Attrs({"scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::infer_grad_shapes));
