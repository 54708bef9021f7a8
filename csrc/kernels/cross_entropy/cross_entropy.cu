#include "common/cuda_vector.cuh"
#include "cross_entropy/cross_entropy.h"

namespace pypkg {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr float kLog2E = 1.4426950408889634f;

// max and sum(exp(x - max)) of the values seen; max = -inf and sum = 0 before the first.
struct MaxAndSum {
  float max = -INFINITY;
  float sum = 0;

  // The value that is subtracted in exponents. It is finite, because -inf - (-inf) would be NaN.
  __device__ static float finite(float max) { return max == -INFINITY ? 0.0f : max; }

  __device__ void rescale(float new_max) {
    sum *= exp2f((max - finite(new_max)) * kLog2E);
    max = new_max;
  }

  __device__ void merge(MaxAndSum other) {
    const float new_max = fmaxf(max, other.max);
    rescale(new_max);
    other.rescale(new_max);
    sum += other.sum;
  }
};

__device__ MaxAndSum warp_merge(MaxAndSum state) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
    MaxAndSum other;
    other.max = __shfl_xor_sync(kFullWarp, state.max, lane_mask);
    other.sum = __shfl_xor_sync(kFullWarp, state.sum, lane_mask);
    state.merge(other);
  }
  return state;
}

// Two sets, used in turn for successive rows, so that one barrier per row is enough.
struct ForwardStorage {
  MaxAndSum of_warp[2][kWarps];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(CrossEntropyForward p) {
  ForwardStorage& storage = dynamic_shared<ForwardStorage>();
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.cols;
    MaxAndSum state;
    for_each_pack(logits, p.cols, false, [&](auto tag, int64_t col) {
      using P = typename decltype(tag)::type;
      const auto x = P::load(logits + col);
      float max = state.max;
#pragma unroll
      for (int i = 0; i < P::kSize; ++i) max = fmaxf(max, x[i]);
      state.rescale(max);
#pragma unroll
      for (int i = 0; i < P::kSize; ++i) {
        state.sum += exp2f((x[i] - MaxAndSum::finite(max)) * kLog2E);
      }
    });
    state = warp_merge(state);
    if (threadIdx.x % kWarpSize == 0) storage.of_warp[turn][threadIdx.x / kWarpSize] = state;
    __syncthreads();
    if (threadIdx.x >= kWarpSize) continue;
    state = warp_merge(threadIdx.x < kWarps ? storage.of_warp[turn][threadIdx.x] : MaxAndSum());
    if (threadIdx.x != 0) continue;

    const int64_t label = p.labels[row];
    const bool ignored = label == p.ignore_index;
    const int64_t col = label - p.vocab_start;
    const bool here = !ignored && col >= 0 && col < p.cols;
    const float target = here ? to_float(logits[col]) : 0.0f;
    if (!ignored && (label < 0 || label >= p.vocab_size)) state.sum = NAN;
    const float lse = state.max + logf(state.sum);
    if (p.row_max) p.row_max[row] = state.max;
    if (p.row_sum) p.row_sum[row] = state.sum;
    if (p.target) p.target[row] = target;
    if (p.lse) p.lse[row] = lse;
    if (p.loss) p.loss[row] = ignored ? 0.0f : lse - target;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(CrossEntropyBackward p, bool scalar) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.cols;
    T* dlogits = static_cast<T*>(p.dlogits) + row * p.cols;
    const bool ignored = p.labels[row] == p.ignore_index;
    const int64_t label = p.labels[row] - p.vocab_start;
    const float lse = p.lse[row], dloss = p.dloss[row];
    for_each_pack(logits, p.cols, scalar, [&](auto tag, int64_t col) {
      using P = typename decltype(tag)::type;
      P x = {};
      if (!ignored) {
        x = P::load(logits + col);
#pragma unroll
        for (int i = 0; i < P::kSize; ++i) {
          const float probability = exp2f((x[i] - lse) * kLog2E);
          x.set(i, (probability - (col + i == label ? 1.0f : 0.0f)) * dloss);
        }
      }
      x.store(dlogits + col);
    });
  }
}

dim3 row_grid(int64_t rows) { return dim3(std::min<int64_t>(rows, kMaxGridBlocks)); }

}  // namespace

void cross_entropy_forward_cuda(const CrossEntropyForward& p, Stream stream) {
  if (p.rows == 0) return;
  const LaunchSite site{"cross_entropy_forward", {p.rows, p.cols}};
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch(site, forward_kernel<typename decltype(tag)::type>, row_grid(p.rows), dim3(kThreads),
           sizeof(ForwardStorage), stream, p);
  });
}

void cross_entropy_backward_cuda(const CrossEntropyBackward& p, Stream stream) {
  if (p.rows == 0) return;
  const LaunchSite site{"cross_entropy_backward", {p.rows, p.cols}};
  // Vector accesses need rows of both matrices with the same offset from a 16-byte boundary.
  const bool scalar =
      (reinterpret_cast<uintptr_t>(p.logits) - reinterpret_cast<uintptr_t>(p.dlogits)) %
          kVectorBytes !=
      0;
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch(site, backward_kernel<typename decltype(tag)::type>, row_grid(p.rows), dim3(kThreads), 0,
           stream, p, scalar);
  });
}

}  // namespace pypkg
