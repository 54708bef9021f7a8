// Forward attention for sm_80 and newer: FlashAttention-2's loop (Dao, 2023).
//
// A thread block holds a tile of queries and walks over tiles of keys and values. Keys and values
// each have one buffer: the values arrive while scores are computed, the next keys while the
// values are used.
#include "cuda_attention_scores.cuh"
#include "flash_attention_cuda.h"

namespace pypkg {
namespace {

template <typename T, int kHeadDim_>
struct ForwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  // What fits into registers without spills: wide heads need more warps with fewer rows each.
  static constexpr int kRowTiles = kTensorCores && kHeadDim <= 64 ? 2 : 1;  // 16 queries each
  static constexpr int kWarps = kTensorCores && kHeadDim > 64 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kQueries = kWarps * kRowTiles * 16;
  static constexpr int kKeys = kTensorCores ? 64 : kHeadDim > 64 ? 16 : 32;

  struct Storage {
    SharedTile<T, kQueries, kHeadDim> q;
    SharedTile<T, kKeys, kHeadDim> k, v;
  };
};

// Running maximum (in units of log 2) and sum of the softmax of a lane's rows. The sum is of this
// lane's columns only until the end.
template <int kRowTiles>
struct SoftmaxState {
  RowValues<kRowTiles> max = RowValues<kRowTiles>::all(-INFINITY);
  RowValues<kRowTiles> sum = RowValues<kRowTiles>::all(0);

  // Replaces scores by exp2(score - max) and rescales what was summed under the old maximum.
  template <int kColTiles, int kOutTiles>
  __device__ __forceinline__ void update(float (&scores)[kRowTiles][kColTiles][4],
                                         float (&out)[kRowTiles][kOutTiles][4]) {
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
        // A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        const float subtracted = new_max == -INFINITY ? 0.0f : new_max;
        const float rescale = exp2_approximate(max.of[m][i] - subtracted);
        max.of[m][i] = new_max;
        sum.of[m][i] *= rescale;
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
          out[m][n][2 * i] *= rescale;
          out[m][n][2 * i + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            scores[m][n][c] = exp2_approximate(scores[m][n][c] - subtracted);
            sum.of[m][i] += scores[m][n][c];
          }
        }
      }
    }
  }

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

// Writes out = acc / sum and softmax_lse = log(sum) + max.
template <typename Tiling, typename T>
__device__ void store_result(const FlashAttentionForward& p, const BlockTask& task,
                             const float (&acc)[Tiling::kRowTiles][Tiling::kHeadDim / 8][4],
                             SoftmaxState<Tiling::kRowTiles>& softmax,
                             typename Tiling::Storage& shared) {
  const FlashAttentionShape& shape = p.shape;
  float* lse = p.softmax_lse + (task.b * shape.heads_q + task.head) * shape.seq_q;
  RowValues<Tiling::kRowTiles> inverse_sum;
  softmax.add_up_lanes();
#pragma unroll
  for (int m = 0; m < Tiling::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = softmax.sum.of[m][i];
      const bool sees_nothing = softmax.max.of[m][i] == -INFINITY;
      inverse_sum.of[m][i] = sees_nothing ? 0.0f : 1.0f / sum;
      const int64_t row = task.first + warp_id() * Tiling::kRowTiles * 16 + row_in_tile(m, 2 * i);
      if (lane_id() % 4 == 0 && row < shape.seq_q) {
        lse[row] = sees_nothing ? -INFINITY : softmax.max.of[m][i] * kLn2 + logf(sum);
      }
    }
  }
  const HeadRows<T> out(static_cast<T*>(p.out), task.b, shape.seq_q, task.head, shape.heads_q,
                        shape.head_dim);
  store_rows(acc, inverse_sum, shared.q, out, task.first, shape.seq_q);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(ForwardTiling<T, kHeadDim>::kThreads)
    forward_kernel(const FlashAttentionForward p) {
  using Tiling = ForwardTiling<T, kHeadDim>;
  constexpr int kThreads = Tiling::kThreads, kKeys = Tiling::kKeys;
  constexpr int kRowTiles = Tiling::kRowTiles;
  auto& shared = dynamic_shared<typename Tiling::Storage>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, Tiling::kQueries, shape.heads_q, shape.mask.causal);
  const int64_t head_k = task.head / (shape.heads_q / shape.heads_k);
  const ScoreRule rule(shape, task.b, task.head);
  const HeadRows<const T> q(static_cast<const T*>(p.q), task.b, shape.seq_q, task.head,
                            shape.heads_q, shape.head_dim);
  const HeadRows<const T> k(static_cast<const T*>(p.k), task.b, shape.seq_k, head_k, shape.heads_k,
                            shape.head_dim);
  const HeadRows<const T> v(static_cast<const T*>(p.v), task.b, shape.seq_k, head_k, shape.heads_k,
                            shape.head_dim);
  const auto seek = [&](int first, BlockState& state) {
    return rule.template next_key_block<Tiling::kQueries, kKeys>(task.first, first, state);
  };

  const int warp_row = warp_id() * kRowTiles * 16;
  float out[kRowTiles][kHeadDim / 8][4] = {};
  SoftmaxState<kRowTiles> softmax;
  BlockState state = BlockState::kSkip;
  int first_key = seek(0, state);
  load_tile<kThreads>(shared.q, q, task.first, shape.seq_q);
  if (first_key < shape.seq_k) load_tile<kThreads>(shared.k, k, first_key, shape.seq_k);
  copy_async_commit();
  while (first_key < shape.seq_k) {
    copy_async_wait_all();
    __syncthreads();  // keys are here; the previous values are done with
    load_tile<kThreads>(shared.v, v, first_key, shape.seq_k);
    copy_async_commit();
    float scores[kRowTiles][kKeys / 8][4] = {};
    multiply_transposed(scores, shared.q, warp_row, shared.k);
    rule.template apply<false>(scores, task.first + warp_row, first_key, state);
    softmax.update(scores, out);
    first_key = seek(first_key + kKeys, state);
    copy_async_wait_all();
    __syncthreads();  // values are here; the keys are done with
    if (first_key < shape.seq_k) load_tile<kThreads>(shared.k, k, first_key, shape.seq_k);
    copy_async_commit();
    multiply(out, scores, shared.v);
  }
  copy_async_wait_all();  // of the queries, where no key was seen: their tile is reused now
  __syncthreads();
  store_result<Tiling, T>(p, task, out, softmax, shared);
}

}  // namespace

void flash_attention_forward_sm80(const FlashAttentionForward& p, Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  dispatch_head_dim(shape, [&](auto tag, auto head_dim) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Tiling = ForwardTiling<T, kHeadDim>;
    launch(attention_site("flash_attention_forward", shape), forward_kernel<T, kHeadDim>,
           attention_grid(shape.batch, shape.heads_q, shape.seq_q, Tiling::kQueries),
           dim3(Tiling::kThreads), sizeof(typename Tiling::Storage), stream, p);
  });
}

}  // namespace pypkg
