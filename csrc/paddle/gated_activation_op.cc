#include "gated_activation/gated_activation.h"
#include "products/products.h"
#include "rms_norm_op.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;

// gate and up as two tensors [..., cols], or packed in one [..., 2 * cols].
struct Layout {
  int64_t rows;
  int64_t cols;
  int64_t stride;
  int64_t gate_offset;  // in elements, into the packed tensor
  int64_t up_offset;
};

// up is null when gate holds both.
Layout check(const Tensor& gate, const Tensor* up, bool gate_first, int64_t activation) {
  if (activation < 0 || activation > 2) {
    reject("gated_activation: activation must be from 0 to 2, got ", activation);
  }
  if (gate.shape().empty()) {
    reject("gated_activation: gate must have at least one dimension");
  }
  const int64_t last = gate.shape().back();
  const int64_t rows = last == 0 ? 0 : gate.numel() / last;
  if (up) {
    check_shape("gated_activation: up", *up, gate.shape());
    check_dtype("gated_activation: up", *up, gate.dtype());
    check_place("gated_activation: up", *up, gate);
    return {rows, last, last, 0, 0};
  }
  if (last % 2 != 0) {
    reject("gated_activation: a packed last dimension must be even, got ", last);
  }
  const int64_t cols = last / 2;
  return {rows, cols, last, gate_first ? 0 : cols, gate_first ? cols : 0};
}

Shape out_shape(Shape gate, bool packed) {
  if (packed && gate.back() > 0) gate.back() /= 2;
  return gate;
}

const void* shifted(const Tensor& tensor, int64_t elements) {
  const int64_t bytes = elements * dtype_size(kernel_dtype("gated_activation: gate", tensor));
  return static_cast<const char*>(raw(tensor)) + bytes;
}

void* shifted(Tensor* tensor, int64_t elements) {
  return const_cast<void*>(shifted(*tensor, elements));
}

// What both passes read: gate, up and how they lie.
template <typename Params>
Params inputs(const Tensor& gate, const Tensor* up, const Layout& layout, int64_t activation) {
  Params params;
  params.dtype = kernel_dtype("gated_activation: gate", gate);
  params.gate = shifted(gate, layout.gate_offset);
  params.up = shifted(up ? *up : gate, layout.up_offset);
  params.rows = layout.rows;
  params.cols = layout.cols;
  params.gate_stride = layout.stride;
  params.up_stride = layout.stride;
  params.activation = static_cast<Activation>(activation);
  return params;
}

std::vector<Tensor> forward(const Tensor& gate, const Tensor* up, int64_t activation,
                            bool gate_first) {
  const Layout layout = check(gate, up, gate_first, activation);
  Tensor out = empty(out_shape(gate.shape(), !up), gate.dtype(), gate);

  auto params = inputs<GatedActivationForward>(gate, up, layout, activation);
  params.out = raw(&out);
  launch(gate, PYPKG_FORMS(gated_activation_forward), params);
  return {out};
}

// With writes_out_over_dout the memory of dout then holds the output of the forward pass.
std::vector<Tensor> backward(const Tensor& gate, const Tensor* up,
                             const OptionalTensor& dout_or_none, int64_t activation,
                             bool gate_first, bool writes_out_over_dout = false) {
  const Layout layout = check(gate, up, gate_first, activation);
  const Tensor dout = gradient_or_zeros(dout_or_none, out_shape(gate.shape(), !up), gate);
  check_shape("gated_activation: gradient", dout, out_shape(gate.shape(), !up));
  check_dtype("gated_activation: gradient", dout, gate.dtype());
  std::vector<Tensor> gradients = {empty(gate.shape(), gate.dtype(), gate)};
  if (up) gradients.push_back(empty(gate.shape(), gate.dtype(), gate));

  auto params = inputs<GatedActivationBackward>(gate, up, layout, activation);
  params.dout = raw(dout);
  params.dgate = shifted(&gradients.front(), layout.gate_offset);
  params.dup = shifted(&gradients.back(), layout.up_offset);
  if (writes_out_over_dout) params.out = const_cast<void*>(raw(dout));
  launch(gate, PYPKG_FORMS(gated_activation_backward), params);
  return gradients;
}

std::vector<Tensor> pair_forward(const Tensor& gate, const Tensor& up, int64_t activation) {
  return forward(gate, &up, activation, /*gate_first=*/true);
}

std::vector<Tensor> pair_backward(const Tensor& gate, const Tensor& up, const OptionalTensor& dout,
                                  int64_t activation) {
  return backward(gate, &up, dout, activation, /*gate_first=*/true);
}

std::vector<Tensor> packed_forward(const Tensor& packed, int64_t activation, bool gate_first) {
  return forward(packed, nullptr, activation, gate_first);
}

std::vector<Tensor> packed_backward(const Tensor& packed, const OptionalTensor& dout,
                                    int64_t activation, bool gate_first) {
  return backward(packed, nullptr, dout, activation, gate_first);
}

using paddle::DataType;

std::vector<Shape> pair_shapes(const Shape& gate, const Shape&) { return {gate}; }
std::vector<DataType> pair_dtypes(DataType gate, DataType) { return {gate}; }
std::vector<Shape> pair_grad_shapes(const Shape& gate, const Shape& up, const OptionalShape&) {
  return {gate, up};
}

std::vector<Shape> packed_shapes(const Shape& packed) { return {out_shape(packed, true)}; }
std::vector<DataType> packed_dtypes(DataType packed) { return {packed}; }
std::vector<Shape> packed_grad_shapes(const Shape& packed, const OptionalShape&) {
  return {packed};
}

// The gated feed-forward block: projection to gate and up, activation, projection of the result.
std::vector<Tensor> block_forward(const Tensor& x, const Tensor& gate_up_weight,
                                  const Tensor& down_weight, int64_t activation) {
  const Tensor gate_up = product(x, gate_up_weight);
  const Tensor activated = packed_forward(gate_up, activation, /*gate_first=*/true)[0];
  return {product(activated, down_weight), gate_up};
}

struct GateUpGradients {
  Tensor dgate_up;
  Tensor ddown_weight;
};

// The backward pass of the block down to gate and up. It computes what is activated again.
GateUpGradients gate_up_gradients(const Tensor& down_weight, const Tensor& gate_up,
                                  const OptionalTensor& dout_or_none, int64_t activation) {
  Shape out_shape = gate_up.shape();
  out_shape.back() = down_weight.shape()[1];
  const Tensor dout = gradient_or_zeros(dout_or_none, out_shape, gate_up);
  const Tensor activated = input_gradient(dout, down_weight);  // at first its gradient
  const Tensor dgate_up = backward(gate_up, nullptr, activated, activation, /*gate_first=*/true,
                                   /*writes_out_over_dout=*/true)[0];
  return {dgate_up, weight_gradient(activated, dout)};
}

std::vector<Tensor> block_backward(const Tensor& x, const Tensor& gate_up_weight,
                                   const Tensor& down_weight, const Tensor& gate_up,
                                   const OptionalTensor& dout, int64_t activation) {
  const GateUpGradients inner = gate_up_gradients(down_weight, gate_up, dout, activation);
  return {input_gradient(inner.dgate_up, gate_up_weight), weight_gradient(x, inner.dgate_up),
          inner.ddown_weight};
}

// The block of rms_norm(x + residual): one operator for two more.
std::vector<Tensor> normed_block_forward(const Tensor& x, const Tensor& residual,
                                         const Tensor& norm_weight, const Tensor& gate_up_weight,
                                         const Tensor& down_weight, int64_t activation,
                                         float epsilon) {
  const std::vector<Tensor> norm = add_rms_norm(x, residual, norm_weight, epsilon);
  const std::vector<Tensor> block = block_forward(norm[0], gate_up_weight, down_weight, activation);
  return {block[0], norm[1], norm[2], block[1]};
}

std::vector<Tensor> normed_block_backward(const Tensor& norm_weight, const Tensor& gate_up_weight,
                                          const Tensor& down_weight, const OptionalTensor& stream,
                                          const Tensor& rstd, const Tensor& gate_up,
                                          const OptionalTensor& dout, const OptionalTensor& dstream,
                                          int64_t activation, float) {
  const GateUpGradients inner = gate_up_gradients(down_weight, gate_up, dout, activation);
  const Tensor y = input_gradient(inner.dgate_up, gate_up_weight);  // at first its gradient
  const std::vector<Tensor> norm = add_rms_norm_grad_and_y(stream, norm_weight, rstd, y, dstream);
  return {norm[0], norm[1], norm[2], weight_gradient(y, inner.dgate_up), inner.ddown_weight};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_gated_activation)
    .Inputs({"Gate", "Up"})
    .Outputs({paddle::Optional("Out")})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::pair_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::pair_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::pair_dtypes));

PD_BUILD_GRAD_OP(pypkg_gated_activation)
    .Inputs({"Gate", "Up", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("Gate"), paddle::Grad("Up")})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::pair_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::pair_grad_shapes));

PD_BUILD_OP(pypkg_packed_gated_activation)
    .Inputs({"Packed"})
    .Outputs({paddle::Optional("Out")})
    .Attrs({"activation: int64_t", "gate_first: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::packed_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::packed_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(pypkg::packed_dtypes));

PD_BUILD_GRAD_OP(pypkg_packed_gated_activation)
    .Inputs({"Packed", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("Packed")})
    .Attrs({"activation: int64_t", "gate_first: bool"})
    .SetKernelFn(PD_KERNEL(pypkg::packed_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(pypkg::packed_grad_shapes));

// What follows Out are outputs because the backward pass needs them; their gradients have no use.
PD_BUILD_OP(pypkg_mlp_block)
    .Inputs({"X", "GateUpWeight", "DownWeight"})
    .Outputs({paddle::Optional("Out"), "GateUp"})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_forward));

PD_BUILD_GRAD_OP(pypkg_mlp_block)
    .Inputs({"X", "GateUpWeight", "DownWeight", "GateUp", paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("GateUpWeight"), paddle::Grad("DownWeight")})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::block_backward));

PD_BUILD_OP(pypkg_normed_mlp_block)
    .Inputs({"X", "Residual", "NormWeight", "GateUpWeight", "DownWeight"})
    .Outputs({paddle::Optional("Out"), paddle::Optional("Stream"), "Rstd", "GateUp"})
    .Attrs({"activation: int64_t", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::normed_block_forward));

PD_BUILD_GRAD_OP(pypkg_normed_mlp_block)
    .Inputs({"NormWeight", "GateUpWeight", "DownWeight", paddle::Optional("Stream"), "Rstd",
             "GateUp", paddle::Grad(paddle::Optional("Out")),
             paddle::Grad(paddle::Optional("Stream"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("NormWeight"),
              paddle::Grad("GateUpWeight"), paddle::Grad("DownWeight")})
    .Attrs({"activation: int64_t", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(pypkg::normed_block_backward));
