#include "common/cuda_vector.cuh"
#include "gated_activation/gated_activation.h"

namespace pypkg {
namespace {

constexpr int kThreads = 256;
constexpr float kSqrtHalf = 0.70710678118654752f;
constexpr float kInverseSqrtTwoPi = 0.39894228040143268f;
constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
constexpr float kTanhCubic = 0.044715f;

// The activation of x and its derivative.
template <Activation kActivation>
__device__ __forceinline__ void activate(float x, float& value, float& derivative) {
  if constexpr (kActivation == Activation::kSilu) {
    const float sigmoid = 1.0f / (1.0f + expf(-x));
    value = x * sigmoid;
    derivative = sigmoid * (1.0f + x * (1.0f - sigmoid));
  } else if constexpr (kActivation == Activation::kGeluErf) {
    const float cdf = 0.5f * (1.0f + erff(x * kSqrtHalf));
    value = x * cdf;
    derivative = cdf + x * kInverseSqrtTwoPi * expf(-0.5f * x * x);
  } else {
    const float t = tanhf(kSqrtTwoOverPi * (x + kTanhCubic * x * x * x));
    const float slope = kSqrtTwoOverPi * (1.0f + 3.0f * kTanhCubic * x * x);
    value = 0.5f * x * (1.0f + t);
    derivative = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope;
  }
}

// Calls f(row, column) for every kSize consecutive elements of a [rows, cols] matrix; kSize divides
// cols. Threads along x and grid y cover columns, threads along y and grid x cover rows.
template <int kSize, typename F>
__device__ __forceinline__ void for_each_run(int64_t rows, int64_t cols, F&& f) {
  const int64_t first_row = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
  const int64_t first_col = (blockIdx.y * int64_t(blockDim.x) + threadIdx.x) * kSize;
  for (int64_t row = first_row; row < rows; row += gridDim.x * int64_t(blockDim.y)) {
    for (int64_t col = first_col; col < cols; col += gridDim.y * int64_t(blockDim.x) * kSize) {
      f(row, col);
    }
  }
}

template <typename T, Activation kActivation, int kSize>
__global__ void __launch_bounds__(kThreads) forward_kernel(GatedActivationForward p) {
  for_each_run<kSize>(p.rows, p.cols, [&](int64_t row, int64_t col) {
    const auto gate =
        Pack<T, kSize>::load(static_cast<const T*>(p.gate) + row * p.gate_stride + col);
    const auto up = Pack<T, kSize>::load(static_cast<const T*>(p.up) + row * p.up_stride + col);
    Pack<T, kSize> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value, derivative;
      activate<kActivation>(gate[i], value, derivative);
      out.set(i, value * up[i]);
    }
    out.store(static_cast<T*>(p.out) + row * p.cols + col);
  });
}

template <typename T, Activation kActivation, int kSize, bool kWithOut>
__global__ void __launch_bounds__(kThreads) backward_kernel(GatedActivationBackward p) {
  for_each_run<kSize>(p.rows, p.cols, [&](int64_t row, int64_t col) {
    const int64_t gate_at = row * p.gate_stride + col, up_at = row * p.up_stride + col;
    auto gate = Pack<T, kSize>::load(static_cast<const T*>(p.gate) + gate_at);
    auto up = Pack<T, kSize>::load(static_cast<const T*>(p.up) + up_at);
    const auto dout = Pack<T, kSize>::load(static_cast<const T*>(p.dout) + row * p.cols + col);
    Pack<T, kSize> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value, derivative;
      activate<kActivation>(gate[i], value, derivative);
      if constexpr (kWithOut) out.set(i, value * up[i]);
      gate.set(i, dout[i] * up[i] * derivative);
      up.set(i, dout[i] * value);
    }
    gate.store(static_cast<T*>(p.dgate) + gate_at);
    up.store(static_cast<T*>(p.dup) + up_at);
    if constexpr (kWithOut) out.store(static_cast<T*>(p.out) + row * p.cols + col);
  });
}

template <typename F>
void dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kSilu: return f(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGeluErf: return f(std::integral_constant<Activation, Activation::kGeluErf>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
  }
}

// Calls f(TypeTag<T>, activation, vector size): 16-byte vectors if rows allow them, else 1.
template <typename Params, typename F>
void dispatch(const Params& p, bool aligned, F&& f) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    constexpr int kSize = kVectorSize<typename decltype(tag)::type>;
    const bool wide =
        aligned && p.cols % kSize == 0 && p.gate_stride % kSize == 0 && p.up_stride % kSize == 0;
    dispatch_activation(p.activation, [&](auto activation) {
      if (wide) {
        f(tag, activation, std::integral_constant<int, kSize>{});
      } else {
        f(tag, activation, std::integral_constant<int, 1>{});
      }
    });
  });
}

template <typename Params>
void launch_over_matrix(const char* operation, void (*kernel)(Params), const Params& p, int size,
                        Stream stream) {
  const int64_t runs = p.cols / size;
  int width = kThreads;
  while (width / 2 >= runs) width /= 2;
  const int height = kThreads / width;
  const dim3 grid(std::min<int64_t>(ceil_div<int64_t>(p.rows, height), kMaxGridBlocks),
                  std::min<int64_t>(ceil_div<int64_t>(runs, width), 65535));
  const LaunchSite site{operation, {p.rows, p.cols}};
  launch(site, kernel, grid, dim3(width, height), 0, stream, p);
}

}  // namespace

void gated_activation_forward_cuda(const GatedActivationForward& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  dispatch(p, all_aligned({p.gate, p.up, p.out}), [&](auto tag, auto activation, auto size) {
    constexpr int kSize = decltype(size)::value;
    launch_over_matrix(
        "gated_activation_forward",
        forward_kernel<typename decltype(tag)::type, decltype(activation)::value, kSize>, p, kSize,
        stream);
  });
}

void gated_activation_backward_cuda(const GatedActivationBackward& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool aligned = all_aligned({p.gate, p.up, p.dout, p.dgate, p.dup, p.out});
  dispatch(p, aligned, [&](auto tag, auto activation, auto size) {
    using T = typename decltype(tag)::type;
    constexpr Activation kActivation = decltype(activation)::value;
    constexpr int kSize = decltype(size)::value;
    const auto kernel = p.out ? backward_kernel<T, kActivation, kSize, true>
                              : backward_kernel<T, kActivation, kSize, false>;
    launch_over_matrix("gated_activation_backward", kernel, p, kSize, stream);
  });
}

}  // namespace pypkg
