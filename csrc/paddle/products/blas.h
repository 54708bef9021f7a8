// Matrix products by the BLAS library that Paddle has loaded (MKL), for what Paddle's own operators
// do not offer.
#pragma once

#include "products/onednn.h"

namespace pypkg {

// c += a b in float32, with c [a.rows, b.columns], contiguous. Throws std::runtime_error if Paddle
// brings no such library, or if a size exceeds its 32 bits.
void blas_add_matmul(const MatmulOperand& a, const MatmulOperand& b, float* c);

}  // namespace pypkg
