// Shared by the CPU kernels: element types, and functions of float32 that vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/common.h"
#include "common/cpu_isa.h"

// Every function that takes or returns a vector is inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pypkg {

template <class To, class From>
PYPKG_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

PYPKG_INLINE float to_float(float value) { return value; }
PYPKG_INLINE float to_float(BFloat16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }

template <class T>
PYPKG_INLINE T from_float(float value);
template <>
PYPKG_INLINE float from_float<float>(float value) {
  return value;
}
template <>
PYPKG_INLINE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? nearest_even : 0x7fc0u)};
}

// Calls function(T{}) with the element type of dtype.
template <class Function>
void dispatch_dtype(DType dtype, const char* kernel, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: break;
  }
  throw std::invalid_argument(std::string(kernel) + ": dtype " + dtype_name(dtype) +
                              " is not supported on CPU; expected float32 or bfloat16");
}

// Integers of the same width. For a vector F, the type of the comparison of two F.
template <class F>
struct BitsOf {
  using type = decltype(F{} == F{});
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};

// e^x within 1 ulp, of a float or of a vector of them, branch-free so that loops over floats
// vectorise. Results below 2e-38 are flushed to zero, because denormals are slow and do not change
// a sum with a larger term. kMayOverflow: false if x is never above 88, which is faster.
template <class F, bool kMayOverflow = true>
PYPKG_INLINE F fast_exp(const F& x) {
  using Bits = typename BitsOf<F>::type;
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // 1.5 * 2^23: adding it leaves the nearest integer. With the bias of an exponent added too, the
  // lowest bits of the sum are the exponent bits of 2^n.
  constexpr float kRound = kMayOverflow ? 12582912.0f : 12582912.0f + 127.0f;
  constexpr float kLowest = -86.9f, kHighest = 88.722839f;
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Minimax fit of (e^r - 1 - r) / r^2; relative error of e^r 3e-9.
  F p = r * 1.3814467e-3f + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r * r + r + 1.0f;
  const Bits exponent = bit_cast<Bits>(shifted) << 23;  // the bits of kRound are shifted out
  if constexpr (!kMayOverflow) {
    const F result = p * bit_cast<F>(exponent);  // NaN stays
    return x < kLowest ? F{} : result;
  } else {
    F result = bit_cast<F>(bit_cast<Bits>(p) + exponent);
    result = x < kLowest ? F{} : result;
    result = x > kHighest ? F{} + std::numeric_limits<float>::infinity() : result;
    if constexpr (std::is_same_v<F, float>) {
      return x == x ? result : x;
    } else {
      // A value with all bits set is a NaN. An OR is faster than a select in AVX2.
      return bit_cast<F>(bit_cast<Bits>(result) | (x != x));
    }
  }
}

// tanh(x) with a relative error below 3e-7. Below 0.625 x + x^3 P(x^2), as 1 - 2 / (e^2x + 1)
// cancels there; P is a minimax fit, relative error of tanh 5e-9.
template <class F>
PYPKG_INLINE F fast_tanh(const F& x) {
  const F square = x * x;
  F p = square * -5.7049349e-3f + 2.0639041e-2f;
  p = p * square - 5.3739700e-2f;
  p = p * square + 1.3331442e-1f;
  p = p * square - 3.3333281e-1f;
  const F near = x + x * square * p;
  const F far = 1.0f - 2.0f / (fast_exp<F>(2.0f * x) + 1.0f);
  return square < 0.390625f ? near : far;
}

PYPKG_INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// The sum of term(c) for c < count, as four independent sums: a single one would wait for the
// latency of each addition.
template <class Term>
PYPKG_INLINE float sum_of(int64_t count, const Term& term) {
  const int64_t quarter = count / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += term(i);
    b += term(quarter + i);
    c += term(2 * quarter + i);
    d += term(3 * quarter + i);
  }
  for (int64_t i = 4 * quarter; i < count; ++i) a += term(i);
  return (a + b) + (c + d);
}

struct Normal {
  float cdf;
  float density;
};

// The standard normal distribution, absolute error below 2e-7 and relative error below 4e-6 in the
// left tail. With t = 1 / (1 + 0.35 |x|), cdf(-|x|) * e^(x^2 / 2) is t times a polynomial of t
// (minimax fit, relative error 3e-8).
PYPKG_INLINE Normal normal(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.35f * magnitude);
  float p = -0.0291459393f;
  p = p * t + 0.143971741f;
  p = p * t - 0.255714357f;
  p = p * t + 0.159174263f;
  p = p * t - 0.0231099036f;
  p = p * t + 0.105508029f;
  p = p * t + 0.119832858f;
  p = p * t + 0.139861867f;
  p = p * t + 0.139621407f;
  const float gauss = fast_exp(-0.5f * x * x);
  const float tail = p * t * gauss;
  return {x < 0.0f ? tail : 1.0f - tail, 0.39894228f * gauss};
}

}  // namespace pypkg
