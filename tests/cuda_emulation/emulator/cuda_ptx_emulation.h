// Counterparts of csrc/kernels/common/cuda_ptx.cuh, written from the PTX manual's fragment layouts.
#pragma once

#include "cuda_emulation.h"

namespace pypkg {

inline void copy_async_16(void* target, const void* source, bool valid) {
  cuda_emulation::copy_async(target, source, 16, valid ? 16 : 0);
}
inline void copy_async_4(void* target, const void* source, bool valid) {
  cuda_emulation::copy_async(target, source, 4, valid ? 4 : 0);
}
inline void copy_async_commit() { cuda_emulation::copy_async_commit(); }
inline void copy_async_wait_all() { cuda_emulation::copy_async_wait(0); }

inline int opaque(int value) { return value; }
inline float opaque_float(float value) { return value; }

inline void load_matrix_rows(const char* kind, uint32_t (&matrices)[4], const void* row,
                             bool transposed) {
  cuda_emulation::check_aligned(row, 16);
  auto slots = cuda_emulation::warp_collective(kind, row, 16, nullptr);
  const int lane = cuda_emulation::lane_index();
  for (int m = 0; m < 4; ++m) {
    for (int i = 0; i < 2; ++i) {
      int r = lane / 4, c = lane % 4 * 2 + i;
      if (transposed) std::swap(r, c);
      std::memcpy(reinterpret_cast<char*>(&matrices[m]) + 2 * i, slots[8 * m + r] + 2 * c, 2);
    }
  }
}
inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  load_matrix_rows("ldmatrix", matrices, row, false);
}
inline void load_matrices_transposed(uint32_t (&matrices)[4], const void* row) {
  load_matrix_rows("ldmatrix.trans", matrices, row, true);
}

template <typename T>
struct MmaOperands {
  T a[4][2];
  T b[2][2];
  float c[4];
};

inline float half_to_float(__half x) { return __half2float(x); }
inline float half_to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
void mma_whole_warp(unsigned char (*slots)[cuda_emulation::kSlotBytes]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < cuda_emulation::kLanes; ++lane) {
    const auto& operands = *reinterpret_cast<const MmaOperands<T>*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) {
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = half_to_float(operands.a[r][i]);
      }
      for (int r = 0; r < 2; ++r) b[2 * t + 8 * r + i][g] = half_to_float(operands.b[r][i]);
    }
  }
  for (int lane = 0; lane < cuda_emulation::kLanes; ++lane) {
    auto& operands = *reinterpret_cast<MmaOperands<T>*>(slots[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) operands.c[i] += a[row][k] * b[k][col];
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands<T> operands;
  const uint32_t b[2] = {b0, b1};
  std::memcpy(operands.a, a, sizeof(a));
  std::memcpy(operands.b, b, sizeof(b));
  std::memcpy(operands.c, c, sizeof(c));
  auto slots =
      cuda_emulation::warp_collective("mma", &operands, sizeof(operands), mma_whole_warp<T>);
  const auto* mine = reinterpret_cast<MmaOperands<T>*>(slots[cuda_emulation::lane_index()]);
  std::memcpy(c, mine->c, sizeof(c));
}

inline void add_to_memory(float* target, float term) { *target += term; }
inline int take_ticket(int* counter) { return (*counter)++; }
inline void store_release(int* target, int value) { *target = value; }
inline void wait_for_value(const int* source, int value) {
  while (*source != value) cuda_emulation::let_other_blocks_run();
}

inline float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

template <typename T>
uint32_t pack_pair(float low, float high) {
  T pair[2];
  if constexpr (std::is_same_v<T, __half>) {
    pair[0] = __float2half_rn(low);
    pair[1] = __float2half_rn(high);
  } else {
    pair[0] = __float2bfloat16_rn(low);
    pair[1] = __float2bfloat16_rn(high);
  }
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return bits;
}

}  // namespace pypkg
