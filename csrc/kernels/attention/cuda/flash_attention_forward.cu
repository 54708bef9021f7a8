// Forward attention for sm_80 and newer: FlashAttention-2's loop (Dao, 2023).
//
// A thread block holds a tile of queries and walks over tiles of keys and values. Keys and values
// have one buffer each: values are loaded while scores are computed, and the next keys while the
// values are used.
#include "attention/cuda/cuda_attention_softmax.cuh"
#include "attention/cuda/flash_attention_cuda.h"

namespace pypkg {
namespace {

template <typename T, int kHeadDim_>
struct ForwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  // As many as fit in registers without spills. Wide heads need more warps with fewer rows each.
  static constexpr int kRowTiles = kTensorCores && kHeadDim <= 128 ? 2 : 1;  // 16 queries each
  static constexpr int kWarps = kTensorCores && kHeadDim > 128 ? 8 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kQueries = kWarps * kRowTiles * 16;
  static constexpr int kBlocksPerMultiprocessor = 8 / kWarps;
  // As many as fit in registers, or in shared memory where heads have 256 dimensions.
  static constexpr int kKeys = kTensorCores     ? (kHeadDim > 64 ? 32 : 64)
                               : kHeadDim > 128 ? 8
                               : kHeadDim > 64  ? 16
                                                : 32;

  struct Storage {
    SharedTile<T, kQueries, kHeadDim> q;
    SharedTile<T, kKeys, kHeadDim> k, v;
  };
};

template <typename T, int kHeadDim, bool kCapped>
__global__ void __launch_bounds__(ForwardTiling<T, kHeadDim>::kThreads,
                                  ForwardTiling<T, kHeadDim>::kBlocksPerMultiprocessor)
    forward_kernel(const FlashAttentionForward p) {
  using Tiling = ForwardTiling<T, kHeadDim>;
  constexpr int kThreads = Tiling::kThreads, kKeys = Tiling::kKeys;
  constexpr int kRowTiles = Tiling::kRowTiles;
  auto& shared = dynamic_shared<typename Tiling::Storage>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, Tiling::kQueries, shape.heads_q, shape.mask.causal, blockIdx.x);
  const int64_t head_k = task.head / (shape.heads_q / shape.heads_k);
  const ScoreRule rule(shape, task.b, task.head);
  const HeadRows<const T> q(static_cast<const T*>(p.q), task.b, shape.seq_q, task.head,
                            shape.q_stride(), shape.head_dim);
  const HeadRows<const T> k(static_cast<const T*>(p.k), task.b, shape.seq_k, head_k,
                            shape.k_stride(), shape.head_dim);
  const HeadRows<const T> v(static_cast<const T*>(p.v), task.b, shape.seq_k, head_k,
                            shape.k_stride(), shape.head_dim);
  const auto seek = [&](int first, BlockState& state) {
    return rule.template next_key_block<Tiling::kQueries, kKeys>(task.first, first, state);
  };

  const int warp_row = warp_id() * kRowTiles * 16;
  float out[kRowTiles][kHeadDim / 8][4] = {};
  SoftmaxState<kRowTiles> softmax(rule.template unit<kCapped>());
  BlockState state = BlockState::kSkip;
  int first_key = seek(0, state);
  load_tile<kThreads>(shared.q, q, task.first, shape.seq_q);
  if (first_key < shape.seq_k) load_tile<kThreads>(shared.k, k, first_key, shape.seq_k);
  copy_async_commit();
  while (first_key < shape.seq_k) {
    copy_async_wait_all();
    __syncthreads();  // the keys have arrived; nobody uses the previous values any more
    load_tile<kThreads>(shared.v, v, first_key, shape.seq_k);
    copy_async_commit();
    float scores[kRowTiles][kKeys / 8][4] = {};
    multiply_transposed(scores, shared.q, warp_row, shared.k);
    if constexpr (kCapped) rule.template to_tangents<T>(scores);
    rule.template apply<false, kCapped>(scores, task.first + warp_row, first_key, state);
    scale_rows(out, softmax.update(scores));
    first_key = seek(first_key + kKeys, state);
    copy_async_wait_all();
    __syncthreads();  // the values have arrived; nobody uses the keys any more
    if (first_key < shape.seq_k) load_tile<kThreads>(shared.k, k, first_key, shape.seq_k);
    copy_async_commit();
    multiply(out, scores, shared.v);
  }
  copy_async_wait_all();  // the tile of the queries is reused now; no loop waited if no key is seen
  __syncthreads();
  store_result(p, task, out, softmax, shared.q);
}

}  // namespace

void flash_attention_forward_sm80(const FlashAttentionForward& p, Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  dispatch_sm80(shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    using Tiling = ForwardTiling<T, kHeadDim>;
    launch_sm80<typename Tiling::Storage>(
        attention_site("flash_attention_forward", shape),
        forward_kernel<T, kHeadDim, decltype(capped)::value>,
        attention_grid(shape.batch, shape.heads_q, shape.seq_q, Tiling::kQueries), Tiling::kThreads,
        stream, p);
  });
}

}  // namespace pypkg
