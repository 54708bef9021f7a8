#include <algorithm>
#include <cmath>

#include "common/cpu_simd.h"
#include "rms_norm/rms_norm.h"

namespace pypkg {
namespace {

// Rows are divided into parts that depend only on the shape. Each part sums its own dweight, so the
// result does not depend on the number of threads.
int64_t backward_parts(int64_t rows) { return std::clamp<int64_t>(rows / 16, 1, 64); }

template <class T, class W>
PYPKG_INLINE void set_normed(const T* h, const W* weight, float rstd, T* y, int64_t cols) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    y[c] = from_float<T>(to_float(h[c]) * rstd * to_float(weight[c]));
  }
}

// The row stays in cache between the loops: memory is read and written once.
template <class T, class W>
PYPKG_INLINE void forward_row(const T* x, const T* residual, const W* weight, T* y, T* residual_out,
                              float* rstd, int64_t cols, float epsilon) {
  const T* h = residual ? residual_out : x;
  if (residual) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      residual_out[c] = from_float<T>(to_float(x[c]) + to_float(residual[c]));
    }
  }
  // The squares of the rounded h, which the backward pass reads.
  const float sum = sum_of(cols, [&](int64_t c) __attribute__((always_inline)) {
    return to_float(h[c]) * to_float(h[c]);
  });
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(cols) + epsilon);
  *rstd = scale;
  set_normed(h, weight, scale, y, cols);
}

template <class T, class W>
PYPKG_INLINE void backward_row(const T* dy, const T* dh, const T* h, const W* weight, float rstd,
                               T* dx, T* y, float* dweight, int64_t cols) {
  const float dot = sum_of(cols, [&](int64_t c) __attribute__((always_inline)) {
    return to_float(dy[c]) * to_float(weight[c]) * to_float(h[c]);
  });
  const float mean = dot * rstd * rstd / static_cast<float>(cols);
  if (dh) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const float g = to_float(dy[c]), v = to_float(h[c]);
      dweight[c] += g * v * rstd;
      dx[c] = from_float<T>(to_float(dh[c]) + rstd * (g * to_float(weight[c]) - v * mean));
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const float g = to_float(dy[c]), v = to_float(h[c]);
      dweight[c] += g * v * rstd;
      dx[c] = from_float<T>(rstd * (g * to_float(weight[c]) - v * mean));
    }
  }
  if (y) set_normed(h, weight, rstd, y, cols);
}

template <class T, class W>
void forward(const RmsNormForward& p) {
  const auto at = [](auto* base, int64_t offset) { return base ? base + offset : base; };
  const auto row = cpu_version<forward_row<T, W>>();
#pragma omp parallel for num_threads(threads_for(p.rows* p.cols)) schedule(static)
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t offset = r * p.cols;
    row(static_cast<const T*>(p.x) + offset, at(static_cast<const T*>(p.residual), offset),
        static_cast<const W*>(p.weight), static_cast<T*>(p.y) + offset,
        at(static_cast<T*>(p.residual_out), offset), p.rstd + r, p.cols, p.epsilon);
  }
}

template <class T, class W>
void backward(const RmsNormBackward& p) {
  const int64_t parts = backward_parts(p.rows);
  const T* dh = static_cast<const T*>(p.dh);
  const auto row = cpu_version<backward_row<T, W>>();
#pragma omp parallel for num_threads(num_threads()) schedule(dynamic)
  for (int64_t part = 0; part < parts; ++part) {
    float* dweight = p.workspace + part * p.cols;
    std::fill_n(dweight, p.cols, 0.0f);
    for (int64_t r = part * p.rows / parts; r < (part + 1) * p.rows / parts; ++r) {
      const int64_t offset = r * p.cols;
      row(static_cast<const T*>(p.dy) + offset, dh ? dh + offset : nullptr,
          static_cast<const T*>(p.h) + offset, static_cast<const W*>(p.weight), p.rstd[r],
          static_cast<T*>(p.dx) + offset, p.y ? static_cast<T*>(p.y) + offset : nullptr, dweight,
          p.cols);
      if (p.dresidual) {  // the row is in the cache
        std::copy_n(static_cast<const T*>(p.dx) + offset, p.cols,
                    static_cast<T*>(p.dresidual) + offset);
      }
    }
  }
  W* dweight = static_cast<W*>(p.dweight);
  for (int64_t part = 1; part < parts; ++part) {
    const float* partial = p.workspace + part * p.cols;
    for (int64_t c = 0; c < p.cols; ++c) p.workspace[c] += partial[c];
  }
  for (int64_t c = 0; c < p.cols; ++c) dweight[c] = from_float<W>(p.workspace[c]);
}

// Calls function(T{}, W{}): the element types of the matrices and of the weight.
template <class Function>
void dispatch(const char* kernel, DType dtype, DType weight_dtype, Function&& function) {
  if (weight_dtype != dtype && weight_dtype != DType::kFloat32) {
    throw std::invalid_argument(std::string(kernel) + ": weight dtype " + dtype_name(weight_dtype) +
                                " must be float32 or that of x, " + dtype_name(dtype));
  }
  dispatch_dtype(dtype, kernel, [&](auto t) {
    if (weight_dtype == DType::kFloat32) {
      function(t, float{});
    } else {
      function(t, t);
    }
  });
}

}  // namespace

void rms_norm_forward_cpu(const RmsNormForward& params) {
  dispatch("rms_norm", params.dtype, params.weight_dtype,
           [&](auto t, auto w) { forward<decltype(t), decltype(w)>(params); });
}

void rms_norm_backward_cpu(const RmsNormBackward& params) {
  dispatch("rms_norm", params.dtype, params.weight_dtype,
           [&](auto t, auto w) { backward<decltype(t), decltype(w)>(params); });
}

int64_t rms_norm_backward_workspace_cpu(int64_t rows, int64_t cols) {
  return backward_parts(rows) * cols;
}

}  // namespace pypkg
