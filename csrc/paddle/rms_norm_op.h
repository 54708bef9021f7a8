// RMS norm of a sum, for the operators that contain it.
#pragma once

#include <vector>

#include "tensors.h"

namespace pypkg {

// y, h = x + residual, and rstd.
std::vector<paddle::Tensor> add_rms_norm(const paddle::Tensor& x, const paddle::Tensor& residual,
                                         const paddle::Tensor& weight, float epsilon);

// Gradients of x, of the residual and of the weight, given those of y and h. The memory of dy then
// holds y again, which the forward pass need not keep.
std::vector<paddle::Tensor> add_rms_norm_grad_and_y(const OptionalTensor& h,
                                                    const paddle::Tensor& weight,
                                                    const paddle::Tensor& rstd,
                                                    const paddle::Tensor& dy,
                                                    const OptionalTensor& dh);

}  // namespace pypkg
