// Counterparts of csrc/kernels/common/cuda_hopper_ptx.cuh and cuda_tensor_map.cuh, written from the
// PTX manual. Copies land, and products are computed, as late as the waits allow; until then their
// targets hold NaN. What a kernel gets wrong shows as a failure, a deadlock or a wrong result.
#pragma once

#include "common/common.h"
#include "cuda_ptx_emulation.h"

namespace cuda_emulation {

// Of a product [64, 16] x [16, columns].
struct WgmmaOperation {
  float* d;                     // this lane's columns / 8 x 4 elements
  const uint32_t* a_registers;  // null: a is in shared memory
  uint64_t a, b;                // descriptors
  int columns;
  bool a_transposed;  // rows of a, not its columns of 16, are neighbours in memory
  bool b_transposed;  // columns of b, not its rows of 16, are neighbours in memory
  bool accumulate;
  float (*to_float)(uint16_t bits);
};

uint32_t shared_offset(const void* pointer);
void mbarrier_init(void* barrier, int count);
void mbarrier_arrive(void* barrier, int bytes_announced);
void mbarrier_wait(void* barrier, uint32_t parity);
void named_barrier(int id, int threads, bool wait);
void store_matrices(void* row, const uint32_t (&matrices)[4]);
void fence_proxy_async();
void start_wgmma(const WgmmaOperation& operation);
void fence_wgmma();
void commit_wgmma();
void wait_wgmma(int groups_in_flight);

}  // namespace cuda_emulation

namespace pypkg {

struct TensorMap {
  const unsigned char* tensor;
  uint64_t dims[4], strides[4];  // strides in bytes
  uint32_t box[4];
};

TensorMap make_tensor_map(DType dtype, const void* tensor, const uint64_t (&dims)[4],
                          const uint64_t (&strides)[3], const uint32_t (&box)[4]);

struct Mbarrier {
  uint64_t state;
};

inline uint32_t shared_address(const void* pointer) {
  return cuda_emulation::shared_offset(pointer);
}
inline void mbarrier_init(Mbarrier& barrier, int count) {
  cuda_emulation::mbarrier_init(&barrier, count);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(Mbarrier& barrier) { cuda_emulation::mbarrier_arrive(&barrier, 0); }
inline void mbarrier_arrive_expect(Mbarrier& barrier, int bytes) {
  cuda_emulation::mbarrier_arrive(&barrier, bytes);
}
inline void mbarrier_wait(Mbarrier& barrier, uint32_t parity) {
  cuda_emulation::mbarrier_wait(&barrier, parity);
}
void copy_tensor_box(void* target, const TensorMap& map, Mbarrier& barrier, int c0, int c1, int c2,
                     int c3);
inline void store_matrices(void* row, const uint32_t (&matrices)[4]) {
  cuda_emulation::store_matrices(row, matrices);
}
inline void add_to_memory(float* target, const float (&terms)[4]) {
  cuda_emulation::check_aligned(target, 16);
  for (int i = 0; i < 4; ++i) target[i] += terms[i];
}
inline void fence_proxy_async() { cuda_emulation::fence_proxy_async(); }
inline void named_barrier_sync(int id, int threads) {
  cuda_emulation::named_barrier(id, threads, true);
}
inline void named_barrier_arrive(int id, int threads) {
  cuda_emulation::named_barrier(id, threads, false);
}

template <int kRegisters>
void give_up_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void wgmma_fence() { cuda_emulation::fence_wgmma(); }
inline void wgmma_commit() { cuda_emulation::commit_wgmma(); }
template <int kInFlight>
void wgmma_wait() {
  cuda_emulation::wait_wgmma(kInFlight);
}
template <typename T, int kCount>
void wgmma_finished(T (&)[kCount][4]) {}

template <typename T>
float bits_to_float(uint16_t bits) {
  return half_to_float(T{bits});
}
template <typename T, int kColTiles>
void wgmma_transposed(float (&d)[kColTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  cuda_emulation::start_wgmma(
      {d[0], nullptr, a, b, 8 * kColTiles, false, false, accumulate, bits_to_float<T>});
}
template <typename T, int kColTiles>
void wgmma(float (&d)[kColTiles][4], const uint32_t (&a)[4], uint64_t b) {
  cuda_emulation::start_wgmma({d[0], a, 0, b, 8 * kColTiles, false, true, true, bits_to_float<T>});
}
template <typename T>
void wgmma_left_transposed(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  cuda_emulation::start_wgmma({d[0], nullptr, a, b, 64, true, true, accumulate, bits_to_float<T>});
}

}  // namespace pypkg
