// Backward attention for sm_80 and newer, deterministic and without atomics.
//
// One kernel holds a tile of keys and values and walks over queries for dk and dv, the other holds
// a tile of queries and walks over keys for dq. Each recomputes P and dS, the first of them
// transposed, so that a warp owns whole rows of its outputs and P and dS never leave its registers.
// What is walked over has two buffers: one arrives while the other is in use.
#include "cuda_attention_gradients.cuh"
#include "flash_attention_cuda.h"

namespace pypkg {
namespace {

template <typename T, int kHeadDim_>
struct BackwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kRowTiles = kTensorCores && kHeadDim <= 64 ? 2 : 1;  // 16 rows each
  static constexpr int kHeld = kWarps * kRowTiles * 16;
  // What fits into registers: the kernel for dk and dv has two accumulators.
  static constexpr int kWalkedQueries = kTensorCores    ? (kRowTiles * kHeadDim >= 128 ? 16 : 32)
                                        : kHeadDim > 64 ? 8
                                                        : 16;
  static constexpr int kWalkedKeys = kTensorCores ? 32 : kHeadDim > 64 ? 8 : 16;
  static constexpr int kBlocksPerMultiprocessor = 2;
};

// --- dk and dv ----------------------------------------------------------------------------------

// The accumulators of this kernel are transposed: rows are keys, columns are queries, and lse and
// delta, by query, are in shared memory.

template <typename Tiling, typename T>
struct KeyGradientStorage {
  SharedTile<T, Tiling::kHeld, Tiling::kHeadDim> k, v;
  SharedTile<T, Tiling::kWalkedQueries, Tiling::kHeadDim> q[2], dout[2];
  float lse[2][Tiling::kWalkedQueries];
  float delta[2][Tiling::kWalkedQueries];
};

template <typename Tiling>
using TileQueryWalk = QueryWalk<Tiling::kWalkedQueries, Tiling::kHeld>;

template <typename Tiling, typename T>
__device__ __forceinline__ void load_queries(KeyGradientStorage<Tiling, T>& shared, int stage,
                                             const FlashAttentionBackward& p, const float* delta,
                                             const TileQueryWalk<Tiling>& walk) {
  const FlashAttentionShape& shape = p.shape;
  const int64_t b = walk.task.b, head = walk.head_q();
  const HeadRows<const T> q(static_cast<const T*>(p.q), b, shape.seq_q, head, shape.heads_q,
                            shape.head_dim);
  const HeadRows<const T> dout(static_cast<const T*>(p.dout), b, shape.seq_q, head, shape.heads_q,
                               shape.head_dim);
  load_tile<Tiling::kThreads>(shared.q[stage], q, walk.first, shape.seq_q);
  load_tile<Tiling::kThreads>(shared.dout[stage], dout, walk.first, shape.seq_q);
  const int row = threadIdx.x;
  if (row < Tiling::kWalkedQueries) {
    const bool valid = walk.first + row < shape.seq_q;
    const int64_t at = walk.offset() + (valid ? row : 0);
    copy_async_4(&shared.lse[stage][row], p.softmax_lse + at, valid);
    copy_async_4(&shared.delta[stage][row], delta + at, valid);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardTiling<T, kHeadDim>::kThreads,
                                  BackwardTiling<T, kHeadDim>::kBlocksPerMultiprocessor)
    key_gradient_kernel(const FlashAttentionBackward p, const float* delta) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  constexpr int kRowTiles = Tiling::kRowTiles, kColTiles = Tiling::kWalkedQueries / 8;
  auto& shared = dynamic_shared<KeyGradientStorage<Tiling, T>>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_k, Tiling::kHeld, shape.heads_k, false);
  const auto rows_of = [&](auto* tensor) {
    return HeadRows(tensor, task.b, shape.seq_k, task.head, shape.heads_k, shape.head_dim);
  };
  load_tile<Tiling::kThreads>(shared.k, rows_of(static_cast<const T*>(p.k)), task.first,
                              shape.seq_k);
  load_tile<Tiling::kThreads>(shared.v, rows_of(static_cast<const T*>(p.v)), task.first,
                              shape.seq_k);
  TileQueryWalk<Tiling> walk(shape, task);
  walk.advance();
  if (!walk.at_end()) load_queries(shared, 0, p, delta, walk);
  copy_async_commit();

  const int warp_row = warp_id() * kRowTiles * 16;
  float dk[kRowTiles][kHeadDim / 8][4] = {}, dv[kRowTiles][kHeadDim / 8][4] = {};
  for (int stage = 0; !walk.at_end(); stage ^= 1) {
    const ScoreRule rule(shape, task.b, walk.head_q());
    const int first_query = walk.first;
    const BlockState state = walk.state;
    copy_async_wait_all();
    __syncthreads();  // this stage is here; the other one is done with
    walk.advance();
    if (!walk.at_end()) load_queries(shared, stage ^ 1, p, delta, walk);
    copy_async_commit();

    float scores[kRowTiles][kColTiles][4] = {};  // transposed: rows are keys
    multiply_transposed(scores, shared.k, warp_row, shared.q[stage]);
    rule.template apply<true>(scores, task.first + warp_row, first_query, state);
    to_probabilities(scores, [&](int, int n, int c) {
      return lse_to_subtract(shared.lse[stage][col_in_tile(n, c)]);
    });
    multiply(dv, scores, shared.dout[stage]);
    float dscores[kRowTiles][kColTiles][4] = {};
    multiply_transposed(dscores, shared.v, warp_row, shared.dout[stage]);
    to_score_gradients(dscores, scores,
                       [&](int, int n, int c) { return shared.delta[stage][col_in_tile(n, c)]; });
    multiply(dk, dscores, shared.q[stage]);
  }
  copy_async_wait_all();
  __syncthreads();
  using Factor = RowValues<kRowTiles>;
  store_rows(dk, Factor::all(shape.scale), shared.k, rows_of(static_cast<T*>(p.dk)), task.first,
             shape.seq_k);
  store_rows(dv, Factor::all(1), shared.v, rows_of(static_cast<T*>(p.dv)), task.first, shape.seq_k);
}

// --- dq -----------------------------------------------------------------------------------------

template <typename Tiling, typename T>
struct QueryGradientStorage {
  SharedTile<T, Tiling::kHeld, Tiling::kHeadDim> q, dout;
  SharedTile<T, Tiling::kWalkedKeys, Tiling::kHeadDim> k[2], v[2];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(BackwardTiling<T, kHeadDim>::kThreads,
                                  BackwardTiling<T, kHeadDim>::kBlocksPerMultiprocessor)
    query_gradient_kernel(const FlashAttentionBackward p, const float* delta) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  constexpr int kThreads = Tiling::kThreads, kWalked = Tiling::kWalkedKeys;
  constexpr int kRowTiles = Tiling::kRowTiles, kColTiles = kWalked / 8;
  auto& shared = dynamic_shared<QueryGradientStorage<Tiling, T>>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, Tiling::kHeld, shape.heads_q, shape.mask.causal);
  const int64_t head_k = task.head / (shape.heads_q / shape.heads_k);
  const ScoreRule rule(shape, task.b, task.head);
  const auto query_rows = [&](auto* tensor) {
    return HeadRows(tensor, task.b, shape.seq_q, task.head, shape.heads_q, shape.head_dim);
  };
  const auto load_keys = [&](int stage, int first) {
    const HeadRows<const T> k(static_cast<const T*>(p.k), task.b, shape.seq_k, head_k,
                              shape.heads_k, shape.head_dim);
    const HeadRows<const T> v(static_cast<const T*>(p.v), task.b, shape.seq_k, head_k,
                              shape.heads_k, shape.head_dim);
    load_tile<kThreads>(shared.k[stage], k, first, shape.seq_k);
    load_tile<kThreads>(shared.v[stage], v, first, shape.seq_k);
  };
  const auto seek = [&](int first, BlockState& state) {
    return rule.template next_key_block<Tiling::kHeld, kWalked>(task.first, first, state);
  };
  load_tile<kThreads>(shared.q, query_rows(static_cast<const T*>(p.q)), task.first, shape.seq_q);
  load_tile<kThreads>(shared.dout, query_rows(static_cast<const T*>(p.dout)), task.first,
                      shape.seq_q);
  BlockState state = BlockState::kSkip;
  int first_key = seek(0, state);
  if (first_key < shape.seq_k) load_keys(0, first_key);
  copy_async_commit();

  const int warp_row = warp_id() * kRowTiles * 16;
  const int64_t head_row = (task.b * shape.heads_q + task.head) * shape.seq_q;
  const auto sums = QuerySums<kRowTiles>::load(p.softmax_lse + head_row, delta + head_row,
                                               task.first + warp_row, shape.seq_q);
  float dq[kRowTiles][kHeadDim / 8][4] = {};
  for (int stage = 0; first_key < shape.seq_k; stage ^= 1) {
    const int this_key = first_key;
    const BlockState this_state = state;
    copy_async_wait_all();
    __syncthreads();  // this stage is here; the other one is done with
    first_key = seek(first_key + kWalked, state);
    if (first_key < shape.seq_k) load_keys(stage ^ 1, first_key);
    copy_async_commit();

    float scores[kRowTiles][kColTiles][4] = {}, dscores[kRowTiles][kColTiles][4] = {};
    multiply_transposed(scores, shared.q, warp_row, shared.k[stage]);
    rule.template apply<false>(scores, task.first + warp_row, this_key, this_state);
    multiply_transposed(dscores, shared.dout, warp_row, shared.v[stage]);
    to_probabilities(scores, [&](int m, int, int c) { return sums.lse.of[m][c / 2]; });
    to_score_gradients(dscores, scores, [&](int m, int, int c) { return sums.delta.of[m][c / 2]; });
    multiply(dq, dscores, shared.k[stage]);
  }
  copy_async_wait_all();
  __syncthreads();
  store_rows(dq, RowValues<kRowTiles>::all(shape.scale), shared.q,
             query_rows(static_cast<T*>(p.dq)), task.first, shape.seq_q);
}

}  // namespace

void flash_attention_backward_sm80(const FlashAttentionBackward& p, const float* delta,
                                   Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  dispatch_head_dim(shape, [&](auto tag, auto head_dim) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Tiling = BackwardTiling<T, kHeadDim>;
    if (shape.seq_k > 0) {
      launch(attention_site("flash_attention_backward (dk, dv)", shape),
             key_gradient_kernel<T, kHeadDim>,
             attention_grid(shape.batch, shape.heads_k, shape.seq_k, Tiling::kHeld),
             dim3(Tiling::kThreads), sizeof(KeyGradientStorage<Tiling, T>), stream, p, delta);
    }
    if (shape.seq_q > 0) {
      launch(attention_site("flash_attention_backward (dq)", shape),
             query_gradient_kernel<T, kHeadDim>,
             attention_grid(shape.batch, shape.heads_q, shape.seq_q, Tiling::kHeld),
             dim3(Tiling::kThreads), sizeof(QueryGradientStorage<Tiling, T>), stream, p, delta);
    }
  });
}

}  // namespace pypkg
