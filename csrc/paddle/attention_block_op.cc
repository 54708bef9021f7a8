// The attention block in one operator: projection to qkv, rotation and attention, projection of the
// result. The host dispatches one operator where there are three, forward and backward.
#include "packed_attention.h"
#include "products.h"

namespace pypkg {
namespace {

using paddle::Tensor;

std::vector<Tensor> forward(const Tensor& x, const Tensor& qkv_weight, const Tensor& o_weight,
                            const OptionalTensor& cos, const OptionalTensor& sin,
                            const OptionalTensor& position_ids,
                            const OptionalTensor& prefix_lengths,
                            const OptionalTensor& document_starts,
                            const OptionalTensor& alibi_slopes, int64_t batch, int64_t heads_q,
                            int64_t heads_k, bool interleaved, float scale, float softcap,
                            bool causal, int64_t window) {
  const PackedAttentionResult attention = packed_attention_forward(
      product(x, qkv_weight),
      {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch, heads_q,
       heads_k, interleaved, scale, softcap, causal, window},
      /*overwrite=*/true);
  return {product(attention.out, o_weight), attention.out, attention.rotated,
          attention.softmax_lse};
}

std::vector<Tensor> backward(
    const Tensor& x, const Tensor& qkv_weight, const Tensor& o_weight, const OptionalTensor& cos,
    const OptionalTensor& sin, const OptionalTensor& position_ids,
    const OptionalTensor& prefix_lengths, const OptionalTensor& document_starts,
    const OptionalTensor& alibi_slopes, const Tensor& attended, const Tensor& rotated,
    const Tensor& softmax_lse, const OptionalTensor& dout_or_none, int64_t batch, int64_t heads_q,
    int64_t heads_k, bool interleaved, float scale, float softcap, bool causal, int64_t window) {
  Shape out_shape = x.shape();
  out_shape.back() = o_weight.shape()[1];
  const Tensor dout = gradient_or_zeros(dout_or_none, out_shape, x);
  Tensor dattended = input_gradient(dout, o_weight);
  const Tensor do_weight = weight_gradient(attended, dout);
  const Tensor dqkv = packed_attention_backward(
      attended, rotated, softmax_lse, dattended,
      {cos, sin, position_ids, prefix_lengths, document_starts, alibi_slopes, batch, heads_q,
       heads_k, interleaved, scale, softcap, causal, window});
  dattended.reset();  // before the next tensor of its size is made
  return {input_gradient(dqkv, qkv_weight), weight_gradient(x, dqkv), do_weight};
}

}  // namespace
}  // namespace pypkg

// What follows Out are outputs because the backward pass needs them; their gradients have no use.
// For dynamic graphs, as packed_attention is.
PD_BUILD_OP(pypkg_attention_block)
    .Inputs({"X", "QkvWeight", "OWeight", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes")})
    .Outputs({paddle::Optional("Out"), "Attended", "Rotated", "SoftmaxLse"})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::forward));

PD_BUILD_GRAD_OP(pypkg_attention_block)
    .Inputs({"X", "QkvWeight", "OWeight", paddle::Optional("Cos"), paddle::Optional("Sin"),
             paddle::Optional("PositionIds"), paddle::Optional("PrefixLengths"),
             paddle::Optional("DocumentStarts"), paddle::Optional("AlibiSlopes"), "Attended",
             "Rotated", "SoftmaxLse", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("QkvWeight"), paddle::Grad("OWeight")})
    .Attrs({"batch: int64_t", "heads_q: int64_t", "heads_k: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "causal: bool", "window: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::backward));
