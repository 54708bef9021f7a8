#include <limits>

#include "attention/attention_arguments.h"
#include "attention/flash_attention.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

// Positions of the first query and the first key of blocks of a sequence.
struct Offsets {
  int64_t query;
  int64_t key;
};

// Without offsets, queries are aligned to the last keys.
FlashAttentionShape check(const Tensor& q, const Tensor& k, const Tensor& v,
                          const OptionalTensor& prefix_lengths,
                          const OptionalTensor& document_starts, const OptionalTensor& alibi_slopes,
                          float scale, float softcap, bool causal, int64_t window,
                          const Offsets* offsets) {
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
  shape.query_offset = offsets ? offsets->query : shape.seq_k - shape.seq_q;
  shape.key_offset = offsets ? offsets->key : 0;
  if (offsets && (offsets->query < 0 || offsets->key < 0)) {
    reject("flash_attention: offsets must be 0 or more, got ", offsets->query, " and ",
           offsets->key);
  }
  shape.mask = check_mask("flash_attention", q, shape, prefix_lengths, document_starts,
                          alibi_slopes, causal, window, offsets != nullptr);
  return shape;
}

Shape lse_shape(const Shape& q) { return {q[0], q[2], q[1]}; }

std::vector<Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                           const FlashAttentionShape& shape) {
  FlashAttentionForward params;
  params.shape = shape;
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

std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                            const OptionalTensor& prefix_lengths,
                            const OptionalTensor& document_starts,
                            const OptionalTensor& alibi_slopes, float scale, float softcap,
                            bool causal, int64_t window) {
  return attend(q, k, v,
                check(q, k, v, prefix_lengths, document_starts, alibi_slopes, scale, softcap,
                      causal, window, nullptr));
}

std::vector<Tensor> block_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const OptionalTensor& prefix_lengths,
                                  const OptionalTensor& document_starts,
                                  const OptionalTensor& alibi_slopes, float scale, float softcap,
                                  bool causal, int64_t window, int64_t query_offset,
                                  int64_t key_offset) {
  const Offsets offsets{query_offset, key_offset};
  const FlashAttentionShape shape = check(q, k, v, prefix_lengths, document_starts, alibi_slopes,
                                          scale, softcap, causal, window, &offsets);
  if (shape.is_hidden()) {
    constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
    return {
        paddle::full(q.shape(), 0, q.dtype(), q.place()),
        paddle::full(lse_shape(q.shape()), kMinusInfinity, paddle::DataType::FLOAT32, q.place())};
  }
  return attend(q, k, v, shape);
}

std::vector<Tensor> gradients(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                              const Tensor& softmax_lse, const Tensor& dout,
                              const FlashAttentionShape& shape) {
  FlashAttentionBackward params;
  params.shape = shape;
  for (const Tensor* tensor : {&out, &dout}) {
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
  params.out = raw(out);
  params.softmax_lse = softmax_lse.data<float>();
  params.dq = raw(&dq);
  params.dk = raw(&dk);
  params.dv = raw(&dv);
  params.workspace = scratch.data<float>();
  launch(q, PYPKG_FORMS(flash_attention_backward), params);
  return {dq, dk, dv};
}

std::vector<Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v,
                             const OptionalTensor& prefix_lengths,
                             const OptionalTensor& document_starts,
                             const OptionalTensor& alibi_slopes, const OptionalTensor& out,
                             const Tensor& softmax_lse, const OptionalTensor& dout, float scale,
                             float softcap, bool causal, int64_t window) {
  const FlashAttentionShape shape = check(q, k, v, prefix_lengths, document_starts, alibi_slopes,
                                          scale, softcap, causal, window, nullptr);
  return gradients(q, k, v, *out, softmax_lse, gradient_or_zeros(dout, q.shape(), q), shape);
}

std::vector<Tensor> block_gradients(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const OptionalTensor& prefix_lengths,
                                    const OptionalTensor& document_starts,
                                    const OptionalTensor& alibi_slopes, const Tensor& out,
                                    const Tensor& softmax_lse, const Tensor& dout, float scale,
                                    float softcap, bool causal, int64_t window,
                                    int64_t query_offset, int64_t key_offset) {
  const Offsets offsets{query_offset, key_offset};
  const FlashAttentionShape shape = check(q, k, v, prefix_lengths, document_starts, alibi_slopes,
                                          scale, softcap, causal, window, &offsets);
  if (shape.is_hidden()) {
    const auto zeros = [](const Tensor& like) {
      return paddle::full(like.shape(), 0, like.dtype(), like.place());
    };
    return {zeros(q), zeros(k), zeros(v)};
  }
  return gradients(q, k, v, out, softmax_lse, dout, shape);
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

// Attention of a block of queries to a block of keys, and the gradients of that: two operators of
// their own, since the gradients need the output for all blocks. For dynamic graphs.
PD_BUILD_OP(pypkg_flash_attention_block)
    .Inputs({"Q", "K", "V", paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes")})
    .Outputs({"Out", "SoftmaxLse"})
    .Attrs({"scale: float", "softcap: float", "causal: bool", "window: int64_t",
            "query_offset: int64_t", "key_offset: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_forward));

PD_BUILD_OP(pypkg_flash_attention_block_gradients)
    .Inputs({"Q", "K", "V", paddle::Optional("PrefixLengths"), paddle::Optional("DocumentStarts"),
             paddle::Optional("AlibiSlopes"), "Out", "SoftmaxLse", "Dout"})
    .Outputs({"Dq", "Dk", "Dv"})
    .Attrs({"scale: float", "softcap: float", "causal: bool", "window: int64_t",
            "query_offset: int64_t", "key_offset: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_gradients));
