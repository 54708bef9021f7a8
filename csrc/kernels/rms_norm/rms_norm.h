// Root-mean-square normalisation (Zhang and Sennrich, 2019), with an optional fused residual add.
//
//   h = x + residual            (h = x when residual is null)
//   y = h * rstd * weight,      rstd = 1 / sqrt(mean(h^2) + epsilon)
//
// Arithmetic is float32 for every dtype. Matrices are [rows, cols], row-major and contiguous.
#pragma once

#include "common/common.h"

namespace pypkg {

struct RmsNormForward {
  const void* x = nullptr;
  const void* residual = nullptr;  // [rows, cols] or null
  const void* weight = nullptr;    // [cols]
  void* y = nullptr;               // [rows, cols], overwritten; may alias x
  // [rows, cols], overwritten with h; null exactly when residual is, which it may alias.
  void* residual_out = nullptr;
  float* rstd = nullptr;  // [rows], overwritten
  int64_t rows = 0;
  int64_t cols = 0;
  float epsilon = 1e-6f;
  DType dtype = DType::kFloat32;         // of x, residual, y, residual_out
  DType weight_dtype = DType::kFloat32;  // equal to dtype, or float32
};

// dx is the gradient of h, which is that of x and of residual alike:
//   dx = dh + rstd * (dy * weight - h * rstd^2 * mean(dy * weight * h))
struct RmsNormBackward {
  const void* dy = nullptr;      // [rows, cols]
  const void* dh = nullptr;      // [rows, cols], gradient arriving at residual_out; or null
  const void* h = nullptr;       // [rows, cols], what was normalised
  const void* weight = nullptr;  // [cols]
  const float* rstd = nullptr;   // [rows]
  void* dx = nullptr;            // [rows, cols], overwritten; may alias dy or dh
  void* dresidual = nullptr;     // [rows, cols], overwritten with dx once more; or null
  void* y = nullptr;        // as of the forward, overwritten; may alias dy if dx does not; or null
  void* dweight = nullptr;  // [cols] in weight_dtype, overwritten
  float* workspace = nullptr;  // rms_norm_backward_workspace_*() floats, uninitialised
  int64_t rows = 0;
  int64_t cols = 0;
  DType dtype = DType::kFloat32;
  DType weight_dtype = DType::kFloat32;
};

void rms_norm_forward_cpu(const RmsNormForward& params);
void rms_norm_backward_cpu(const RmsNormBackward& params);
int64_t rms_norm_backward_workspace_cpu(int64_t rows, int64_t cols);

void rms_norm_forward_cuda(const RmsNormForward& params, Stream stream);
void rms_norm_backward_cuda(const RmsNormBackward& params, Stream stream);
int64_t rms_norm_backward_workspace_cuda(int64_t rows, int64_t cols);

}  // namespace pypkg
