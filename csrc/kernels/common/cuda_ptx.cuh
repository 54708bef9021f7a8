// Instructions that CUDA C++ has no name for, sm_80 and newer, each behind one function.
#pragma once

#include "common/cuda_launch.cuh"

#ifdef PYPKG_CUDA_EMULATION
#include "cuda_ptx_emulation.h"
#else

namespace pypkg {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes from device to shared memory; zeros instead if !valid (the source is
// then not read).
__device__ __forceinline__ void copy_async_16(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(void* target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes the group of copies this thread started since the last call.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until all of this thread's groups have landed.
__device__ __forceinline__ void copy_async_wait_all() {
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
}

// Returns the value, but hides it from the compiler. Results computed from it are then not moved
// out of a loop, where they would occupy registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ float opaque_float(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix
// l / 8 and receives of each matrix the elements (row l / 4, columns 2 (l % 4) and + 1).
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b, c [16, 8] in float32, a [16, 16] and b [16, 8] in T. With g = lane / 4, t = lane % 4:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the next column
//   b: (2t, g), (2t + 8, g), each with the next row
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Adds to device memory. Reads nothing back, so the thread does not wait.
__device__ __forceinline__ void add_to_memory(float* target, float term) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(target), "f"(term) : "memory");
}

// Increments the counter; returns its value before.
__device__ __forceinline__ int take_ticket(int* counter) { return atomicAdd(counter, 1); }

// Release store. Earlier writes of this thread, and of threads synchronised with it by a barrier,
// are visible to a thread of any block after wait_for_value, and to threads that synchronise with
// that thread by a barrier.
__device__ __forceinline__ void store_release(int* target, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;\n" ::"l"(target), "r"(value) : "memory");
}

__device__ __forceinline__ void wait_for_value(const int* source, int value) {
  int found;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(found) : "l"(source) : "memory");
  } while (found != value);
}

// 2^x to about 22 bits; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

}  // namespace pypkg

#endif
