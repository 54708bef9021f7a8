// Helpers for CUDA kernels: checked launches, properties of the device, dtype dispatch.
//
// All shared memory is dynamic, and PTX is only in cuda_ptx.cuh. The sources therefore also compile
// as plain C++ against an emulation of the CUDA features in use, which tests them without a GPU.
#pragma once

#ifdef PYPKG_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <initializer_list>
#include <string>

#include "common/common.h"

namespace pypkg {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
constexpr __host__ __device__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// The operation and its shape, for error messages.
struct LaunchSite {
  static constexpr int kMaxRank = 6;
  const char* operation;
  int rank;
  int64_t shape[kMaxRank];

  template <int kRank>
  LaunchSite(const char* name, const int64_t (&dims)[kRank]) : operation(name), rank(kRank) {
    static_assert(kRank <= kMaxRank);
    std::copy_n(dims, kRank, shape);
  }

  std::string text() const {
    std::string dims;
    for (int i = 0; i < rank; ++i) dims += (i ? ", " : "") + std::to_string(shape[i]);
    return std::string(operation) + " on shape [" + dims + "]";
  }
};

#ifndef PYPKG_CUDA_EMULATION

// Limit of the blocks of a grid-stride loop over rows; the hardware's limit is 2^31 - 1.
constexpr int64_t kMaxGridBlocks = 1 << 30;

inline void check_cuda(cudaError_t error, const std::string& where) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("CUDA error in " + where + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Bytes that a block may have.
inline int shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// 80 for compute capability 8.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Launches a kernel and throws on a launch error. It does not wait for the kernel.
template <typename... Params, typename... Args>
void launch(const LaunchSite& site, void (*kernel)(Params...), dim3 grid, dim3 block,
            size_t shared_bytes, Stream stream, const Args&... args) {
  constexpr size_t kDefaultLimit = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultLimit) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) check_cuda(error, site.text());
}

template <typename Storage>
__device__ Storage& dynamic_shared() {
  static_assert(alignof(Storage) <= 1024);
  extern __shared__ __align__(1024) unsigned char raw_storage[];
  return *reinterpret_cast<Storage*>(raw_storage);
}

#endif

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}) with the element type behind a DType.
template <typename F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(TypeTag<float>{});
    case DType::kFloat16: return f(TypeTag<__half>{});
    case DType::kBFloat16: return f(TypeTag<__nv_bfloat16>{});
  }
}

}  // namespace pypkg
