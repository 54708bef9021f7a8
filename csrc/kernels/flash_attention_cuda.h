// Implementations of attention behind flash_attention_*_cuda, and what their launchers share.
// flash_attention.cu checks the arguments and chooses; another implementation is one more pair of
// functions here.
#pragma once

#include "cuda_launch.cuh"
#include "flash_attention.h"

namespace pypkg {

void flash_attention_forward_sm80(const FlashAttentionForward& params, Stream stream);

// 16-bit types, at least one query and one key, on a device of compute capability 9.0.
void flash_attention_forward_sm90(const FlashAttentionForward& params, Stream stream);

// delta [batch, heads_q, seq_q]: sum over dimensions of dout * out.
void flash_attention_backward_sm80(const FlashAttentionBackward& params, const float* delta,
                                   Stream stream);

// As flash_attention_forward_sm90.
void flash_attention_backward_sm90(const FlashAttentionBackward& params, const float* delta,
                                   Stream stream);

inline LaunchSite attention_site(const char* operation, const FlashAttentionShape& shape) {
  return {operation,
          {shape.batch, shape.seq_q, shape.seq_k, shape.heads_q, shape.heads_k, shape.head_dim}};
}

// One block per `rows_per_block` rows of every batch and head, in a flat grid.
inline dim3 attention_grid(int64_t batch, int64_t heads, int64_t rows, int rows_per_block) {
  const int64_t blocks = batch * heads * ceil_div<int64_t>(rows, rows_per_block);
  if (blocks > INT32_MAX) throw std::invalid_argument("flash_attention: more than 2^31 blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Calls f(TypeTag<T>, head_dim) with the compiled head_dim that the actual one is padded to.
template <typename F>
void dispatch_head_dim(const FlashAttentionShape& shape, F&& f) {
  dispatch_dtype(shape.dtype, [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == 2) {
      if (shape.head_dim <= 32) return f(tag, std::integral_constant<int, 32>{});
      if (shape.head_dim <= 64) return f(tag, std::integral_constant<int, 64>{});
      if (shape.head_dim <= 96) return f(tag, std::integral_constant<int, 96>{});
    } else {
      if (shape.head_dim <= 64) return f(tag, std::integral_constant<int, 64>{});
    }
    f(tag, std::integral_constant<int, 128>{});
  });
}

}  // namespace pypkg
