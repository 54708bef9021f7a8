// The arithmetic of AdamW, shared by host and device.
//
// All devices give the same bits: whether a product is rounded before an addition is explicit (a *
// b or fmaf), and compilers must not contract expressions. The choices are those of Paddle's CPU
// kernel with AVX-512; with AVX2 that kernel rounds differently.
#pragma once

#include <cmath>
#include <type_traits>

#include "adamw/adamw.h"

namespace pypkg {

// Arrays without elements may be null.
inline bool has_masters(const AdamW& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.tensors[i].numel > 0) return p.tensors[i].master;
  }
  return false;
}

inline void check_adamw(const AdamW& p) {
  const auto reject = [](const std::string& message) {
    throw std::invalid_argument("adamw: " + message);
  };
  if (p.grad_dtype != DType::kFloat32 && p.grad_dtype != p.dtype) {
    reject(std::string("gradients must be float32 or ") + dtype_name(p.dtype) +
           " like the parameters, got " + dtype_name(p.grad_dtype));
  }
  const bool masters = has_masters(p);
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.tensors[i].numel > 0 && !p.tensors[i].master == masters) {
      reject("all parameters must have a master weight, or none");
    }
  }
  if (masters && p.dtype == DType::kFloat32) {
    reject("master weights are for 16-bit parameters, got float32");
  }
}

// Calls function(std::bool_constant<whether there are master weights>).
template <typename Function>
void dispatch_masters(const AdamW& p, Function&& function) {
  if (has_masters(p)) return function(std::true_type{});
  function(std::false_type{});
}

// Whether the gradients are finite. The scale is on the device of the tensors, so the kernel checks
// it.
PYPKG_HOST_DEVICE bool is_step(float grad_scale) { return grad_scale - grad_scale == 0.0f; }

// Factors that are the same for all elements of a tensor.
struct AdamWRates {
  float decay;
  float step;
  float epsilon;
};

inline AdamWRates adamw_rates(const AdamW& p, const AdamWTensor& tensor) {
  const float correction = std::sqrt(1.0f - tensor.beta2_power);
  return {p.learning_rate * tensor.weight_decay,
          p.learning_rate * (correction / (1.0f - tensor.beta1_power)), p.epsilon * correction};
}

struct AdamWElement {
  float weight;
  float moment1;
  float moment2;
};

PYPKG_HOST_DEVICE AdamWElement adamw_update(const AdamWElement& old, float gradient, float beta1,
                                            float beta2, const AdamWRates& rates) {
  AdamWElement next;
  next.moment1 = fmaf(beta1, old.moment1, (1.0f - beta1) * gradient);
  next.moment2 = fmaf(beta2, old.moment2, (1.0f - beta2) * (gradient * gradient));
  const float decayed = fmaf(-rates.decay, old.weight, old.weight);
  const float direction = next.moment1 / (sqrtf(next.moment2) + rates.epsilon);
  next.weight = fmaf(-rates.step, direction, decayed);
  return next;
}

}  // namespace pypkg
