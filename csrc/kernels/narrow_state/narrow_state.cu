#include "common/cuda_vector.cuh"
#include "narrow_state/narrow_state_values.h"

namespace pypkg {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// As an argument of a kernel.
struct Table {
  float values[kCodes];
};
static_assert(kThreads == kCodes, "each thread of a block copies one value");

// Calls f(block, begin, end) for blocks of the state, one warp each.
template <typename F>
__device__ __forceinline__ void for_each_block(const BlockwiseState& p, F&& f) {
  const int64_t blocks = ceil_div(p.numel, p.block_size);
  const int64_t step = gridDim.x * int64_t{kWarps};
  for (int64_t block = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; block < blocks;
       block += step) {
    const int64_t begin = block * p.block_size;
    f(block, begin, begin + p.block_size < p.numel ? begin + p.block_size : p.numel);
  }
}

__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const BlockwiseState p, const __grid_constant__ Table table) {
  Table& shared = dynamic_shared<Table>();
  shared.values[threadIdx.x] = table.values[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  for_each_block(p, [&](int64_t block, int64_t begin, int64_t end) {
    const float largest = p.largest[block];
    for (int64_t i = begin + lane; i < end; i += kWarpSize) {
      p.values[i] = shared.values[flipped(p.codes[i], p.is_signed)] * largest;
    }
  });
}

// The number of middles below a quotient.
__device__ __forceinline__ int code_of(const Table& middles, float quotient) {
  if (magnitude_of(quotient) >= kInfinityBits) return kCodes - 1;
  int code = 0;
#pragma unroll
  for (int half = kCodes / 2; half > 0; half /= 2) {
    if (middles.values[code + half - 1] < quotient) code += half;
  }
  return code;
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const BlockwiseState p, const __grid_constant__ Table table) {
  Table& middles = dynamic_shared<Table>();
  const int next = threadIdx.x + 1 < kCodes ? threadIdx.x + 1 : threadIdx.x;
  middles.values[threadIdx.x] = middle_of(table.values[threadIdx.x], table.values[next]);
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  for_each_block(p, [&](int64_t block, int64_t begin, int64_t end) {
    uint32_t magnitude = 0;
    for (int64_t i = begin + lane; i < end; i += kWarpSize) {
      const uint32_t mine = magnitude_of(p.values[i]);
      magnitude = mine > magnitude ? mine : magnitude;
    }
#pragma unroll
    for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) {
      const uint32_t other = __shfl_xor_sync(kFullWarp, magnitude, lane_mask);
      magnitude = other > magnitude ? other : magnitude;
    }
    const float largest = float_of(magnitude), divisor = divisor_of(largest);
    if (lane == 0) p.largest[block] = largest;
    for (int64_t i = begin + lane; i < end; i += kWarpSize) {
      const float quotient = p.values[i] / divisor;
      const int code = code_of(middles, quotient);
      const int least = !p.is_signed && quotient > 0.0f;
      p.codes[i] = flipped(code > least ? code : least, p.is_signed);
    }
  });
}

__global__ void __launch_bounds__(kThreads) stochastic_kernel(const StochasticBFloat16 p) {
  const int64_t step = gridDim.x * int64_t{kThreads};
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < p.numel; i += step) {
    p.out[i] = stochastic_bfloat16(p.values[i], static_cast<uint32_t>(i), p.key);
  }
}

void launch_blocks(const char* name, void (*kernel)(BlockwiseState, Table), const BlockwiseState& p,
                   Stream stream) {
  if (p.numel == 0) return;
  Table table;
  std::copy_n(p.table, kCodes, table.values);
  const int64_t blocks = ceil_div(ceil_div(p.numel, p.block_size), int64_t{kWarps});
  const LaunchSite site{name, {p.numel}};
  launch(site, kernel, dim3(std::min(blocks, kMaxGridBlocks)), dim3(kThreads), sizeof(Table),
         stream, p, table);
}

}  // namespace

void dequantize_blockwise_cuda(const BlockwiseState& params, Stream stream) {
  launch_blocks("dequantize_blockwise", dequantize_kernel, params, stream);
}

void quantize_blockwise_cuda(const BlockwiseState& params, Stream stream) {
  launch_blocks("quantize_blockwise", quantize_kernel, params, stream);
}

void stochastic_bfloat16_cuda(const StochasticBFloat16& p, Stream stream) {
  if (p.numel == 0) return;
  const int64_t blocks = std::min(ceil_div(p.numel, int64_t{kThreads}), kMaxGridBlocks);
  const LaunchSite site{"stochastic_bfloat16", {p.numel}};
  launch(site, stochastic_kernel, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace pypkg
