// Counter-based normal random numbers: any part of a stream, in any order and on any device.
//
//   out[r][c] = deviation * z(first + r * index_stride + c),   r < rows, c < cols
//
// z(i) depends only on i, key and stream: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers:
// As Easy as 1, 2, 3", 2011) and the transform of Box and Muller (1958), in float32. |z| <= 6.661,
// because a radius has 31 random bits; one normal number of 4 x 10^10 is larger. All devices,
// instruction sets and numbers of threads give the same bits (random_normal_values.h).
#pragma once

#include "common/common.h"

namespace pypkg {

struct RandomNormal {
  void* out = nullptr;  // [rows, cols], rows out_stride elements apart; overwritten
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t out_stride = 0;
  int64_t first = 0;         // index of out[0][0]
  int64_t index_stride = 0;  // from the index of a row's first element to that of the next
  uint64_t key = 0;          // streams of different keys, or of one key, are independent
  uint64_t stream = 0;
  float deviation = 1.0f;
  DType dtype = DType::kFloat32;  // z is multiplied in float32, then rounded
};

void random_normal_cpu(const RandomNormal& params);
void random_normal_cuda(const RandomNormal& params, Stream stream);

}  // namespace pypkg
