// Attention of one new token of each row to the tokens of its row, whose keys and values are kept:
// a step of generation on a CPU, in float32.
#pragma once

#include "common/common.h"

namespace pypkg {

// out = softmax(scores + alibi, over visible keys) v, scores = scale * q k^T. The new token sees
// itself and the tokens before it, from first_keys on and within the window. A row has the same
// bits beside other rows, and with any number of threads.
struct CachedAttention {
  const float* q = nullptr;  // [batch, heads_q, head_dim], of the new tokens; rotated
  const float* k = nullptr;  // [batch, heads_k, head_dim], rotated
  const float* v = nullptr;  // [batch, heads_k, head_dim]
  // Elements from one row to the next in q, k and v, which may be columns of one packed matrix.
  int64_t q_stride = 0;
  int64_t k_stride = 0;
  float* keys = nullptr;    // [batch, heads_k, capacity, head_dim]; k is written to `position`
  float* values = nullptr;  // as keys, of v
  float* out = nullptr;     // [batch, heads_q, head_dim], contiguous; overwritten
  const int64_t* first_keys = nullptr;  // [batch], at most position: the first key that is no
                                        // padding; null: 0
  const float* alibi_slopes = nullptr;  // [heads_q] or null
  int64_t batch = 0;
  int64_t heads_q = 0;  // a multiple of heads_k
  int64_t heads_k = 0;
  int64_t head_dim = 0;
  int64_t capacity = 0;
  int64_t position = 0;  // of the new token in each row, below capacity
  int64_t window = 0;    // keys that the new token sees at most, its own included; 0: all
  float scale = 1.0f;
  float softcap = 0.0f;  // > 0: scores become softcap * tanh(scores / softcap)
};

void cached_attention_cpu(const CachedAttention& params);

}  // namespace pypkg
