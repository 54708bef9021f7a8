// Runs CUDA kernels on the CPU, to test their logic where there is no GPU.
//
// The .cu files are compiled as C++ with -DPYPKG_CUDA_EMULATION. Every CUDA thread of a block is a
// fiber. One to three blocks run at a time, each until all its fibers have returned. Barriers and
// warp collectives switch fibers, and the next fiber is picked at random, so that an order that a
// missing barrier leaves open is taken sooner or later. Shared memory and the targets of copies in
// flight are filled with NaN, and shared memory ends at an inaccessible page. Not modelled: time,
// memory ordering (between blocks, and inside a warp between collectives), proxies.
#pragma once

#include <any>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_emulation {

struct ThreadContext {
  dim3 thread_idx, block_idx, block_dim, grid_dim;
};
extern ThreadContext* current_thread;

void launch_blocks(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& thread_body);
// Restarts the sequence of random scheduling decisions.
void seed(uint32_t value);
// Operation and shape of each kernel that was launched since the last call.
std::vector<std::string> take_launches();
// Bytes of shared memory that a block may have, but for the kernels of Hopper. 163 KiB, as on 8.0,
// until it is set.
void set_shared_memory_limit(size_t bytes);
size_t shared_memory_limit();
void block_barrier();
void* shared_memory();
[[noreturn]] void fail(const std::string& message);
void check_aligned(const void* pointer, size_t bytes);

// For what else a block has: waiting until somebody notifies, events that happen some time later,
// and state of the block.
int thread_index();
void wait_on(const void* channel);
void let_other_blocks_run();
void notify(const void* channel);
void defer(std::function<void()> event);
std::any& block_extension();

constexpr int kLanes = 32;
constexpr size_t kSlotBytes = 64;
using Finish = void (*)(unsigned char (*slots)[kSlotBytes]);

// Waits for all lanes of the warp to come to the same collective, runs `finish` once on what they
// brought, and returns the slots, valid until the lane's next collective.
unsigned char (*warp_collective(const char* kind, const void* mine, size_t bytes,
                                Finish finish))[kSlotBytes];
int lane_index();

template <typename T>
T shuffle(const char* kind, T value, int source_lane) {
  static_assert(sizeof(T) <= kSlotBytes);
  auto slots = warp_collective(kind, &value, sizeof(T), nullptr);
  if (source_lane >= 0 && source_lane < kLanes) std::memcpy(&value, slots[source_lane], sizeof(T));
  return value;
}

// cp.async: the copy happens at the wait; until then the target holds NaN.
void copy_async(void* target, const void* source, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_in_flight);

}  // namespace cuda_emulation

#define threadIdx (cuda_emulation::current_thread->thread_idx)
#define blockIdx (cuda_emulation::current_thread->block_idx)
#define blockDim (cuda_emulation::current_thread->block_dim)
#define gridDim (cuda_emulation::current_thread->grid_dim)

inline void __syncthreads() { cuda_emulation::block_barrier(); }

inline void __syncwarp(unsigned = 0xffffffffu) {
  cuda_emulation::warp_collective("__syncwarp", nullptr, 0, nullptr);
}

inline void require_full_warp(unsigned mask) {
  if (mask != 0xffffffffu) cuda_emulation::fail("only full-warp collectives are emulated");
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  require_full_warp(mask);
  return cuda_emulation::shuffle("__shfl_xor_sync", value,
                                 cuda_emulation::lane_index() ^ lane_mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source_lane) {
  require_full_warp(mask);
  return cuda_emulation::shuffle("__shfl_sync", value, source_lane);
}

// --- 16-bit floating point ----------------------------------------------------------------------
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31;
  const uint32_t mantissa = x.bits & 0x3ff;
  if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * static_cast<float>(mantissa);
  return float_from_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float x) {
  const uint32_t sign = float_bits(x) >> 16 & 0x8000, magnitude = float_bits(x) & 0x7fffffff;
  const float size = std::fabs(x);
  uint32_t half;
  if (std::isnan(x)) {
    half = 0x7fff;
  } else if (size >= 65520.0f) {
    half = 0x7c00;
  } else if (size < 0x1p-14f) {
    half = float_bits(size + 0.5f) - float_bits(0.5f);  // the sum is rounded to a multiple of 2^-24
  } else {
    half = ((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
  }
  return {static_cast<uint16_t>(sign | half)};
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return float_from_bits(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// --- counterparts of csrc/kernels/common/cuda_launch.cuh
// -----------------------------------------------
namespace pypkg {

struct LaunchSite;

inline int multiprocessor_count() { return 2; }
inline int compute_capability() { return 90; }
inline int shared_memory_limit() { return static_cast<int>(cuda_emulation::shared_memory_limit()); }
constexpr int64_t kMaxGridBlocks = 3;  // small, so that blocks have several rows

template <typename Site, typename... Params, typename... Args>
void launch(const Site& site, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            void* /*stream*/, const Args&... args) {
  cuda_emulation::launch_blocks(site.text(), grid, block, shared_bytes, [&] { kernel(args...); });
}

template <typename Storage>
Storage& dynamic_shared() {
  return *static_cast<Storage*>(cuda_emulation::shared_memory());
}

}  // namespace pypkg
