// The sum of the squares of all elements of many arrays, on a CPU.
//
// Runs of consecutive elements are summed in float32, and the sums of the runs in float64. The
// order only depends on the sizes, so all numbers of threads and instruction sets give the same
// bits.
#pragma once

#include "common/common.h"

namespace pypkg {

struct SquaredL2NormArray {
  const void* data = nullptr;
  int64_t numel = 0;
};

struct SquaredL2Norm {
  const SquaredL2NormArray* arrays = nullptr;  // [count]
  int64_t count = 0;
  DType dtype = DType::kFloat32;  // float32 or bfloat16, of all arrays
  float* out = nullptr;           // one float; overwritten
};

void squared_l2_norm_cpu(const SquaredL2Norm& params);

}  // namespace pypkg
