// The rotation of queries and keys that lie in one packed matrix with the values.
#pragma once

#include "attention/flash_attention.h"
#include "rotary_embedding/rotary_embedding.h"
#include "tensors.h"

namespace pypkg {

// Without tables nothing is rotated.
struct PackedRotation {
  const OptionalTensor& cos;
  const OptionalTensor& sin;
  const OptionalTensor& position_ids;
  bool interleaved;
};

// Rotates the queries and keys of a packed matrix in place.
inline void rotate_packed(void* packed, const paddle::Tensor& like, const FlashAttentionShape& s,
                          const PackedRotation& rotation, bool inverse) {
  if (!rotation.cos) return;
  if (!rotation.sin) reject("packed_attention: cos is given without sin");
  const paddle::Tensor &cos = *rotation.cos, &sin = *rotation.sin;
  check_rank("packed_attention: cos", cos, 2);
  check_shape("packed_attention: sin", sin, cos.shape());
  for (const paddle::Tensor* table : {&cos, &sin}) {
    check_dtype("packed_attention: cos and sin", *table, paddle::DataType::FLOAT32);
    check_place("packed_attention: cos and sin", *table, like);
  }
  RotaryEmbedding params;
  params.dtype = s.dtype;
  params.q = params.q_out = packed;
  params.batch = s.batch;
  params.sequence = s.seq_q;
  params.q_heads = s.heads_q + s.heads_k;  // the keys follow the queries
  params.head_dim = s.head_dim;
  params.q_stride = s.token_stride;
  params.cos = cos.data<float>();
  params.sin = sin.data<float>();
  params.num_positions = cos.shape()[0];
  params.rotary_dim = 2 * cos.shape()[1];
  params.interleaved = rotation.interleaved;
  params.inverse = inverse;
  if (params.rotary_dim > s.head_dim) {
    reject("packed_attention: ", params.rotary_dim,
           " dimensions are to be rotated, but head_dim is ", s.head_dim);
  }
  if (rotation.position_ids) {
    const paddle::Tensor& ids = *rotation.position_ids;
    check_shape("packed_attention: position_ids", ids, {s.batch, s.seq_q});
    check_dtype("packed_attention: position_ids", ids, paddle::DataType::INT64);
    check_place("packed_attention: position_ids", ids, like);
    params.position_ids = ids.data<int64_t>();
  } else if (s.seq_q > params.num_positions) {
    reject("packed_attention: the sequence has ", s.seq_q, " tokens, but cos and sin hold only ",
           params.num_positions, " positions");
  }
  launch(like, PYPKG_FORMS(rotary_embedding), params);
}

}  // namespace pypkg
