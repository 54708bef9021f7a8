// Elements in memory, float32 in arithmetic; 16 bytes per access where alignment allows.
#pragma once

#include "common/cuda_launch.cuh"

namespace pypkg {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVectorSize = kVectorBytes / sizeof(T);

// N neighbouring elements, moved in 16-byte pieces when they fill such pieces (the address must
// then be a multiple of 16), one by one otherwise.
template <typename T, int N>
struct Pack {
  static constexpr int kSize = N;
  static constexpr bool kWide = N * sizeof(T) % kVectorBytes == 0;
  alignas(kWide ? kVectorBytes : sizeof(T)) T values[N];

  __device__ __forceinline__ static Pack load(const T* source) {
    Pack pack;
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < N; i += kVectorSize<T>) {
        *reinterpret_cast<uint4*>(pack.values + i) = *reinterpret_cast<const uint4*>(source + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) pack.values[i] = source[i];
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* target) const {
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < N; i += kVectorSize<T>) {
        *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(values + i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) target[i] = values[i];
    }
  }

  __device__ __forceinline__ float operator[](int i) const { return to_float(values[i]); }
  __device__ __forceinline__ void set(int i, float x) { values[i] = from_float<T>(x); }
};

// Whether every pointer (null ones aside) can be accessed 16 bytes at a time.
inline bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % kVectorBytes != 0) return false;
  }
  return true;
}

// Calls f(TypeTag<Pack<T, n>>{}, column) so that together the threads of a block cover
// [0, cols) once: full vectors from the first aligned address of the row, single elements before
// and after; single elements only if `scalar`.
template <typename T, typename F>
__device__ __forceinline__ void for_each_pack(const T* row, int64_t cols, bool scalar, F&& f) {
  constexpr int kSize = kVectorSize<T>;
  const int64_t past_boundary = reinterpret_cast<uintptr_t>(row) % kVectorBytes / sizeof(T);
  int64_t head = past_boundary == 0 ? 0 : kSize - past_boundary;
  if (scalar || head > cols) head = cols;
  const int64_t tail = head + (cols - head) / kSize * kSize;
  for (int64_t col = threadIdx.x; col < head; col += blockDim.x) f(TypeTag<Pack<T, 1>>{}, col);
#pragma unroll 4
  for (int64_t col = head + threadIdx.x * kSize; col < tail; col += blockDim.x * kSize) {
    f(TypeTag<Pack<T, kSize>>{}, col);
  }
  for (int64_t col = tail + threadIdx.x; col < cols; col += blockDim.x) {
    f(TypeTag<Pack<T, 1>>{}, col);
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, lane_mask);
  }
  return value;
}

}  // namespace pypkg
