#include "rotary_embedding/rotary_embedding.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

void check(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
           const OptionalTensor& position_ids, int64_t rotary_offset) {
  check_rank("rotary_embedding: q", q, 4);
  check_rank("rotary_embedding: k", k, 4);
  check_rank("rotary_embedding: cos", cos, 2);
  const Shape shape = q.shape();
  check_shape("rotary_embedding: k", k, {shape[0], shape[1], k.shape()[2], shape[3]});
  check_dtype("rotary_embedding: k", k, q.dtype());
  check_dtype("rotary_embedding: cos", cos, paddle::DataType::FLOAT32);
  check_dtype("rotary_embedding: sin", sin, paddle::DataType::FLOAT32);
  check_shape("rotary_embedding: sin", sin, cos.shape());
  for (const Tensor* tensor : {&k, &cos, &sin}) check_place("rotary_embedding", *tensor, q);
  const int64_t rotary_dim = 2 * cos.shape()[1];
  if (rotary_offset < 0 || rotary_offset + rotary_dim > shape[3]) {
    reject("rotary_embedding: cos, sin and rotary_offset select the dimensions [", rotary_offset,
           ", ", rotary_offset + rotary_dim, "), but head_dim is ", shape[3]);
  }
  if (position_ids) {
    check_shape("rotary_embedding: position_ids", *position_ids, {shape[0], shape[1]});
    check_dtype("rotary_embedding: position_ids", *position_ids, paddle::DataType::INT64);
    check_place("rotary_embedding: position_ids", *position_ids, q);
  } else if (shape[1] > cos.shape()[0]) {
    reject("rotary_embedding: the sequence has ", shape[1], " tokens, but cos and sin hold only ",
           cos.shape()[0], " positions");
  }
}

std::vector<Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                           const OptionalTensor& position_ids, bool interleaved,
                           int64_t rotary_offset, bool inverse) {
  check(q, k, cos, sin, position_ids, rotary_offset);
  Tensor q_out = empty(q.shape(), q.dtype(), q);
  Tensor k_out = empty(k.shape(), k.dtype(), k);

  RotaryEmbedding params;
  params.dtype = kernel_dtype("rotary_embedding: q", q);
  params.q = raw(q);
  params.q_out = raw(&q_out);
  params.batch = q.shape()[0];
  params.sequence = q.shape()[1];
  params.q_heads = q.shape()[2];
  params.k_heads = k.shape()[2];
  params.head_dim = q.shape()[3];
  if (params.k_heads > 0) {
    params.k = raw(k);
    params.k_out = raw(&k_out);
  }
  params.cos = cos.data<float>();
  params.sin = sin.data<float>();
  params.position_ids = data_or_null<int64_t>(position_ids);
  params.num_positions = cos.shape()[0];
  params.rotary_dim = 2 * cos.shape()[1];
  params.rotary_offset = rotary_offset;
  params.interleaved = interleaved;
  params.inverse = inverse;
  launch(q, PYPKG_FORMS(rotary_embedding), params);
  return {q_out, k_out};
}

// A tensor of no heads beside `like`, in place of q or k that is not there.
Tensor no_heads(const Tensor& like) {
  Shape shape = like.shape();
  if (shape.size() == 4) shape[2] = 0;
  return empty(shape, like.dtype(), like);
}

std::vector<Tensor> forward(const OptionalTensor& q, const OptionalTensor& k, const Tensor& cos,
                            const Tensor& sin, const OptionalTensor& position_ids, bool interleaved,
                            int64_t rotary_offset) {
  if (!q) reject("rotary_embedding: q is missing");
  return rotate(*q, k ? *k : no_heads(*q), cos, sin, position_ids, interleaved, rotary_offset,
                /*inverse=*/false);
}

// The inverse rotation of the gradients that arrive. An output that had no use gives none back,
// which only an optional input allows: that is why q is one.
std::vector<Tensor> backward(const Tensor& cos, const Tensor& sin,
                             const OptionalTensor& position_ids, const OptionalTensor& dq,
                             const OptionalTensor& dk, bool interleaved, int64_t rotary_offset) {
  if (!dq && !dk) return {Tensor(), Tensor()};
  const Tensor& first = dq ? *dq : *dk;
  const Tensor second = dq && dk ? *dk : no_heads(first);
  std::vector<Tensor> rotated =
      rotate(first, second, cos, sin, position_ids, interleaved, rotary_offset, /*inverse=*/true);
  if (!dq) return {Tensor(), rotated[0]};
  if (!dk) return {rotated[0], Tensor()};
  return rotated;
}

std::vector<Shape> infer_shapes(const OptionalShape& q, const OptionalShape& k, const Shape&,
                                const Shape&, const OptionalShape&) {
  if (!q) reject("rotary_embedding: q is missing");
  return {*q, k ? *k : Shape{q->at(0), q->at(1), 0, q->at(3)}};
}

std::vector<Shape> infer_grad_shapes(const Shape&, const Shape&, const OptionalShape&,
                                     const OptionalShape& dq, const OptionalShape& dk) {
  return {dq ? *dq : Shape{0}, dk ? *dk : Shape{0}};
}

std::vector<paddle::DataType> infer_dtypes(const OptionalDataType& q, const OptionalDataType&,
                                           paddle::DataType, paddle::DataType,
                                           const OptionalDataType&) {
  if (!q) reject("rotary_embedding: q is missing");
  return {*q, *q};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_rotary_embedding)
    .Inputs({paddle::Optional("Q"), paddle::Optional("K"), "Cos", "Sin",
             paddle::Optional("PositionIds")})
    .Outputs({paddle::Optional("QOut"), paddle::Optional("KOut")})
    .Attrs({"interleaved: bool", "rotary_offset: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::infer_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::infer_dtypes));

PD_BUILD_GRAD_OP(pypkg_rotary_embedding)
    .Inputs({"Cos", "Sin", paddle::Optional("PositionIds"), paddle::Grad(paddle::Optional("QOut")),
             paddle::Grad(paddle::Optional("KOut"))})
    .Outputs({paddle::Grad(paddle::Optional("Q")), paddle::Grad(paddle::Optional("K"))})
    .Attrs({"interleaved: bool", "rotary_offset: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::infer_grad_shapes));
