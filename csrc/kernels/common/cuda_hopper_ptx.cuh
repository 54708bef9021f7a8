// Instructions of sm_90a that CUDA C++ has no name for, each behind one function: mbarrier, bulk
// tensor copies (TMA), wgmma, named barriers and setmaxnreg.
//
// Operands of wgmma in shared memory are made of boxes of 128-byte rows (64 elements of 16 bits) as
// a tensor map with a 128-byte swizzle writes them; a box starts at a multiple of 1024 bytes.
#pragma once

#include "common/cuda_ptx.cuh"

// Kernels of this file's users have a body only where this is defined.
#if defined(PYPKG_CUDA_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYPKG_SM90A_INSTRUCTIONS
#endif

#ifdef PYPKG_CUDA_EMULATION
#include "cuda_hopper_emulation.h"
#else

#include "common/cuda_tensor_map.cuh"

namespace pypkg {

// --- mbarrier -----------------------------------------------------------------------------------
// A phase is complete when `count` arrivals and all bytes that were announced have come.
struct Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)),
               "r"(count)
               : "memory");
}

// Makes barriers that this thread initialised known to the copy engine; a block barrier follows.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;\n" ::
          : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier))
               : "memory");
}

// Arrives, and announces bytes that copies of the same phase will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of that parity is complete: 0 for the first, 1 for the second and, on a
// fresh barrier, for the one before the first, which counts as complete.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// --- bulk tensor copies -------------------------------------------------------------------------
// Starts the copy of the box at these coordinates (elements, the innermost dimension first), which
// one thread does for all; zeros for what lies outside the tensor.
__device__ __forceinline__ void copy_tensor_box(void* target, const TensorMap& map,
                                                Mbarrier& barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Adds to four neighbours in device memory, at a multiple of 16 bytes. As the one for sm_80, it
// reads nothing back.
__device__ __forceinline__ void add_to_memory(float* target, const float (&terms)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(target), "f"(terms[0]),
               "f"(terms[1]), "f"(terms[2]), "f"(terms[3])
               : "memory");
}

// Stores four 8x8 matrices of 16-bit elements: the reverse of load_matrices.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                   shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

// Orders this thread's ordinary accesses to shared memory before the copies and products that are
// started after a barrier.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// --- groups of warps ----------------------------------------------------------------------------
// Barriers 1 to 15; `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Registers per thread from here on, for all warps of a group of four.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// --- wgmma --------------------------------------------------------------------------------------
// Orders earlier accesses to accumulators and operands in registers before the next products.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most kInFlight of the committed groups are not finished.
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kInFlight) : "memory");
}

// To be called after the wait on the registers of a finished product: the compiler does not know
// that it wrote or read them until then.
template <int kCount>
__device__ __forceinline__ void wgmma_finished(float (&registers)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(registers[n][c])::"memory");
  }
}
template <int kCount>
__device__ __forceinline__ void wgmma_finished(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+r"(registers[n][c])::"memory");
  }
}

#define PYPKG_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PYPKG_D4(n) PYPKG_D1(n), PYPKG_D1(n + 1), PYPKG_D1(n + 2), PYPKG_D1(n + 3)
#define PYPKG_D8 PYPKG_D4(0), PYPKG_D4(4)
#define PYPKG_D16 PYPKG_D8, PYPKG_D4(8), PYPKG_D4(12)
#define PYPKG_0_TO_31                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYPKG_0_TO_63                                                                  \
  PYPKG_0_TO_31                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PYPKG_WGMMA_SHARED_128(type)                                                  \
  asm volatile(                                                                       \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" PYPKG_0_TO_63 \
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n}\n"                                     \
      : PYPKG_D16                                                                     \
      : "l"(a), "l"(b), "r"(int(accumulate)))
#define PYPKG_WGMMA_SHARED_64(type)                                                  \
  asm volatile(                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" PYPKG_0_TO_31 \
      "}, %32, %33, accumulate, 1, 1, 0, 0;\n}\n"                                    \
      : PYPKG_D8                                                                     \
      : "l"(a), "l"(b), "r"(int(accumulate)))
#define PYPKG_WGMMA_REGISTERS_128(type)                                               \
  asm volatile(                                                                       \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %69, 0;\n"                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" PYPKG_0_TO_63 \
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 1;\n}\n"                       \
      : PYPKG_D16                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))
#define PYPKG_WGMMA_REGISTERS_64(type)                                               \
  asm volatile(                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %37, 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" PYPKG_0_TO_31 \
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 1;\n}\n"                      \
      : PYPKG_D8                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1))

#define PYPKG_WGMMA_LEFT_TRANSPOSED_64(type)                                         \
  asm volatile(                                                                      \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" PYPKG_0_TO_31 \
      "}, %32, %33, accumulate, 1, 1, 1, 1;\n}\n"                                    \
      : PYPKG_D8                                                                     \
      : "l"(a), "l"(b), "r"(int(accumulate)))

#define PYPKG_FOR_TYPE_AND_WIDTH(instruction)                                   \
  static_assert(kColTiles == 8 || kColTiles == 16);                             \
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>); \
  if constexpr (std::is_same_v<T, __half> && kColTiles == 16) {                 \
    instruction##_128("f16");                                                   \
  } else if constexpr (std::is_same_v<T, __half>) {                             \
    instruction##_64("f16");                                                    \
  } else if constexpr (kColTiles == 16) {                                       \
    instruction##_128("bf16");                                                  \
  } else {                                                                      \
    instruction##_64("bf16");                                                   \
  }

// Starts d = a b^T, added to d if `accumulate`: d [64, 8 kColTiles] in float32, a [64, 16] and
// b [8 kColTiles, 16] in T. Warp w of the group of four holds rows 16 w to 16 w + 15 of d in the
// layout of mma_m16n8k16.
template <typename T, int kColTiles>
__device__ __forceinline__ void wgmma_transposed(float (&d)[kColTiles][4], uint64_t a, uint64_t b,
                                                 bool accumulate) {
  PYPKG_FOR_TYPE_AND_WIDTH(PYPKG_WGMMA_SHARED);
}

// Starts d += a b: d [64, 8 kColTiles] in float32, b [16, 8 kColTiles] in T; the warp's rows of
// a [64, 16] are in registers, in the layout of mma_m16n8k16.
template <typename T, int kColTiles>
__device__ __forceinline__ void wgmma(float (&d)[kColTiles][4], const uint32_t (&a)[4],
                                      uint64_t b) {
  PYPKG_FOR_TYPE_AND_WIDTH(PYPKG_WGMMA_REGISTERS);
}

// Starts d = a^T b, added to d if `accumulate`: d [64, 64] in float32, a [16, 64] and b [16, 64] in
// T.
template <typename T>
__device__ __forceinline__ void wgmma_left_transposed(float (&d)[8][4], uint64_t a, uint64_t b,
                                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    PYPKG_WGMMA_LEFT_TRANSPOSED_64("f16");
  } else {
    PYPKG_WGMMA_LEFT_TRANSPOSED_64("bf16");
  }
}

#undef PYPKG_FOR_TYPE_AND_WIDTH
#undef PYPKG_WGMMA_SHARED_128
#undef PYPKG_WGMMA_SHARED_64
#undef PYPKG_WGMMA_REGISTERS_128
#undef PYPKG_WGMMA_REGISTERS_64
#undef PYPKG_WGMMA_LEFT_TRANSPOSED_64
#undef PYPKG_D1
#undef PYPKG_D4
#undef PYPKG_D8
#undef PYPKG_D16
#undef PYPKG_0_TO_31
#undef PYPKG_0_TO_63

}  // namespace pypkg

#endif

namespace pypkg {

constexpr int kBoxRowBytes = 128;  // of a row of a box
constexpr int kSwizzleAtomBytes = 8 * kBoxRowBytes;

// Descriptor of an operand whose first row is at `start`. Eight rows further is one atom further.
// Where rows are the inner dimension of the product (a transposed operand), the columns from 64 on
// are in another box, `box_bytes` further; otherwise an instruction stays inside one box.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* start, int box_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto encode = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return kSwizzle128 | encode(kSwizzleAtomBytes) << 32 | encode(box_bytes) << 16 |
         encode(shared_address(start));
}

}  // namespace pypkg
