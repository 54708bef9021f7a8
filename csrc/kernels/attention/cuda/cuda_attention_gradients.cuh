// From scores to their gradients, and the walk over queries. Shared by the backward kernels.
//
// With P = exp(scores - lse), dP = dout v^T and dS = P * (dP - delta):
//   dv = P^T dout,  dk = scale * dS^T q,  dq = scale * dS k
// Under a soft cap dS is multiplied by its slope, 1 - t^2 with t = tanh(scale * q k / softcap).
#pragma once

#include "attention/cuda/cuda_attention_scores.cuh"

namespace pypkg {

// lse in the units of the scores (log 2), ready to be subtracted from them. A row that sees no key
// has only scores of -inf; it gets 0, because -inf - -inf would be NaN.
__device__ __forceinline__ float lse_to_subtract(float lse) {
  return lse == -INFINITY ? 0.0f : lse * kLog2E;
}

// lse (as lse_to_subtract gives it) and delta of the queries of one lane. The rows of the
// accumulator are queries.
template <int kRowTiles>
struct QuerySums {
  RowValues<kRowTiles> lse, delta;

  // The pointers point at the first query of the head.
  __device__ static QuerySums load(const float* softmax_lse, const float* delta, int first_row,
                                   int64_t seq_q) {
    QuerySums sums;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + row_in_tile(m, 2 * i);
        const bool valid = row < seq_q;
        sums.lse.of[m][i] = valid ? lse_to_subtract(softmax_lse[row]) : 0.0f;
        sums.delta.of[m][i] = valid ? delta[row] : 0.0f;
      }
    }
    return sums;
  }
};

// Replaces scores by exp2(unit * score - lse). `unit` is ScoreRule::unit; lse(m, n, c) returns the
// value to subtract from element [m][n][c].
template <int kRowTiles, int kColTiles, typename Lse>
__device__ __forceinline__ void to_probabilities(float (&scores)[kRowTiles][kColTiles][4],
                                                 float unit, const Lse& lse) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        scores[m][n][c] = exp2_approximate(scores[m][n][c] * unit - lse(m, n, c));
      }
    }
  }
}

// Replaces dP by dS = P * (dP - delta).
template <int kRowTiles, int kColTiles, typename Delta>
__device__ __forceinline__ void to_score_gradients(
    float (&dscores)[kRowTiles][kColTiles][4],
    const float (&probabilities)[kRowTiles][kColTiles][4], const Delta& delta) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        dscores[m][n][c] = probabilities[m][n][c] * (dscores[m][n][c] - delta(m, n, c));
      }
    }
  }
}

// Replaces dP by (dP - delta) * (1 - t^2). to_score_gradients with NoDelta then completes dS.
template <int kRowTiles, int kColTiles, typename Delta>
__device__ __forceinline__ void apply_cap_slopes(float (&dscores)[kRowTiles][kColTiles][4],
                                                 const float (&tangents)[kRowTiles][kColTiles][4],
                                                 const Delta& delta) {
#pragma unroll
  for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const float t = tangents[m][n][c];
        dscores[m][n][c] = (dscores[m][n][c] - delta(m, n, c)) * (1.0f - t * t);
      }
    }
  }
}

struct NoDelta {
  __device__ float operator()(int, int, int) const { return 0.0f; }
};

// Iterates over the blocks of kQueries queries that see a given block of kKeys keys, in all query
// heads that share the key head.
template <int kQueries, int kKeys>
struct QueryWalk {
  const FlashAttentionShape& shape;
  const BlockTask& task;  // of the keys
  int group;              // query heads per key head
  int head_in_group = 0;
  int first = -kQueries;
  BlockState state = BlockState::kSkip;

  __device__ QueryWalk(const FlashAttentionShape& shape_, const BlockTask& task_)
      : shape(shape_), task(task_), group(shape_.heads_q / shape_.heads_k) {}

  __device__ bool at_end() const { return head_in_group == group; }
  __device__ int64_t head_q() const { return task.head * group + head_in_group; }
  // Offset of the block's first query in a [batch, heads_q, seq_q] array.
  __device__ int64_t offset() const {
    return (task.b * shape.heads_q + head_q()) * shape.seq_q + first;
  }
  // Index of the block in a [batch, heads_q, blocks of queries] array.
  __device__ int tile() const {
    const int blocks = ceil_div<int>(shape.seq_q, kQueries);
    return static_cast<int>(task.b * shape.heads_q + head_q()) * blocks + first / kQueries;
  }

  __device__ void advance() {
    for (; !at_end(); ++head_in_group, first = -kQueries) {
      const ScoreRule rule(shape, task.b, head_q());
      for (first += kQueries; first < shape.seq_q; first += kQueries) {
        state = rule.template block_state<kQueries, kKeys>(first, task.first);
        if (state != BlockState::kSkip) return;
      }
    }
  }
};

}  // namespace pypkg
