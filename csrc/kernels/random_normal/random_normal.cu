#include "common/cuda_vector.cuh"
#include "random_normal/random_normal_values.h"

namespace pypkg {
namespace {

constexpr int kThreads = 256;

// A thread computes the four elements of a counter. They are 16 elements apart, so that half a warp
// writes 16 consecutive elements at a time. Grid y covers rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) random_normal_kernel(RandomNormal p) {
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t first = p.first + row * p.index_stride;
    T* const out = static_cast<T*>(p.out) + row * p.out_stride;
    const int64_t first_counter = first / kBlockElements * kCountersOfBlock;
    const int64_t end = ceil_div(first + p.cols, int64_t{kBlockElements}) * kCountersOfBlock;
    const int64_t step = gridDim.x * int64_t{kThreads};
    for (int64_t counter = first_counter + blockIdx.x * int64_t{kThreads} + threadIdx.x;
         counter < end; counter += step) {
      uint32_t words[kWords];
      philox(counter, p.stream, p.key, words);
      const NormalPair low = normal_pair(words[0], words[1]);
      const NormalPair high = normal_pair(words[2], words[3]);
      const float values[kWords] = {low.first, low.second, high.first, high.second};
      const int64_t at =
          counter / kCountersOfBlock * kBlockElements + counter % kCountersOfBlock - first;
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int64_t column = at + i * kCountersOfBlock;
        if (column >= 0 && column < p.cols) {
          out[column] = from_float<T>(product(values[i], p.deviation));
        }
      }
    }
  }
}

}  // namespace

void random_normal_cuda(const RandomNormal& params, Stream stream) {
  const RandomNormal p = with_long_rows(params);
  if (p.rows == 0 || p.cols == 0) return;
  constexpr int64_t kMaxGridRows = 65535;  // the hardware's limit for y
  const int64_t counters = (p.cols / kBlockElements + 2) * kCountersOfBlock;
  const dim3 grid(std::min(ceil_div(counters, int64_t{kThreads}), kMaxGridBlocks),
                  std::min({p.rows, kMaxGridRows, kMaxGridBlocks}));
  const LaunchSite site{"random_normal", {p.rows, p.cols}};
  dispatch_dtype(p.dtype, [&](auto tag) {
    launch(site, random_normal_kernel<typename decltype(tag)::type>, grid, dim3(kThreads), 0,
           stream, p);
  });
}

}  // namespace pypkg
