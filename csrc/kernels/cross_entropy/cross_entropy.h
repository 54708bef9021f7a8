// Softmax cross entropy with the log-sum-exp found online in one pass (Milakov and Gimelshein,
// 2018), in a form that can be merged over a vocabulary-parallel group.
//
// Each row gives three partial results over the columns at hand:
//   row_max = max_j x_j,  row_sum = sum_j exp(x_j - row_max),  target = x[label - vocab_start]
// target is 0 if the label is in another shard or is ignored. Merging n shards:
//   M = max(row_max), S = sum(row_sum * exp(row_max - M)), lse = M + log(S), loss = lse -
//   sum(target)
// The loss is NaN if all logits of a row are -inf (lse = -inf), and inf if only the label's is.
#pragma once

#include "common/common.h"

namespace pypkg {

struct CrossEntropyForward {
  const void* logits = nullptr;     // [rows, cols]
  const int64_t* labels = nullptr;  // [rows], over the whole vocabulary
  float* row_max = nullptr;         // [rows] or null
  float* row_sum = nullptr;         // [rows] or null
  float* target = nullptr;          // [rows] or null
  float* lse = nullptr;             // [rows] or null: row_max + log(row_sum), of this shard
  float* loss = nullptr;            // [rows] or null: lse - target, 0 for ignored rows;
                                    // meaningful when the shard is the whole vocabulary
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t vocab_start = 0;  // first vocabulary entry of this shard
  int64_t vocab_size = 0;   // of the whole vocabulary; labels must be below it or ignore_index
  int64_t ignore_index = -100;
  DType dtype = DType::kFloat32;
};

// dlogits[i, j] = (exp(x[i, j] - lse[i]) - [labels[i] == vocab_start + j]) * dloss[i], and 0 for
// ignored rows (also where logits are not finite).
struct CrossEntropyBackward {
  const void* logits = nullptr;     // [rows, cols]
  const int64_t* labels = nullptr;  // [rows]
  const float* lse = nullptr;       // [rows], of the whole vocabulary
  const float* dloss = nullptr;     // [rows]
  void* dlogits = nullptr;          // [rows, cols], overwritten; may alias logits
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t vocab_start = 0;
  int64_t ignore_index = -100;
  DType dtype = DType::kFloat32;
};

// If a label is outside [0, vocab_size) and not ignore_index, the CPU version throws
// std::out_of_range with row and label, and the CUDA version gives the row a NaN loss and gradient.
void cross_entropy_forward_cpu(const CrossEntropyForward& params);
void cross_entropy_backward_cpu(const CrossEntropyBackward& params);
void cross_entropy_forward_cuda(const CrossEntropyForward& params, Stream stream);
void cross_entropy_backward_cuda(const CrossEntropyBackward& params, Stream stream);

}  // namespace pypkg
