// Backward attention for sm_80 and newer, deterministic and without atomics.
//
// One kernel holds a tile of keys and values and walks over queries for dk and dv, the other holds
// a tile of queries and walks over keys for dq. Each recomputes P and dS, the first of them
// transposed, so that a warp owns whole rows of its outputs and P and dS never leave its registers.
// What is walked over has two buffers: one arrives while the other is in use. For heads of 256
// dimensions the first kernel runs twice, for dv and for dk, as registers hold one of them only.
#include "attention/cuda/cuda_attention_gradients.cuh"
#include "attention/cuda/flash_attention_cuda.h"

namespace pypkg {
namespace {

template <typename T, int kHeadDim_>
struct BackwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kHeadDim > 128;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kWarps = kWide && !kTensorCores ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kTensorCores && kHeadDim <= 64 ? 2 : 1;  // 16 rows each
  static constexpr int kHeld = kWarps * kRowTiles * 16;
  // What fits into registers, for the kernel for dk and dv has two accumulators; where heads are
  // wide, into shared memory.
  static constexpr int kWalkedQueries = kTensorCores    ? (kRowTiles * kHeadDim >= 128 ? 16 : 32)
                                        : kHeadDim > 64 ? 8
                                                        : 16;
  static constexpr int kWalkedKeys = kTensorCores ? (kWide ? 16 : 32) : kHeadDim > 64 ? 8 : 16;
  static constexpr int kBlocksPerMultiprocessor = 2;
};

// --- dk and dv ----------------------------------------------------------------------------------

// The accumulators of this kernel are transposed: rows are keys, columns are queries, and lse and
// delta, by query, are in shared memory.

enum class KeyGradients { kBoth, kDk, kDv };

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
  const HeadRows<const T> q(static_cast<const T*>(p.q), b, shape.seq_q, head, shape.q_stride(),
                            shape.head_dim);
  const HeadRows<const T> dout(static_cast<const T*>(p.dout), b, shape.seq_q, head,
                               shape.out_stride(), shape.head_dim);
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

template <typename T, int kHeadDim, bool kCapped, KeyGradients kWanted>
__global__ void __launch_bounds__(BackwardTiling<T, kHeadDim>::kThreads,
                                  BackwardTiling<T, kHeadDim>::kBlocksPerMultiprocessor)
    key_gradient_kernel(const FlashAttentionBackward p, const float* delta) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  constexpr bool kWantsDk = kWanted != KeyGradients::kDv, kWantsDv = kWanted != KeyGradients::kDk;
  constexpr int kRowTiles = Tiling::kRowTiles, kColTiles = Tiling::kWalkedQueries / 8;
  auto& shared = dynamic_shared<KeyGradientStorage<Tiling, T>>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_k, Tiling::kHeld, shape.heads_k, false);
  const auto rows_of = [&](auto* tensor) {
    return HeadRows(tensor, task.b, shape.seq_k, task.head, shape.k_stride(), shape.head_dim);
  };
  load_tile<Tiling::kThreads>(shared.k, rows_of(static_cast<const T*>(p.k)), task.first,
                              shape.seq_k);
  if constexpr (kWantsDk) {
    load_tile<Tiling::kThreads>(shared.v, rows_of(static_cast<const T*>(p.v)), task.first,
                                shape.seq_k);
  }
  TileQueryWalk<Tiling> walk(shape, task);
  walk.advance();
  if (!walk.at_end()) load_queries(shared, 0, p, delta, walk);
  copy_async_commit();

  const int warp_row = warp_id() * kRowTiles * 16;
  [[maybe_unused]] float dk[kRowTiles][kHeadDim / 8][4] = {};
  [[maybe_unused]] float dv[kRowTiles][kHeadDim / 8][4] = {};
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
    [[maybe_unused]] float dscores[kRowTiles][kColTiles][4] = {};
    const auto delta_of = [&](int, int n, int c) { return shared.delta[stage][col_in_tile(n, c)]; };
    if constexpr (kCapped) {
      rule.template to_tangents<T>(scores);
      if constexpr (kWantsDk) {
        multiply_transposed(dscores, shared.v, warp_row, shared.dout[stage]);
        apply_cap_slopes(dscores, scores, delta_of);
      }
    }
    rule.template apply<true, kCapped>(scores, task.first + warp_row, first_query, state);
    to_probabilities(scores, [&](int, int n, int c) {
      return lse_to_subtract(shared.lse[stage][col_in_tile(n, c)]);
    });
    if constexpr (kWantsDv) multiply(dv, scores, shared.dout[stage]);
    if constexpr (kWantsDk) {
      if constexpr (kCapped) {
        to_score_gradients(dscores, scores, NoDelta());
      } else {
        multiply_transposed(dscores, shared.v, warp_row, shared.dout[stage]);
        to_score_gradients(dscores, scores, delta_of);
      }
      multiply(dk, dscores, shared.q[stage]);
    }
  }
  copy_async_wait_all();
  __syncthreads();
  using Factor = RowValues<kRowTiles>;
  if constexpr (kWantsDk) {
    store_rows(dk, Factor::all(shape.scale), shared.k, rows_of(static_cast<T*>(p.dk)), task.first,
               shape.seq_k);
  }
  if constexpr (kWantsDv) {
    store_rows(dv, Factor::all(1), shared.v, rows_of(static_cast<T*>(p.dv)), task.first,
               shape.seq_k);
  }
}

// --- dq -----------------------------------------------------------------------------------------

template <typename Tiling, typename T>
struct QueryGradientStorage {
  SharedTile<T, Tiling::kHeld, Tiling::kHeadDim> q, dout;
  SharedTile<T, Tiling::kWalkedKeys, Tiling::kHeadDim> k[2], v[2];
};

template <typename T, int kHeadDim, bool kCapped>
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
  const auto query_rows = [&](auto* tensor, int64_t stride) {
    return HeadRows(tensor, task.b, shape.seq_q, task.head, stride, shape.head_dim);
  };
  const auto load_keys = [&](int stage, int first) {
    const HeadRows<const T> k(static_cast<const T*>(p.k), task.b, shape.seq_k, head_k,
                              shape.k_stride(), shape.head_dim);
    const HeadRows<const T> v(static_cast<const T*>(p.v), task.b, shape.seq_k, head_k,
                              shape.k_stride(), shape.head_dim);
    load_tile<kThreads>(shared.k[stage], k, first, shape.seq_k);
    load_tile<kThreads>(shared.v[stage], v, first, shape.seq_k);
  };
  const auto seek = [&](int first, BlockState& state) {
    return rule.template next_key_block<Tiling::kHeld, kWalked>(task.first, first, state);
  };
  load_tile<kThreads>(shared.q, query_rows(static_cast<const T*>(p.q), shape.q_stride()),
                      task.first, shape.seq_q);
  load_tile<kThreads>(shared.dout, query_rows(static_cast<const T*>(p.dout), shape.out_stride()),
                      task.first, shape.seq_q);
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
    const auto delta_of = [&](int m, int, int c) { return sums.delta.of[m][c / 2]; };
    if constexpr (kCapped) {
      multiply_transposed(dscores, shared.dout, warp_row, shared.v[stage]);
      rule.template to_tangents<T>(scores);
      apply_cap_slopes(dscores, scores, delta_of);
    }
    rule.template apply<false, kCapped>(scores, task.first + warp_row, this_key, this_state);
    if constexpr (!kCapped) {
      multiply_transposed(dscores, shared.dout, warp_row, shared.v[stage]);
    }
    to_probabilities(scores, [&](int m, int, int c) { return sums.lse.of[m][c / 2]; });
    if constexpr (kCapped) {
      to_score_gradients(dscores, scores, NoDelta());
    } else {
      to_score_gradients(dscores, scores, delta_of);
    }
    multiply(dq, dscores, shared.k[stage]);
  }
  copy_async_wait_all();
  __syncthreads();
  store_rows(dq, RowValues<kRowTiles>::all(shape.scale), shared.q,
             query_rows(static_cast<T*>(p.dq), shape.q_stride()), task.first, shape.seq_q);
}

// --- launching ----------------------------------------------------------------------------------

template <typename T, int kHeadDim, bool kCapped, KeyGradients kWanted>
void launch_key_gradients(const char* operation, const FlashAttentionBackward& p,
                          const float* delta, Stream stream) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  const FlashAttentionShape& shape = p.shape;
  launch_sm80<KeyGradientStorage<Tiling, T>>(
      attention_site(operation, shape), key_gradient_kernel<T, kHeadDim, kCapped, kWanted>,
      attention_grid(shape.batch, shape.heads_k, shape.seq_k, Tiling::kHeld), Tiling::kThreads,
      stream, p, delta);
}

}  // namespace

void flash_attention_backward_sm80(const FlashAttentionBackward& p, const float* delta,
                                   Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  dispatch_sm80(shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    using Tiling = BackwardTiling<T, kHeadDim>;
    if (shape.seq_k > 0) {
      if constexpr (Tiling::kWide) {
        launch_key_gradients<T, kHeadDim, kCapped, KeyGradients::kDv>(
            "flash_attention_backward (dv)", p, delta, stream);
        launch_key_gradients<T, kHeadDim, kCapped, KeyGradients::kDk>(
            "flash_attention_backward (dk)", p, delta, stream);
      } else {
        launch_key_gradients<T, kHeadDim, kCapped, KeyGradients::kBoth>(
            "flash_attention_backward (dk, dv)", p, delta, stream);
      }
    }
    if (shape.seq_q > 0) {
      launch_sm80<QueryGradientStorage<Tiling, T>>(
          attention_site("flash_attention_backward (dq)", shape),
          query_gradient_kernel<T, kHeadDim, kCapped>,
          attention_grid(shape.batch, shape.heads_q, shape.seq_q, Tiling::kHeld), Tiling::kThreads,
          stream, p, delta);
    }
  });
}

}  // namespace pypkg
