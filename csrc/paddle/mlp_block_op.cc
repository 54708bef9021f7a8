// The gated feed-forward block in one operator: projection to gate and up, activation, projection
// of the result. The host dispatches one operator where there are three, forward and backward.
#include "gated_activation_glue.h"
#include "products.h"

namespace pypkg {
namespace {

using paddle::Tensor;

std::vector<Tensor> forward(const Tensor& x, const Tensor& gate_up_weight,
                            const Tensor& down_weight, int64_t activation) {
  const Tensor gate_up = product(x, gate_up_weight);
  const Tensor activated =
      packed_gated_activation_forward(gate_up, activation, /*gate_first=*/true);
  return {product(activated, down_weight), gate_up, activated};
}

std::vector<Tensor> backward(const Tensor& x, const Tensor& gate_up_weight,
                             const Tensor& down_weight, const Tensor& gate_up,
                             const Tensor& activated, const OptionalTensor& dout_or_none,
                             int64_t activation) {
  Shape out_shape = x.shape();
  out_shape.back() = down_weight.shape()[1];
  const Tensor dout = gradient_or_zeros(dout_or_none, out_shape, x);
  Tensor dactivated = input_gradient(dout, down_weight);
  const Tensor ddown_weight = weight_gradient(activated, dout);
  const Tensor dgate_up =
      packed_gated_activation_backward(gate_up, dactivated, activation, /*gate_first=*/true);
  dactivated.reset();  // before the next tensors are made
  return {input_gradient(dgate_up, gate_up_weight), weight_gradient(x, dgate_up), ddown_weight};
}

}  // namespace
}  // namespace pypkg

// What follows Out are outputs because the backward pass needs them; their gradients have no use.
PD_BUILD_OP(pypkg_mlp_block)
    .Inputs({"X", "GateUpWeight", "DownWeight"})
    .Outputs({paddle::Optional("Out"), "GateUp", "Activated"})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::forward));

PD_BUILD_GRAD_OP(pypkg_mlp_block)
    .Inputs({"X", "GateUpWeight", "DownWeight", "GateUp", "Activated",
             paddle::Grad(paddle::Optional("Out"))})
    .Outputs({paddle::Grad("X"), paddle::Grad("GateUpWeight"), paddle::Grad("DownWeight")})
    .Attrs({"activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::backward));
