// Matrix products inside an operator, by Paddle's kernels: the same that its own operators run, so
// that a block has the bits of its parts.
#pragma once

#include "tensors.h"

namespace pypkg {

// x [..., k] times weight [k, n]: [..., n].
inline paddle::Tensor product(const paddle::Tensor& x, const paddle::Tensor& weight) {
  return paddle::experimental::matmul(x, weight, false, false);
}

// The gradient of x in product(x, weight).
inline paddle::Tensor input_gradient(const paddle::Tensor& dout, const paddle::Tensor& weight) {
  return paddle::experimental::matmul(dout, weight, false, true);
}

// A tensor [..., n] as a matrix [rows, n] in the same memory, which has to outlive it.
inline paddle::Tensor as_matrix(const paddle::Tensor& tensor) {
  const Shape shape = tensor.shape();
  if (shape.size() == 2) return tensor;
  return paddle::from_blob(const_cast<void*>(tensor.data()),
                           Shape{tensor.numel() / shape.back(), shape.back()}, tensor.dtype(),
                           phi::DataLayout::NCHW, tensor.place());
}

// The gradient of weight in product(x, weight), in the dtype of the weight.
inline paddle::Tensor weight_gradient(const paddle::Tensor& x, const paddle::Tensor& dout) {
  return paddle::experimental::matmul(as_matrix(x), as_matrix(dout), true, false);
}

}  // namespace pypkg
