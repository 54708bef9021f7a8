// What the operators of attention have in common: the checks of sizes and masks.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention/flash_attention.h"
#include "tensors.h"

namespace pypkg {

inline void check_attention(const char* op, const FlashAttentionShape& s) {
  if (s.head_dim < 8 || s.head_dim > kMaxHeadDim || s.head_dim % 8 != 0) {
    reject(op, ": head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", got ", s.head_dim);
  }
  if (!(s.softcap >= 0) || !std::isfinite(s.softcap)) {
    reject(op, ": softcap must be 0 (none) or a positive number, got ", s.softcap);
  }
  if (s.heads_k == 0 || s.heads_q % s.heads_k != 0) {
    reject(op, ": the ", s.heads_q, " heads of q must be a multiple of the ", s.heads_k,
           " of k and v");
  }
}

// The mask of attention of the given sizes on the device of q. A block of a sequence takes the
// documents of the whole sequence, other attention those of the keys.
inline AttentionMask check_mask(const char* op, const paddle::Tensor& q,
                                const FlashAttentionShape& s, const OptionalTensor& prefix_lengths,
                                const OptionalTensor& document_starts,
                                const OptionalTensor& alibi_slopes, bool causal, int64_t window,
                                bool is_block = false) {
  const auto check = [&](const char* name, const OptionalTensor& tensor, const Shape& shape,
                         paddle::DataType dtype) {
    if (!tensor) return;
    const std::string full = std::string(op) + ": " + name;
    check_shape(full.c_str(), *tensor, shape);
    check_dtype(full.c_str(), *tensor, dtype);
    check_place(full.c_str(), *tensor, q);
  };
  check("prefix_lengths", prefix_lengths, {s.batch}, paddle::DataType::INT32);
  const int64_t given =
      document_starts && document_starts->shape().size() == 2 ? document_starts->shape()[1] : 0;
  const int64_t tokens = is_block ? given : s.seq_k;
  check("document_starts", document_starts, {s.batch, tokens}, paddle::DataType::INT32);
  check("alibi_slopes", alibi_slopes, {s.heads_q}, paddle::DataType::FLOAT32);
  if (is_block && document_starts &&
      std::max(s.query_offset + s.seq_q, s.key_offset + s.seq_k) > tokens) {
    reject(op, ": document_starts hold ", tokens, " tokens, fewer than the blocks reach to");
  }
  if (!is_block && document_starts && s.seq_q != s.seq_k) {
    reject(op, ": document_starts need as many queries as keys, got ", s.seq_q, " and ", s.seq_k);
  }
  if (window < 0 || window > INT32_MAX) {
    reject(op, ": window must be 0 (none) or more, got ", window);
  }
  AttentionMask mask;
  mask.causal = causal;
  mask.window = static_cast<int32_t>(window);
  mask.prefix_lengths = data_or_null<int32_t>(prefix_lengths);
  mask.document_starts = data_or_null<int32_t>(document_starts);
  mask.tokens = tokens;
  mask.alibi_slopes = data_or_null<float>(alibi_slopes);
  return mask;
}

}  // namespace pypkg
