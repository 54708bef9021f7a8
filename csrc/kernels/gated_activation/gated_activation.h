// Gated linear units (Shazeer, 2020): out = activation(gate) * up.
//
// Rows may be strided, so gate and up can be the halves of one packed [rows, 2 * cols] matrix.
#pragma once

#include "common/common.h"

namespace pypkg {

enum class Activation : int { kSilu = 0, kGeluErf = 1, kGeluTanh = 2 };

struct GatedActivationForward {
  const void* gate = nullptr;  // [rows, cols], rows gate_stride elements apart
  const void* up = nullptr;    // [rows, cols], rows up_stride elements apart
  void* out = nullptr;         // [rows, cols], contiguous, overwritten
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

struct GatedActivationBackward {
  const void* gate = nullptr;  // strided as in the forward
  const void* up = nullptr;
  const void* dout = nullptr;  // [rows, cols], contiguous
  void* dgate = nullptr;       // strided like gate, overwritten; may alias gate
  void* dup = nullptr;         // strided like up, overwritten; may alias up
  void* out = nullptr;         // as of the forward, overwritten; may alias dout; or null
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t gate_stride = 0;
  int64_t up_stride = 0;
  Activation activation = Activation::kSilu;
  DType dtype = DType::kFloat32;
};

void gated_activation_forward_cpu(const GatedActivationForward& params);
void gated_activation_backward_cpu(const GatedActivationBackward& params);
void gated_activation_forward_cuda(const GatedActivationForward& params, Stream stream);
void gated_activation_backward_cuda(const GatedActivationBackward& params, Stream stream);

}  // namespace pypkg
