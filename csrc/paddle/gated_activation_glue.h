// The gated activation of packed gate and up, for the operators that have it: by itself
// (gated_activation_op.cc), and with the projections (mlp_block_op.cc).
#pragma once

#include "tensors.h"

namespace pypkg {

// [..., 2 * cols] to [..., cols]; activation: a value of Activation.
paddle::Tensor packed_gated_activation_forward(const paddle::Tensor& packed, int64_t activation,
                                               bool gate_first);

// The gradient of packed.
paddle::Tensor packed_gated_activation_backward(const paddle::Tensor& packed,
                                                const OptionalTensor& dout, int64_t activation,
                                                bool gate_first);

}  // namespace pypkg
