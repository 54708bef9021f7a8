#include <algorithm>

#include "matmul/few_rows.h"
#include "products/blas.h"
#include "products/onednn.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

// A tensor [rows, columns], or its transpose, as an operand.
MatmulOperand matrix(const char* name, const Tensor& tensor, bool transpose) {
  check_rank(name, tensor, 2);
  check_dtype(name, tensor, paddle::DataType::FLOAT32);
  if (!tensor.is_cpu()) reject(name, " must be on the CPU, got ", tensor.place());
  const int64_t rows = tensor.shape()[0], columns = tensor.shape()[1];
  if (transpose) return {tensor.data<float>(), columns, rows, 1, columns};
  return {tensor.data<float>(), rows, columns, columns, 1};
}

struct Product {
  MatmulOperand a;
  MatmulOperand b;
  float* c;
};

void multiply_bfloat16(const Product& product) {
  onednn_matmul_bfloat16(product.a, product.b, product.c);
}

Tensor multiply(const MatmulOperand& a, const MatmulOperand& b, const Tensor& like) {
  if (a.columns != b.rows) {
    reject("matmul_bfloat16: x has ", a.columns, " columns, but y has ", b.rows, " rows");
  }
  Tensor out = empty({a.rows, b.columns}, paddle::DataType::FLOAT32, like);
  if (out.numel() == 0) return out;
  if (a.columns == 0) return paddle::experimental::zeros(out.shape(), paddle::DataType::FLOAT32);
  launch(like, multiply_bfloat16, nullptr, Product{a, b, out.data<float>()});
  return out;
}

std::vector<Tensor> forward(const Tensor& x, const Tensor& y, bool transpose_x, bool transpose_y) {
  return {multiply(matrix("matmul_bfloat16: x", x, transpose_x),
                   matrix("matmul_bfloat16: y", y, transpose_y), x)};
}

void add_float32(const Product& product) { blas_add_matmul(product.a, product.b, product.c); }

// sum + x y, in the memory of sum.
std::vector<Tensor> add(const Tensor& x, const Tensor& y, const Tensor& sum, bool transpose_x,
                        bool transpose_y) {
  const MatmulOperand a = matrix("add_matmul: x", x, transpose_x);
  const MatmulOperand b = matrix("add_matmul: y", y, transpose_y);
  if (a.columns != b.rows) {
    reject("add_matmul: x has ", a.columns, " columns, but y has ", b.rows, " rows");
  }
  check_shape("add_matmul: sum", sum, {a.rows, b.columns});
  check_dtype("add_matmul: sum", sum, paddle::DataType::FLOAT32);
  check_place("add_matmul: sum", sum, x);
  if (sum.numel() != 0 && a.columns != 0) {
    launch(sum, add_float32, nullptr, Product{a, b, const_cast<float*>(sum.data<float>())});
  }
  return {sum};
}

Shape out_shape(const Shape& x, const Shape& y, bool transpose_x, bool transpose_y) {
  return {x[transpose_x ? 1 : 0], y[transpose_y ? 0 : 1]};
}

// With C = X Y: dX = dC Y^T and dY = X^T dC, each transposed where its operand was.
std::vector<Tensor> backward(const Tensor& x, const Tensor& y, const OptionalTensor& dout_or_none,
                             bool transpose_x, bool transpose_y) {
  const Tensor dout =
      gradient_or_zeros(dout_or_none, out_shape(x.shape(), y.shape(), transpose_x, transpose_y), x);
  const char* name = "matmul_bfloat16: gradient";
  const MatmulOperand dc = matrix(name, dout, false), dc_transposed = matrix(name, dout, true);
  const MatmulOperand y_straight = matrix(name, y, transpose_y);
  const MatmulOperand y_transposed = matrix(name, y, !transpose_y);
  const MatmulOperand x_straight = matrix(name, x, transpose_x);
  const MatmulOperand x_transposed = matrix(name, x, !transpose_x);
  return {transpose_x ? multiply(y_straight, dc_transposed, x) : multiply(dc, y_transposed, x),
          transpose_y ? multiply(dc_transposed, x_straight, x) : multiply(x_transposed, dc, x)};
}

std::vector<Shape> shapes(const Shape& x, const Shape& y, bool transpose_x, bool transpose_y) {
  return {out_shape(x, y, transpose_x, transpose_y)};
}
std::vector<paddle::DataType> dtypes(paddle::DataType x, paddle::DataType) { return {x}; }
std::vector<Shape> grad_shapes(const Shape& x, const Shape& y, const OptionalShape&) {
  return {x, y};
}

// x [..., k] times y [k, n], or x [..., m, k] times y of the same leading dimensions.
std::vector<Tensor> few_rows(const Tensor& x, const Tensor& y, bool transpose_y) {
  const Shape of_y = y.shape();
  const size_t rank = of_y.size();
  Shape shape = x.shape();
  const auto is_unfit = [&] {
    if (rank < 2 || shape.empty() || x.numel() == 0 || y.numel() == 0) return true;
    if (shape.back() != of_y[transpose_y ? rank - 1 : rank - 2]) return true;
    return rank > 2 &&
           (shape.size() != rank || !std::equal(shape.begin(), shape.end() - 2, of_y.begin()));
  };
  if (is_unfit()) {
    reject("matmul_few_rows: x of shape ", to_string(shape), " cannot be multiplied by y of shape ",
           to_string(of_y), transpose_y ? ", transposed" : "");
  }
  for (const Tensor* each : {&x, &y}) {
    check_dtype("matmul_few_rows: x and y", *each, paddle::DataType::FLOAT32);
    check_place("matmul_few_rows: x and y", *each, x);
  }
  MatmulFewRows params;
  params.k = shape.back();
  params.n = of_y[transpose_y ? rank - 2 : rank - 1];
  params.batch = num_elements(Shape(of_y.begin(), of_y.end() - 2));
  shape.back() = params.n;
  params.m = num_elements(Shape(shape.begin(), shape.end() - 1)) / params.batch;
  Tensor out = empty(shape, paddle::DataType::FLOAT32, x);
  params.a = x.data<float>();
  params.b = y.data<float>();
  params.c = out.data<float>();
  params.transpose_b = transpose_y;
  launch(x, matmul_few_rows_cpu, nullptr, params);
  return {out};
}

}  // namespace
}  // namespace pypkg

// Without a gradient: who needs one has more rows.
PD_BUILD_OP(pypkg_matmul_few_rows)
    .Inputs({"X", "Y"})
    .Outputs({"Out"})
    .Attrs({"transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::few_rows));

// Without a gradient, for dynamic graphs: nothing here tells a static one what is written.
PD_BUILD_OP(pypkg_add_matmul)
    .Inputs({"X", "Y", "Sum"})
    .Outputs({"Out"})
    .Attrs({"transpose_x: bool", "transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::add));

PD_BUILD_OP(pypkg_matmul_bfloat16)
    .Inputs({"X", "Y"})
    .Outputs({paddle::Optional("Out")})
    .Attrs({"transpose_x: bool", "transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::dtypes));

PD_BUILD_GRAD_OP(pypkg_matmul_bfloat16)
    .Inputs({"X", "Y", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("Y")})
    .Attrs({"transpose_x: bool", "transpose_y: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::grad_shapes));
