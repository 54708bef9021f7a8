// The arithmetic of AdamW, shared by host and device.
//
// Where a product is added it says whether it is rounded first (a * b) or not (fmaf), and nothing
// here is left to a compiler's contraction: every device gives the same bits. The choice of each is
// that of Paddle's own CPU kernel with AVX-512; with AVX2 it rounds otherwise.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "adamw.h"

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
  if (p.stochastic_rounding && p.dtype != DType::kBFloat16) {
    reject(std::string("stochastic rounding is for bfloat16 parameters, got ") +
           dtype_name(p.dtype));
  }
  const bool masters = has_masters(p);
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.tensors[i].numel > 0 && !p.tensors[i].master == masters) {
      reject("all parameters must have a master weight, or none");
    }
  }
  if (masters && (p.dtype == DType::kFloat32 || p.stochastic_rounding)) {
    reject("master weights are for 16-bit parameters without stochastic rounding");
  }
}

// Where the weights are in float32 and how the parameters get them.
enum class AdamWWeights { kParameter, kMaster, kStochastic };

// Calls function(std::integral_constant<AdamWWeights, ...>).
template <typename Function>
void dispatch_adamw_weights(const AdamW& p, Function&& function) {
  using W = AdamWWeights;
  if (p.stochastic_rounding) return function(std::integral_constant<W, W::kStochastic>{});
  if (has_masters(p)) return function(std::integral_constant<W, W::kMaster>{});
  function(std::integral_constant<W, W::kParameter>{});
}

// What is the same for all elements of a tensor.
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

// Random bits for elements [kGroup * n, kGroup * (n + 1)) of a tensor, 16 of them each.
struct AdamWNoise {
  static constexpr int kGroup = 8;
  uint32_t words[4];

  PYPKG_HOST_DEVICE uint32_t operator[](int i) const {
    const uint32_t low = i < 2 ? words[0] : words[1], high = i < 6 ? words[2] : words[3];
    return (i < 4 ? low : high) >> (i % 2 * 16) & 0xffffu;
  }
};

// Philox4x32-10 (Salmon et al., 2011).
PYPKG_HOST_DEVICE AdamWNoise adamw_noise(uint64_t seed, uint64_t offset, uint32_t tensor,
                                         int64_t group) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = static_cast<uint32_t>(group), x1 = tensor;
  uint32_t x2 = static_cast<uint32_t>(offset), x3 = static_cast<uint32_t>(offset >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * x0, product1 = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

template <class To, class From>
PYPKG_HOST_DEVICE To reinterpret_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Bits of a bfloat16: up with the probability of the part that is cut off. `noise`: 16 bits.
PYPKG_HOST_DEVICE uint16_t round_stochastically(float value, uint32_t noise) {
  const uint32_t bits = reinterpret_bits<uint32_t>(value);
  return static_cast<uint16_t>(value == value ? (bits + noise) >> 16 : 0x7fc0u);
}

}  // namespace pypkg
