// Products of a few rows with a matrix on a CPU, in float32.
//
// They read each weight once for a few operations, so memory bounds them; libraries of matrix
// products are made for many rows.
#pragma once

#include "common/common.h"

namespace pypkg {

// c = a b for each of `batch` pairs of matrices. Each element of c is summed in an order that
// depends on k alone: a row has the same bits beside other rows, and with any number of threads.
struct MatmulFewRows {
  const float* a = nullptr;  // [batch, m, k], contiguous
  const float* b = nullptr;  // [batch, k, n], or [batch, n, k] with transpose_b; contiguous
  float* c = nullptr;        // [batch, m, n], contiguous; overwritten
  int64_t batch = 1;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool transpose_b = false;
};

void matmul_few_rows_cpu(const MatmulFewRows& params);

// The columns [first, stop) of c alone, on this thread, for a batch of one. They have the bits that
// they have in the whole product.
void matmul_few_rows_columns_cpu(const MatmulFewRows& params, int64_t first, int64_t stop);

}  // namespace pypkg
