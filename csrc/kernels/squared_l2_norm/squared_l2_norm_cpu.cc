#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cpu_simd.h"
#include "squared_l2_norm/squared_l2_norm.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 8192;  // elements that a thread takes at a time

struct Slice {
  const SquaredL2NormArray* array;
  int64_t begin;
  int64_t end;
};

template <class T>
PYPKG_INLINE float slice_sum(const Slice& s) {
  const T* const values = static_cast<const T*>(s.array->data);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = s.begin; i < s.end; ++i) sum += to_float(values[i]) * to_float(values[i]);
  return sum;
}

std::vector<Slice> slices(const SquaredL2Norm& p) {
  std::vector<Slice> all;
  for (int64_t i = 0; i < p.count; ++i) {
    for (int64_t begin = 0; begin < p.arrays[i].numel; begin += kChunk) {
      all.push_back({&p.arrays[i], begin, std::min(begin + kChunk, p.arrays[i].numel)});
    }
  }
  return all;
}

}  // namespace

void squared_l2_norm_cpu(const SquaredL2Norm& params) {
  const std::vector<Slice> all = slices(params);
  const int64_t count = static_cast<int64_t>(all.size());
  std::vector<float> sums(count);
  dispatch_dtype(params.dtype, "squared_l2_norm", [&](auto element) {
    const auto run = cpu_version<slice_sum<decltype(element)>>();
#pragma omp parallel for num_threads(num_threads()) schedule(static)
    for (int64_t i = 0; i < count; ++i) sums[i] = run(all[i]);
  });
  *params.out = static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace pypkg
