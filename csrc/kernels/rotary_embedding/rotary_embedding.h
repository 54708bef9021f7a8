// Rotary position embedding (Su et al., 2021) of queries and keys in one launch.
//
// Dimensions [rotary_offset, rotary_offset + rotary_dim) of each head are rotated in pairs by
// (cos[p, i], sin[p, i]), p the position of the token; the others are copied.
//   half-split:  pair i is dimensions i and i + rotary_dim / 2   (LLaMA, GPT-NeoX)
//   interleaved: pair i is dimensions 2i and 2i + 1              (GPT-J, ChatGLM2)
#pragma once

#include "common/common.h"

namespace pypkg {

struct RotaryEmbedding {
  const void* q = nullptr;                // [batch, sequence, q_heads, head_dim]
  const void* k = nullptr;                // [batch, sequence, k_heads, head_dim] or null
  void* q_out = nullptr;                  // overwritten; may alias q
  void* k_out = nullptr;                  // overwritten; may alias k
  const float* cos = nullptr;             // [num_positions, rotary_dim / 2]
  const float* sin = nullptr;             // [num_positions, rotary_dim / 2]
  const int64_t* position_ids = nullptr;  // [batch, sequence], or null for 0, 1, 2, ...
  int64_t batch = 0;
  int64_t sequence = 0;
  int64_t q_heads = 0;
  int64_t k_heads = 0;
  int64_t head_dim = 0;
  int64_t q_stride = 0;    // elements from one token of q and q_out to the next; 0: contiguous
  int64_t rotary_dim = 0;  // even
  int64_t rotary_offset = 0;
  int64_t num_positions = 0;
  bool interleaved = false;
  bool inverse = false;  // rotate backwards: the gradient
  DType dtype = DType::kFloat32;
};

// If a position is outside [0, num_positions), the CPU version throws std::out_of_range, and the
// CUDA version writes NaN for the token.
void rotary_embedding_cpu(const RotaryEmbedding& params);
void rotary_embedding_cuda(const RotaryEmbedding& params, Stream stream);

}  // namespace pypkg
