// Rotary embedding and attention on packed queries, keys and values, for the operators that have
// them: by itself (packed_attention_op.cc), and with the projections (attention_block_op.cc).
#pragma once

#include "tensors.h"

namespace pypkg {

// The arguments other than qkv; without tables nothing is rotated.
struct PackedAttention {
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  const OptionalTensor& position_ids;
  const OptionalTensor& prefix_lengths;
  const OptionalTensor& document_starts;
  const OptionalTensor& alibi_slopes;
  int64_t batch;
  int64_t heads_q;
  int64_t heads_k;
  bool interleaved;
  float scale;
  float softcap;
  bool causal;
  int64_t window;
};

struct PackedAttentionResult {
  paddle::Tensor out;
  paddle::Tensor rotated;  // qkv itself where that is overwritten
  paddle::Tensor softmax_lse;
};

PackedAttentionResult packed_attention_forward(const paddle::Tensor& qkv,
                                               const PackedAttention& args, bool overwrite);

// The gradient of qkv.
paddle::Tensor packed_attention_backward(const paddle::Tensor& out, const paddle::Tensor& rotated,
                                         const paddle::Tensor& softmax_lse,
                                         const paddle::Tensor& dout, const PackedAttention& args);

}  // namespace pypkg
