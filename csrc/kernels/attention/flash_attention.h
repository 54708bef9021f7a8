// Exact attention that never holds a [sequence, sequence] matrix (Dao, 2023).
//
//   out = softmax(scores + alibi, over visible keys) v,  scores = scale * q k^T
//
// The layout is [batch, sequence, heads, head_dim], contiguous except for token_stride. heads_q is
// a multiple of heads_k (grouped and multi query). A query that sees no key gives out = 0 and
// softmax_lse = -inf, and has zero gradients. Products and softmax accumulate in float32.
#pragma once

#include "attention/attention_mask.h"
#include "common/common.h"

namespace pypkg {

constexpr int64_t kMaxHeadDim = 256;

struct FlashAttentionShape {
  int64_t batch = 0;
  int64_t seq_q = 0;
  int64_t seq_k = 0;
  int64_t heads_q = 0;
  int64_t heads_k = 0;
  int64_t head_dim = 0;  // a multiple of 8, at most kMaxHeadDim
  // Elements from one token to the next in q, k, v and their gradients, which may be columns of one
  // packed matrix; a multiple of 8. 0: each is contiguous. out and dout are always contiguous.
  int64_t token_stride = 0;
  // Positions of the first query and the first key, for the mask. If queries are aligned to the
  // last keys, they are seq_k - seq_q and 0.
  int64_t query_offset = 0;
  int64_t key_offset = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // > 0: scores become softcap * tanh(scores / softcap)
  AttentionMask mask;
  DType dtype = DType::kFloat32;

  // Whether causality or the window alone hides every key from every query.
  bool is_hidden() const {
    if (seq_q == 0 || seq_k == 0 || mask.prefix_lengths) return false;
    AttentionMask rule = mask;
    rule.document_starts = nullptr;
    return key_block_state(rule, 0, query_offset, query_offset + seq_q, key_offset,
                           key_offset + seq_k) == BlockState::kSkip;
  }

  PYPKG_HOST_DEVICE int64_t out_stride() const { return heads_q * head_dim; }
  PYPKG_HOST_DEVICE int64_t q_stride() const { return token_stride ? token_stride : out_stride(); }
  PYPKG_HOST_DEVICE int64_t k_stride() const {
    return token_stride ? token_stride : heads_k * head_dim;
  }
};

struct FlashAttentionForward {
  FlashAttentionShape shape;
  const void* q = nullptr;       // [batch, seq_q, heads_q, head_dim]
  const void* k = nullptr;       // [batch, seq_k, heads_k, head_dim]
  const void* v = nullptr;       // [batch, seq_k, heads_k, head_dim]
  void* out = nullptr;           // [batch, seq_q, heads_q, head_dim], overwritten
  float* softmax_lse = nullptr;  // [batch, heads_q, seq_q], overwritten: log(sum(exp(scores)))
};

struct FlashAttentionBackward {
  FlashAttentionShape shape;
  const void* dout = nullptr;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const void* out = nullptr;
  const float* softmax_lse = nullptr;  // like out, of at least the keys in k (blocks of keys)
  void* dq = nullptr;                  // overwritten
  void* dk = nullptr;                  // overwritten
  void* dv = nullptr;                  // overwritten
  float* workspace = nullptr;  // flash_attention_backward_workspace_*() floats, uninitialised
};

void flash_attention_forward_cpu(const FlashAttentionForward& params);
void flash_attention_backward_cpu(const FlashAttentionBackward& params);
int64_t flash_attention_backward_workspace_cpu(const FlashAttentionShape& shape);

void flash_attention_forward_cuda(const FlashAttentionForward& params, Stream stream);
void flash_attention_backward_cuda(const FlashAttentionBackward& params, Stream stream);
int64_t flash_attention_backward_workspace_cuda(const FlashAttentionShape& shape);

}  // namespace pypkg
