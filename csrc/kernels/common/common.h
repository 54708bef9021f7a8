// Types shared by every kernel. No framework header may be included below csrc/kernels.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// Marks functions that host and device share.
#if defined(__CUDACC__)
#define PYPKG_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PYPKG_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PYPKG_HOST_DEVICE inline
#endif

namespace pypkg {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A cudaStream_t, kept opaque so that CPU-only code needs no CUDA header.
using Stream = void*;

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
  }
  return "unknown";
}

inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Threads used by the CPU kernels. 0 restores the default: PYPKG_NUM_THREADS if set, else OpenMP's
// number when this library was loaded (frameworks change OMP_NUM_THREADS afterwards).
void set_num_threads(int count);
int num_threads();
// num_threads(), or 1 if there are so few elements that waking a thread takes longer than the work.
int threads_for(int64_t elements);

}  // namespace pypkg
