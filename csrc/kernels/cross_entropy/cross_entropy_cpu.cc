#include <algorithm>
#include <cmath>

#include "common/cpu_simd.h"
#include "cross_entropy/cross_entropy.h"

namespace pypkg {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct MaxAndSum {
  float max;
  float sum;  // of exp(x - max); 0 where every x is -inf
};

// A row is processed in chunks that fit into the L1 cache. Each chunk is read twice, for its
// maximum and for the sum. The row is read from memory once, and exp is computed once per element.
template <class T>
PYPKG_INLINE MaxAndSum reduce_row(const T* x, int64_t cols) {
  constexpr int64_t kChunk = 2048;
  MaxAndSum total{-kInfinity, 0.0f};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = std::min(cols, begin + kChunk);
    float max = -kInfinity;
#pragma omp simd reduction(max : max)
    for (int64_t c = begin; c < end; ++c) {
      const float value = to_float(x[c]);
      max = value > max ? value : max;
    }
    if (max > total.max) {
      total.sum *= fast_exp<float, false>(total.max - max);
      total.max = max;
    }
    // If all values so far are -inf, shift by 0: then -inf adds 0, and NaN, which a maximum does
    // not show, stays NaN.
    const float shift = total.max == -kInfinity ? 0.0f : total.max;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; ++c) {
      sum += fast_exp<float, false>(to_float(x[c]) - shift);
    }
    total.sum += sum;
  }
  return total;
}

template <class T>
PYPKG_INLINE void softmax_row(const T* x, float lse, float scale, T* dx, int64_t cols) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    dx[c] = from_float<T>(fast_exp<float, false>(to_float(x[c]) - lse) * scale);
  }
}

void check_labels(const CrossEntropyForward& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t label = p.labels[r];
    if (label != p.ignore_index && (label < 0 || label >= p.vocab_size)) {
      throw std::out_of_range("cross_entropy: label " + std::to_string(label) + " of row " +
                              std::to_string(r) + " is outside the vocabulary of " +
                              std::to_string(p.vocab_size) + " entries and is not ignore_index (" +
                              std::to_string(p.ignore_index) + ")");
    }
  }
}

template <class T>
PYPKG_INLINE void forward_row(const CrossEntropyForward& p, int64_t r) {
  const T* x = static_cast<const T*>(p.logits) + r * p.cols;
  const bool ignored = p.labels[r] == p.ignore_index;
  const int64_t column = p.labels[r] - p.vocab_start;
  const MaxAndSum reduced = reduce_row(x, p.cols);
  const float lse = reduced.max + std::log(reduced.sum);
  const bool here = !ignored && column >= 0 && column < p.cols;
  const float target = here ? to_float(x[column]) : 0.0f;
  if (p.row_max) p.row_max[r] = reduced.max;
  if (p.row_sum) p.row_sum[r] = reduced.sum;
  if (p.target) p.target[r] = target;
  if (p.lse) p.lse[r] = lse;
  if (p.loss) p.loss[r] = ignored ? 0.0f : lse - target;
}

template <class T>
PYPKG_INLINE void backward_row(const CrossEntropyBackward& p, int64_t r) {
  const T* x = static_cast<const T*>(p.logits) + r * p.cols;
  T* dx = static_cast<T*>(p.dlogits) + r * p.cols;
  if (p.labels[r] == p.ignore_index) {
    std::fill_n(dx, p.cols, from_float<T>(0.0f));
    return;
  }
  const int64_t column = p.labels[r] - p.vocab_start;
  const bool here = column >= 0 && column < p.cols;
  const float target = here ? to_float(x[column]) : 0.0f;  // read before dx, which may alias x
  softmax_row(x, p.lse[r], p.dloss[r], dx, p.cols);
  if (here)
    dx[column] = from_float<T>((fast_exp<float, false>(target - p.lse[r]) - 1.0f) * p.dloss[r]);
}

}  // namespace

void cross_entropy_forward_cpu(const CrossEntropyForward& params) {
  check_labels(params);
  dispatch_dtype(params.dtype, "cross_entropy", [&](auto t) {
    const auto row = cpu_version<forward_row<decltype(t)>>();
#pragma omp parallel for num_threads(num_threads()) schedule(dynamic)
    for (int64_t r = 0; r < params.rows; ++r) row(params, r);
  });
}

void cross_entropy_backward_cpu(const CrossEntropyBackward& params) {
  dispatch_dtype(params.dtype, "cross_entropy", [&](auto t) {
    const auto row = cpu_version<backward_row<decltype(t)>>();
#pragma omp parallel for num_threads(num_threads()) schedule(dynamic)
    for (int64_t r = 0; r < params.rows; ++r) row(params, r);
  });
}

}  // namespace pypkg
