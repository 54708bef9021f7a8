// Online softmax over blocks of keys, and the result of a block of queries. Shared by the forward
// kernels.
#pragma once

#include "attention/cuda/cuda_attention_scores.cuh"

namespace pypkg {

// Running maximum and sum of the softmax, for the rows of a lane. The maximum is that of the scores
// before they are multiplied by `unit`. The sum covers the columns of this lane only; add_up_lanes
// completes it.
template <int kRowTiles>
struct SoftmaxState {
  const float unit;  // ScoreRule::unit
  RowValues<kRowTiles> max = RowValues<kRowTiles>::all(-INFINITY);
  RowValues<kRowTiles> sum = RowValues<kRowTiles>::all(0);

  // Replaces scores by exp2(unit * (score - max)). Returns the factor by which sums that used the
  // old maximum must be multiplied.
  template <int kColTiles>
  __device__ __forceinline__ RowValues<kRowTiles> update(float (&scores)[kRowTiles][kColTiles][4]) {
    RowValues<kRowTiles> rescale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float new_max = max.of[m][i];
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
          new_max = fmaxf(new_max, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
        }
        // The four lanes of a group share a row.
        new_max = fmaxf(new_max, __shfl_xor_sync(kFullWarp, new_max, 1));
        new_max = fmaxf(new_max, __shfl_xor_sync(kFullWarp, new_max, 2));
        // A row that has seen no key yet subtracts 0: exp2(-inf - 0) = 0, but -inf - -inf is NaN.
        const float subtracted = new_max == -INFINITY ? 0.0f : new_max * unit;
        rescale.of[m][i] = exp2_approximate(max.of[m][i] * unit - subtracted);
        max.of[m][i] = new_max;
        sum.of[m][i] *= rescale.of[m][i];
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            scores[m][n][c] = exp2_approximate(scores[m][n][c] * unit - subtracted);
            sum.of[m][i] += scores[m][n][c];
          }
        }
      }
    }
    return rescale;
  }

  __device__ explicit SoftmaxState(float unit_) : unit(unit_) {}

  __device__ void add_up_lanes() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum.of[m][i] += __shfl_xor_sync(kFullWarp, sum.of[m][i], 1);
        sum.of[m][i] += __shfl_xor_sync(kFullWarp, sum.of[m][i], 2);
      }
    }
  }
};

template <int kRowTiles, int kColTiles>
__device__ __forceinline__ void scale_rows(float (&acc)[kRowTiles][kColTiles][4],
                                           const RowValues<kRowTiles>& factor) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[m][n][c] *= factor.of[m][c / 2];
    }
  }
}

// Writes out = acc / sum and softmax_lse = log(sum) + max, through the tile that held the queries.
template <typename T, int kQueries, int kHeadDim, int kRowTiles>
__device__ void store_result(const FlashAttentionForward& p, const BlockTask& task,
                             const float (&acc)[kRowTiles][kHeadDim / 8][4],
                             SoftmaxState<kRowTiles>& softmax,
                             SharedTile<T, kQueries, kHeadDim>& tile) {
  const FlashAttentionShape& shape = p.shape;
  float* lse = p.softmax_lse + (task.b * shape.heads_q + task.head) * shape.seq_q;
  RowValues<kRowTiles> inverse_sum;
  softmax.add_up_lanes();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = softmax.sum.of[m][i];
      const bool sees_nothing = softmax.max.of[m][i] == -INFINITY;
      inverse_sum.of[m][i] = sees_nothing ? 0.0f : 1.0f / sum;
      const int64_t row = task.first + warp_id() * kRowTiles * 16 + row_in_tile(m, 2 * i);
      if (lane_id() % 4 == 0 && row < shape.seq_q) {
        lse[row] =
            sees_nothing ? -INFINITY : softmax.max.of[m][i] * softmax.unit * kLn2 + logf(sum);
      }
    }
  }
  const HeadRows<T> out(static_cast<T*>(p.out), task.b, shape.seq_q, task.head, shape.out_stride(),
                        shape.head_dim);
  store_rows(acc, inverse_sum, tile, out, task.first, shape.seq_q);
}

}  // namespace pypkg
