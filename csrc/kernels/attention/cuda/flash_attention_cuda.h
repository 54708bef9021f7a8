// The implementations behind flash_attention_*_cuda, and the helpers that their launchers share.
// flash_attention.cu checks the arguments and chooses. To add an implementation, declare another
// pair of functions here.
#pragma once

#include <type_traits>

#include "attention/cuda/cuda_attention_ordered_sum.cuh"
#include "attention/flash_attention.h"
#include "common/cuda_launch.cuh"

namespace pypkg {

void flash_attention_forward_sm80(const FlashAttentionForward& params, Stream stream);

constexpr int64_t kMaxHopperHeadDim = 128;

// Needs 16-bit types, head_dim at most kMaxHopperHeadDim, at least one query and one key, and a
// device of compute capability 9.0.
void flash_attention_forward_sm90(const FlashAttentionForward& params, Stream stream);

// Sizes of the sums of dq that a backward pass needs. flash_attention_backward_sm80 needs none
// where it computes dq with seven products.
struct DqSumSizes {
  int64_t tiles = 0;
  int64_t tile_size = 0;  // floats
};
DqSumSizes dq_sum_sizes_sm80(const FlashAttentionShape& shape);
DqSumSizes dq_sum_sizes_sm90(const FlashAttentionShape& shape);

// The parts of the backward pass's workspace.
struct BackwardWorkspace {
  OrderedSums dq_sums;
  float* delta;  // [batch, heads_q, seq_q]: sum over dimensions of dout * out

  BackwardWorkspace(const FlashAttentionShape& shape, const DqSumSizes& sizes, float* memory)
      : delta(memory + sizes.tiles * sizes.tile_size) {
    dq_sums.count = sizes.tiles;
    dq_sums.tiles = memory;
    dq_sums.state = reinterpret_cast<int*>(delta + num_deltas(shape));
  }

  static int64_t num_deltas(const FlashAttentionShape& shape) {
    return shape.batch * shape.heads_q * shape.seq_q;
  }
  static int64_t num_floats(const FlashAttentionShape& shape, const DqSumSizes& sizes) {
    return sizes.tiles * sizes.tile_size + num_deltas(shape) + OrderedSums::num_states(sizes.tiles);
  }
};

void flash_attention_backward_sm80(const FlashAttentionBackward& params,
                                   const BackwardWorkspace& workspace, Stream stream);

// Has the requirements of flash_attention_forward_sm90.
void flash_attention_backward_sm90(const FlashAttentionBackward& params,
                                   const BackwardWorkspace& workspace, Stream stream);

inline LaunchSite attention_site(const char* operation, const FlashAttentionShape& shape) {
  return {operation,
          {shape.batch, shape.seq_q, shape.seq_k, shape.heads_q, shape.heads_k, shape.head_dim}};
}

// A flat grid with one block per `rows_per_block` rows of every batch and head.
inline dim3 attention_grid(int64_t batch, int64_t heads, int64_t rows, int rows_per_block) {
  const int64_t blocks = batch * heads * ceil_div<int64_t>(rows, rows_per_block);
  if (blocks > INT32_MAX) throw std::invalid_argument("flash_attention: more than 2^31 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Calls f(capped). `capped` is a type, so that kernels without a soft cap contain no code for it.
template <typename F>
void dispatch_softcap(const FlashAttentionShape& shape, F&& f) {
  if (shape.softcap > 0) return f(std::true_type{});
  f(std::false_type{});
}

// Calls f(TypeTag<T>, head_dim, capped) with the padded head_dim.
template <typename F>
void dispatch_sm80(const FlashAttentionShape& shape, F&& f) {
  dispatch_dtype(shape.dtype, [&](auto tag) {
    const auto call = [&](auto head_dim) {
      dispatch_softcap(shape, [&](auto capped) { f(tag, head_dim, capped); });
    };
    if constexpr (sizeof(typename decltype(tag)::type) == 2) {
      if (shape.head_dim <= 32) return call(std::integral_constant<int, 32>{});
      if (shape.head_dim <= 64) return call(std::integral_constant<int, 64>{});
      if (shape.head_dim <= 96) return call(std::integral_constant<int, 96>{});
    } else {
      if (shape.head_dim <= 64) return call(std::integral_constant<int, 64>{});
    }
    if (shape.head_dim <= 128) return call(std::integral_constant<int, 128>{});
    call(std::integral_constant<int, kMaxHeadDim>{});
  });
}

// Launches a kernel of flash_attention_*_sm80 whose shared memory is a Storage. Its size is at most
// the limit of a block on 8.6, 8.9 and 12.0; with kNeedsMore it is the limit on 8.0, and the caller
// must check shared_memory_limit() first.
template <typename Storage, bool kNeedsMore = false, typename... Params, typename... Args>
void launch_sm80(const LaunchSite& site, void (*kernel)(Params...), dim3 grid, int threads,
                 Stream stream, const Args&... args) {
  static_assert(sizeof(Storage) <= (kNeedsMore ? 163 : 99) * 1024, "more than devices have");
  launch(site, kernel, grid, dim3(threads), sizeof(Storage), stream, args...);
}

}  // namespace pypkg
