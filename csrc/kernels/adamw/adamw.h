// AdamW (Loshchilov and Hutter, 2019) of many tensors at once, in place.
//
//   g = gradient * grad_scale
//   moment1 = beta1 * moment1 + (1 - beta1) * g
//   moment2 = beta2 * moment2 + (1 - beta2) * g^2
//   w = w - learning_rate * weight_decay * w
//   w = w - learning_rate * (moment1 / c1) / (sqrt(moment2 / c2) + epsilon),
//   c1 = 1 - beta1_power, c2 = 1 - beta2_power
//
// in float32 and in the order of Paddle's adamw. w is the master weight if there is one; the
// parameter then receives its rounded value. All devices and numbers of threads give the same bits.
#pragma once

#include "common/common.h"

namespace pypkg {

// One parameter; all arrays hold numel elements.
struct AdamWTensor {
  void* param = nullptr;  // read only without a master weight; overwritten
  const void* grad = nullptr;
  float* moment1 = nullptr;
  float* moment2 = nullptr;
  float* master = nullptr;  // or null
  int64_t numel = 0;
  float weight_decay = 0.0f;
  float beta1_power = 0.0f;  // beta1^t in step t = 1, 2, ...
  float beta2_power = 0.0f;
};

struct AdamW {
  const AdamWTensor* tensors = nullptr;  // [count], in host memory; read before the call returns
  int64_t count = 0;
  DType dtype = DType::kFloat32;       // of the parameters
  DType grad_dtype = DType::kFloat32;  // float32 or that of the parameters
  float learning_rate = 0.0f;
  float beta1 = 0.9f;
  float beta2 = 0.999f;
  float epsilon = 1e-8f;
  // One float on the device of the tensors; null: 1. If it is not finite, nothing is overwritten.
  const float* grad_scale = nullptr;
};

// Both throw std::invalid_argument for an unsupported combination of dtypes.
void adamw_cpu(const AdamW& params);
void adamw_cuda(const AdamW& params, Stream stream);

}  // namespace pypkg
