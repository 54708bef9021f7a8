#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cpu_simd.h"
#include "squared_l2_norm/squared_l2_norm.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 8192;  // elements that a thread takes at a time
constexpr int64_t kRun = 1024;    // elements summed in float32, whose sum is added to a float64
constexpr int64_t kLanes = 16;    // partial sums of a run, for every width of registers

struct Slice {
  const SquaredL2NormArray* array;
  int64_t begin;
  int64_t end;
};

template <class T>
PYPKG_INLINE double run_sum(const T* values, int64_t count) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j)
      lanes[j] += to_float(values[i + j]) * to_float(values[i + j]);
  }
  for (int64_t j = 0; i < count; ++i, ++j) lanes[j] += to_float(values[i]) * to_float(values[i]);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

template <class T>
PYPKG_INLINE double slice_sum(const Slice& s) {
  const T* const values = static_cast<const T*>(s.array->data);
  double sum = 0.0;
  for (int64_t i = s.begin; i < s.end; i += kRun) {
    sum += run_sum(values + i, std::min(kRun, s.end - i));
  }
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
  std::vector<double> sums(count);
  dispatch_dtype(params.dtype, "squared_l2_norm", [&](auto element) {
    const auto run = cpu_version<slice_sum<decltype(element)>>();
#pragma omp parallel for num_threads(num_threads()) schedule(static)
    for (int64_t i = 0; i < count; ++i) sums[i] = run(all[i]);
  });
  *params.out = static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0));
}

}  // namespace pypkg
