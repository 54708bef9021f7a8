#include "rms_norm_op.h"

#include "rms_norm/rms_norm.h"

namespace pypkg {
namespace {

using paddle::Tensor;

struct Sizes {
  int64_t rows;
  int64_t cols;
};

Sizes check_input(const Tensor& x, const Tensor& weight) {
  if (x.shape().empty()) {
    reject("rms_norm: x must have at least one dimension");
  }
  const int64_t cols = x.shape().back();
  check_shape("rms_norm: weight", weight, {cols});
  check_place("rms_norm: weight", weight, x);
  if (weight.dtype() != paddle::DataType::FLOAT32) {
    check_dtype("rms_norm: weight", weight, x.dtype());
  }
  return {cols == 0 ? 0 : x.numel() / cols, cols};
}

std::vector<Tensor> forward(const Tensor& x, const Tensor* residual, const Tensor& weight,
                            float epsilon) {
  const Sizes sizes = check_input(x, weight);
  Tensor y = empty(x.shape(), x.dtype(), x);
  Tensor rstd = empty({sizes.rows}, paddle::DataType::FLOAT32, x);
  Tensor h;

  RmsNormForward params;
  params.dtype = kernel_dtype("rms_norm: x", x);
  params.weight_dtype = kernel_dtype("rms_norm: weight", weight);
  params.x = raw(x);
  if (residual) {
    check_shape("rms_norm: residual", *residual, x.shape());
    check_dtype("rms_norm: residual", *residual, x.dtype());
    check_place("rms_norm: residual", *residual, x);
    h = empty(x.shape(), x.dtype(), x);
    params.residual = raw(*residual);
    params.residual_out = raw(&h);
  }
  params.weight = raw(weight);
  params.y = raw(&y);
  params.rstd = rstd.data<float>();
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  params.epsilon = epsilon;
  launch(x, PYPKG_FORMS(rms_norm_forward), params);
  if (residual) return {y, h, rstd};
  return {y, rstd};
}

// Gradients of h and of the weight; between them, where there was a residual, the gradient of h
// once more. x and residual have one gradient, but each needs it in memory of its own: Paddle adds
// what else arrives at a tensor to its gradient in place.
std::vector<Tensor> backward(const Tensor& h, const Tensor& weight, const Tensor& rstd,
                             const OptionalTensor& dy_or_none, const Tensor* dh, bool has_residual,
                             bool writes_y_over_dy = false) {
  const Sizes sizes = check_input(h, weight);
  const Tensor dy = gradient_or_zeros(dy_or_none, h.shape(), h);
  check_shape("rms_norm: gradient of y", dy, h.shape());
  check_dtype("rms_norm: gradient of y", dy, h.dtype());
  check_shape("rms_norm: rstd", rstd, {sizes.rows});
  Tensor dx = empty(h.shape(), h.dtype(), h);
  Tensor dresidual;
  if (has_residual) dresidual = empty(h.shape(), h.dtype(), h);
  Tensor dweight = empty(weight.shape(), weight.dtype(), h);
  Tensor scratch = workspace(h, PYPKG_FORMS(rms_norm_backward_workspace), sizes.rows, sizes.cols);

  RmsNormBackward params;
  params.dtype = kernel_dtype("rms_norm: x", h);
  params.weight_dtype = kernel_dtype("rms_norm: weight", weight);
  params.dy = raw(dy);
  if (dh) {
    check_shape("rms_norm: gradient of the residual", *dh, h.shape());
    check_dtype("rms_norm: gradient of the residual", *dh, h.dtype());
    params.dh = raw(*dh);
  }
  params.h = raw(h);
  params.weight = raw(weight);
  params.rstd = rstd.data<float>();
  params.dx = raw(&dx);
  if (has_residual) params.dresidual = raw(&dresidual);
  if (writes_y_over_dy) params.y = const_cast<void*>(raw(dy));
  params.dweight = raw(&dweight);
  params.workspace = scratch.data<float>();
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  launch(h, PYPKG_FORMS(rms_norm_backward), params);
  if (has_residual) return {dx, dresidual, dweight};
  return {dx, dweight};
}

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, float epsilon) {
  return forward(x, nullptr, weight, epsilon);
}

std::vector<Tensor> rms_norm_grad(const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                  const OptionalTensor& dy) {
  return backward(x, weight, rstd, dy, nullptr, /*has_residual=*/false);
}

}  // namespace

std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                 float epsilon) {
  return forward(x, &residual, weight, epsilon);
}

std::vector<Tensor> add_rms_norm_grad_and_y(const OptionalTensor& h, const Tensor& weight,
                                            const Tensor& rstd, const Tensor& dy,
                                            const OptionalTensor& dh) {
  return backward(*h, weight, rstd, dy, dh.get_ptr(), /*has_residual=*/true,
                  /*writes_y_over_dy=*/true);
}

namespace {

std::vector<Tensor> add_rms_norm_grad(const OptionalTensor& h, const Tensor& weight,
                                      const Tensor& rstd, const OptionalTensor& dy,
                                      const OptionalTensor& dh) {
  return backward(*h, weight, rstd, dy, dh.get_ptr(), /*has_residual=*/true);
}

Shape row_shape(const Shape& x) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); ++i) rows *= x[i];
  return {rows};
}

std::vector<Shape> rms_norm_shapes(const Shape& x, const Shape&) { return {x, row_shape(x)}; }

std::vector<paddle::DataType> rms_norm_dtypes(paddle::DataType x, paddle::DataType) {
  return {x, paddle::DataType::FLOAT32};
}

std::vector<Shape> rms_norm_grad_shapes(const Shape& x, const Shape& weight, const Shape&,
                                        const OptionalShape&) {
  return {x, weight};
}

std::vector<Shape> add_rms_norm_shapes(const Shape& x, const Shape&, const Shape&) {
  return {x, x, row_shape(x)};
}

std::vector<Shape> add_rms_norm_grad_shapes(const OptionalShape& h, const Shape& weight,
                                            const Shape&, const OptionalShape&,
                                            const OptionalShape&) {
  return {*h, *h, weight};
}

std::vector<paddle::DataType> add_rms_norm_dtypes(paddle::DataType x, paddle::DataType,
                                                  paddle::DataType) {
  return {x, x, paddle::DataType::FLOAT32};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({paddle::Optional("Y"), "Rstd"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::rms_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::rms_norm_dtypes));

PD_BUILD_GRAD_OP(pypkg_rms_norm)
    .Inputs({"X", "Weight", "Rstd", paddle::Grad(paddle::Optional("Y"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .SetKernelFn(PD_KERNEL(pypkg::rms_norm_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::rms_norm_grad_shapes));

PD_BUILD_OP(pypkg_add_rms_norm)
    .Inputs({"X", "Residual", "Weight"})
    .Outputs({paddle::Optional("Y"), paddle::Optional("ResidualOut"), "Rstd"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::add_rms_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::add_rms_norm_dtypes));

PD_BUILD_GRAD_OP(pypkg_add_rms_norm)
    .Inputs({paddle::Optional("ResidualOut"), "Weight", "Rstd", paddle::Grad(paddle::Optional("Y")),
             paddle::Grad(paddle::Optional("ResidualOut"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("Weight")})
    .SetKernelFn(PD_KERNEL(pypkg::add_rms_norm_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::add_rms_norm_grad_shapes));
