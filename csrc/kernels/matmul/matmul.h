// Matrix products on a CPU whose operands are rounded to bfloat16 and whose sums are float32.
//
// The precision is that of a bfloat16 product on a GPU, but the tensors are float32. It needs the
// AVX512_BF16 instructions (AMD from Zen 4, Intel from Cooper Lake).
#pragma once

#include "common/common.h"

namespace pypkg {

// One operand: element (row, column) is at data[row * row_stride + column * column_stride], and one
// of the strides is 1.
struct MatmulOperand {
  const float* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// c = a b.
struct MatmulBFloat16 {
  MatmulOperand a;     // [m, k]
  MatmulOperand b;     // [k, n]
  float* c = nullptr;  // [m, n], contiguous
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
};

// Whether this processor has the instructions.
bool matmul_bfloat16_supported();

// Throws std::runtime_error if the processor does not have the instructions.
void matmul_bfloat16_cpu(const MatmulBFloat16& params);

}  // namespace pypkg
