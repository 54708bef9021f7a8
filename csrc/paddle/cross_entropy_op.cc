#include "cross_entropy/cross_entropy.h"
#include "tensor_memory.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

struct Sizes {
  int64_t rows;
  int64_t cols;
};

Sizes check_input(const Tensor& logits, const Tensor& labels) {
  if (logits.shape().empty()) reject("cross_entropy: logits must have at least one dimension");
  Shape rows = logits.shape();
  const int64_t cols = rows.back();
  rows.pop_back();
  check_shape("cross_entropy: labels", labels, rows);
  check_dtype("cross_entropy: labels", labels, paddle::DataType::INT64);
  check_place("cross_entropy: labels", labels, logits);
  return {num_elements(rows), cols};
}

void check_row_values(const char* name, const Tensor& tensor, const Tensor& labels) {
  check_shape(name, tensor, labels.shape());
  check_dtype(name, tensor, paddle::DataType::FLOAT32);
  check_place(name, tensor, labels);
}

std::vector<Tensor> forward(const Tensor& logits, const Tensor& labels, int64_t vocab_start,
                            int64_t vocab_size, int64_t ignore_index) {
  const Sizes sizes = check_input(logits, labels);
  if (vocab_start < 0 || vocab_start + sizes.cols > vocab_size) {
    reject("cross_entropy: columns [", vocab_start, ", ", vocab_start + sizes.cols,
           ") lie outside a vocabulary of ", vocab_size);
  }
  std::vector<Tensor> outputs;  // loss, lse, row_max, row_sum, target
  for (int i = 0; i < 5; ++i) {
    outputs.push_back(empty(labels.shape(), paddle::DataType::FLOAT32, logits));
  }
  CrossEntropyForward params;
  params.dtype = kernel_dtype("cross_entropy: logits", logits);
  params.logits = raw(logits);
  params.labels = labels.data<int64_t>();
  params.loss = outputs[0].data<float>();
  params.lse = outputs[1].data<float>();
  params.row_max = outputs[2].data<float>();
  params.row_sum = outputs[3].data<float>();
  params.target = outputs[4].data<float>();
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  params.vocab_start = vocab_start;
  params.vocab_size = vocab_size;
  params.ignore_index = ignore_index;
  launch(logits, PYPKG_FORMS(cross_entropy_forward), params);
  return outputs;
}

// The buffer of the gradient: that of the logits if this is allowed and no other tensor shares the
// memory, else a new one.
Tensor gradient_buffer(const Tensor& logits, bool inplace) {
  if (!inplace || !logits.is_dense_tensor() || memory_holders(logits) > 1) {
    return empty(logits.shape(), logits.dtype(), logits);
  }
  Tensor buffer = logits;
  buffer.bump_inplace_version();  // so that operations that saved the logits detect the change
  return buffer;
}

std::vector<Tensor> backward(const Tensor& logits, const Tensor& labels, const Tensor& lse,
                             const Tensor& dloss, int64_t vocab_start, int64_t ignore_index,
                             bool inplace) {
  const Sizes sizes = check_input(logits, labels);
  check_row_values("cross_entropy: lse", lse, labels);
  check_row_values("cross_entropy: gradient of the loss", dloss, labels);
  Tensor dlogits = gradient_buffer(logits, inplace);

  CrossEntropyBackward params;
  params.dtype = kernel_dtype("cross_entropy: logits", logits);
  params.logits = raw(logits);
  params.labels = labels.data<int64_t>();
  params.lse = lse.data<float>();
  params.dloss = dloss.data<float>();
  params.dlogits = raw(&dlogits);
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  params.vocab_start = vocab_start;
  params.ignore_index = ignore_index;
  launch(logits, PYPKG_FORMS(cross_entropy_backward), params);
  return {dlogits};
}

// Returns the loss unchanged and attaches its gradient.
std::vector<Tensor> join(const Tensor& logits, const Tensor& labels, const Tensor& loss,
                         const Tensor& lse, int64_t, int64_t, bool) {
  check_input(logits, labels);
  check_row_values("cross_entropy: loss", loss, labels);
  check_row_values("cross_entropy: lse", lse, labels);
  return {loss};
}

std::vector<Tensor> join_grad(const Tensor& logits, const Tensor& labels, const Tensor& lse,
                              const OptionalTensor& dloss, int64_t vocab_start,
                              int64_t ignore_index, bool inplace) {
  return backward(logits, labels, lse, gradient_or_zeros(dloss, lse.shape(), lse), vocab_start,
                  ignore_index, inplace);
}

std::vector<Shape> forward_shapes(const Shape&, const Shape& labels) {
  return std::vector<Shape>(5, labels);
}

std::vector<paddle::DataType> forward_dtypes(paddle::DataType, paddle::DataType) {
  return std::vector<paddle::DataType>(5, paddle::DataType::FLOAT32);
}

std::vector<Shape> backward_shapes(const Shape& logits, const Shape&, const Shape&, const Shape&) {
  return {logits};
}

std::vector<paddle::DataType> backward_dtypes(paddle::DataType logits, paddle::DataType,
                                              paddle::DataType, paddle::DataType) {
  return {logits};
}

std::vector<Shape> join_shapes(const Shape&, const Shape&, const Shape& loss, const Shape&) {
  return {loss};
}

std::vector<Shape> join_grad_shapes(const Shape& logits, const Shape&, const Shape&,
                                    const OptionalShape&) {
  return {logits};
}

std::vector<paddle::DataType> join_dtypes(paddle::DataType, paddle::DataType, paddle::DataType loss,
                                          paddle::DataType) {
  return {loss};
}

}  // namespace
}  // namespace pypkg

// Under vocabulary parallelism Python merges the partial losses over a process group: forward
// returns the partial results, Python merges them, and join attaches the gradient to the result.
// backward computes the gradient in a separate call, for logits outside the autograd graph.
PD_BUILD_OP(pypkg_cross_entropy_forward)
    .Inputs({"Logits", "Labels"})
    .Outputs({"Loss", "Lse", "RowMax", "RowSum", "Target"})
    .Attrs({"vocab_start: int64_t", "vocab_size: int64_t", "ignore_index: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::forward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::forward_dtypes));

PD_BUILD_OP(pypkg_cross_entropy_backward)
    .Inputs({"Logits", "Labels", "Lse", "Dloss"})
    .Outputs({"Dlogits"})
    .Attrs({"vocab_start: int64_t", "ignore_index: int64_t", "inplace: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::backward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::backward_dtypes));

PD_BUILD_OP(pypkg_cross_entropy)
    .Inputs({"Logits", "Labels", "Loss", "Lse"})
    .Outputs({paddle::Optional("LossOut")})
    .Attrs({"vocab_start: int64_t", "ignore_index: int64_t", "inplace: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::join))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::join_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::join_dtypes));

PD_BUILD_GRAD_OP(pypkg_cross_entropy)
    .Inputs({"Logits", "Labels", "Lse", paddle::Grad(paddle::Optional("LossOut"))})
    .Outputs({paddle::Grad("Logits")})
    .Attrs({"vocab_start: int64_t", "ignore_index: int64_t", "inplace: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::join_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::join_grad_shapes));
