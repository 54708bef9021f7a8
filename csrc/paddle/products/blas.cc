#include "products/blas.h"

#include <dlfcn.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace pypkg {
namespace {

// The part of the C interface of BLAS that is used below.
constexpr const char* kLibrary = "libmklml_intel.so";
constexpr int kRowMajor = 101, kStraight = 111, kTransposed = 112;
using Sgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                       float alpha, const float* a, int stride_a, const float* b, int stride_b,
                       float beta, float* c, int stride_c);

// It is not linked, so that Paddle with another BLAS can be used.
Sgemm sgemm() {
  static void* const library = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD);
  static void* const found = library ? dlsym(library, "cblas_sgemm") : nullptr;
  if (!found) {
    throw std::runtime_error(std::string("cblas_sgemm is missing: Paddle has not loaded ") +
                             kLibrary);
  }
  return reinterpret_cast<Sgemm>(found);
}

int narrow(int64_t size) {
  if (size > std::numeric_limits<int>::max()) {
    throw std::runtime_error("a matrix size of " + std::to_string(size) + " exceeds 32 bits");
  }
  return static_cast<int>(size);
}

bool is_transposed(const MatmulOperand& matrix) { return matrix.column_stride != 1; }

int transposition(const MatmulOperand& matrix) {
  return is_transposed(matrix) ? kTransposed : kStraight;
}

// The distance of rows in memory. Of a single row it may be less than the row, which BLAS refuses.
int stride(const MatmulOperand& matrix) {
  if (is_transposed(matrix)) return narrow(matrix.column_stride);
  return narrow(std::max(matrix.row_stride, matrix.columns));
}

}  // namespace

void blas_add_matmul(const MatmulOperand& a, const MatmulOperand& b, float* c) {
  sgemm()(kRowMajor, transposition(a), transposition(b), narrow(a.rows), narrow(b.columns),
          narrow(a.columns), 1.0f, a.data, stride(a), b.data, stride(b), 1.0f, c,
          narrow(b.columns));
}

}  // namespace pypkg
