#include "common/cpu_simd.h"
#include "gated_activation/gated_activation.h"

namespace pypkg {
namespace {

struct ValueAndSlope {
  float value;
  float slope;
};

template <Activation kind>
PYPKG_INLINE ValueAndSlope activate(float x) {
  if constexpr (kind == Activation::kSilu) {
    const float s = sigmoid(x);
    return {x * s, s + x * s * (1.0f - s)};
  } else if constexpr (kind == Activation::kGeluErf) {
    const Normal n = normal(x);
    return {x * n.cdf, n.cdf + x * n.density};
  } else {
    // 0.5 * (1 + tanh(u)) is sigmoid(2u): no cancellation for negative u.
    constexpr float kTwoSqrt2OverPi = 1.59576912f, kCubic = 0.044715f;
    const float s = sigmoid(kTwoSqrt2OverPi * (x + kCubic * x * x * x));
    const float inner_slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    return {x * s, s + x * s * (1.0f - s) * inner_slope};
  }
}

template <class T, Activation kind>
PYPKG_INLINE void forward_row(const T* gate, const T* up, T* out, int64_t cols) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    out[c] = from_float<T>(activate<kind>(to_float(gate[c])).value * to_float(up[c]));
  }
}

template <class T, Activation kind, bool kWithOut>
PYPKG_INLINE void backward_row(const T* gate, const T* up, const T* dout, T* dgate, T* dup, T* out,
                               int64_t cols) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    const ValueAndSlope a = activate<kind>(to_float(gate[c]));
    const float u = to_float(up[c]), g = to_float(dout[c]);
    if constexpr (kWithOut) out[c] = from_float<T>(a.value * u);
    dgate[c] = from_float<T>(g * u * a.slope);
    dup[c] = from_float<T>(g * a.value);
  }
}

template <class T, Activation kind>
void forward(const GatedActivationForward& p) {
  const auto row = cpu_version<forward_row<T, kind>>();
#pragma omp parallel for num_threads(threads_for(p.rows* p.cols)) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    row(static_cast<const T*>(p.gate) + r * p.gate_stride,
        static_cast<const T*>(p.up) + r * p.up_stride, static_cast<T*>(p.out) + r * p.cols, p.cols);
  }
}

template <class T, Activation kind>
void backward(const GatedActivationBackward& p) {
  T* const out = static_cast<T*>(p.out);
  const auto row = out ? cpu_version<backward_row<T, kind, true>>()
                       : cpu_version<backward_row<T, kind, false>>();
#pragma omp parallel for num_threads(threads_for(p.rows* p.cols)) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    row(static_cast<const T*>(p.gate) + r * p.gate_stride,
        static_cast<const T*>(p.up) + r * p.up_stride, static_cast<const T*>(p.dout) + r * p.cols,
        static_cast<T*>(p.dgate) + r * p.gate_stride, static_cast<T*>(p.dup) + r * p.up_stride,
        out ? out + r * p.cols : nullptr, p.cols);
  }
}

// Calls function(T{}, std::integral_constant<Activation, kind>{}).
template <class Function>
void dispatch(DType dtype, Activation activation, Function&& function) {
  dispatch_dtype(dtype, "gated_activation", [&](auto t) {
    switch (activation) {
      case Activation::kSilu:
        return function(t, std::integral_constant<Activation, Activation::kSilu>{});
      case Activation::kGeluErf:
        return function(t, std::integral_constant<Activation, Activation::kGeluErf>{});
      case Activation::kGeluTanh:
        return function(t, std::integral_constant<Activation, Activation::kGeluTanh>{});
    }
  });
}

}  // namespace

void gated_activation_forward_cpu(const GatedActivationForward& params) {
  dispatch(params.dtype, params.activation,
           [&](auto t, auto kind) { forward<decltype(t), kind()>(params); });
}

void gated_activation_backward_cpu(const GatedActivationBackward& params) {
  dispatch(params.dtype, params.activation,
           [&](auto t, auto kind) { backward<decltype(t), kind()>(params); });
}

}  // namespace pypkg
