// Tensor maps for bulk tensor copies, made by the driver. Its function is looked up when it is
// needed, so that the library does not link libcuda and loads on machines without a driver.
#pragma once

#include <cuda.h>

#include "common/cuda_launch.cuh"

namespace pypkg {

using TensorMap = CUtensorMap;

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  check_cuda(error, "cudaGetDriverEntryPoint");
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: 12.0 or newer has it");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// A tensor of 16-bit elements; the innermost dimension comes first and its elements are
// neighbours, strides [bytes] are of the others. Boxes are copied with a 128-byte swizzle, zeros
// where they reach beyond the tensor.
inline TensorMap make_tensor_map(DType dtype, const void* tensor, const uint64_t (&dims)[4],
                                 const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
  static const auto encode = tensor_map_encoder();
  const uint32_t element_strides[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(tensor), dims, strides, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(result));
  }
  return map;
}

}  // namespace pypkg
