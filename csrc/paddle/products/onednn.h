// Matrix products by the oneDNN library that Paddle has loaded.
#pragma once

#include <cstdint>

namespace pypkg {

// A float32 matrix: element (row, column) is at data[row * row_stride + column * column_stride],
// and one of the strides is 1.
struct MatmulOperand {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// c = a b with c [a.rows, b.columns], contiguous and overwritten. The elements of a and b are
// rounded to bfloat16 (to nearest, ties to even), and their products are summed in float32.
//
// This is what a product of bfloat16 tensors is on a GPU, for tensors that stay float32. oneDNN
// computes it with AMX_BF16 or AVX512_BF16 instructions; without either it would not round.
// Throws std::runtime_error if Paddle brings no oneDNN, or if oneDNN fails.
void onednn_matmul_bfloat16(const MatmulOperand& a, const MatmulOperand& b, float* c);

}  // namespace pypkg
