// Backward attention for sm_80 and newer. It is deterministic: two runs give the same bits.
//
// One kernel computes dk and dv: a thread block holds a tile of keys and values and walks over the
// queries. It computes the scores transposed. A warp then owns whole rows of its outputs, and P and
// dS stay in registers as operands of the next products. Queries have two buffers: one is loaded
// while the other is in use. There are two ways to compute dq:
//
// - Five products. The same kernel multiplies dS (through shared memory) by its keys and adds the
//   result to a sum in device memory, in a fixed order. A last kernel rounds the sum. This needs
//   16-bit types, 64 to 128 dimensions, and a device with enough shared memory per block.
// - Seven products. A second kernel holds a tile of queries, walks over keys, and computes P and dS
//   again. For heads of 256 dimensions the first kernel runs twice, once for dv and once for dk,
//   because registers hold only one of them.
#include "attention/cuda/cuda_attention_gradients.cuh"
#include "attention/cuda/flash_attention_cuda.h"

namespace pypkg {
namespace {

template <int kHeadDim_>
struct FiveProductTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = 1;
  static constexpr int kHeld = kWarps * 16;
  static constexpr int kWalkedQueries = 64;
  static constexpr int kQueriesTogether = kHeadDim > 96 ? 32 : 64;
  static constexpr int kBlocksPerMultiprocessor = 1;

  using QueryGradient = OrderedSumLayout<kWalkedQueries, kHeadDim, kWarps>;
};

template <typename T, int kHeadDim_>
struct BackwardTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kHeadDim > 128;
  static constexpr bool kTensorCores = sizeof(T) == 2;
  static constexpr int kWarps = kWide && !kTensorCores ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kTensorCores && kHeadDim <= 64 ? 2 : 1;  // 16 rows each
  static constexpr int kHeld = kWarps * kRowTiles * 16;
  // Limited by registers, because the kernel for dk and dv has two accumulators. Limited by shared
  // memory where heads are wide.
  static constexpr int kWalkedQueries = kTensorCores    ? (kRowTiles * kHeadDim >= 128 ? 16 : 32)
                                        : kHeadDim > 64 ? 8
                                                        : 16;
  static constexpr int kQueriesTogether = kWalkedQueries;  // queries with scores in registers
  static constexpr int kWalkedKeys = kTensorCores ? (kWide ? 16 : 32) : kHeadDim > 64 ? 8 : 16;
  static constexpr int kBlocksPerMultiprocessor = 2;
};

template <typename T, int kHeadDim>
constexpr bool has_five_products = sizeof(T) == 2 && kHeadDim >= 64 && kHeadDim <= 128;

// --- dk and dv, with dq by five products --------------------------------------------------------

// The accumulators of this kernel are transposed: rows are keys and columns are queries. lse and
// delta, one value per query, are in shared memory.

enum class Wanted { kDkDv, kDk, kDv, kAll };

template <typename T, int kHeadDim, Wanted kWanted>
using KeyTiling = std::conditional_t<kWanted == Wanted::kAll, FiveProductTiling<kHeadDim>,
                                     BackwardTiling<T, kHeadDim>>;

template <typename Tiling, typename T>
struct KeyGradientStorage {
  SharedTile<T, Tiling::kHeld, Tiling::kHeadDim> k, v;
  SharedTile<T, Tiling::kWalkedQueries, Tiling::kHeadDim> q[2], dout[2];
  float lse[2][Tiling::kWalkedQueries];
  float delta[2][Tiling::kWalkedQueries];
};

template <typename Tiling, typename T>
struct FiveProductStorage : KeyGradientStorage<Tiling, T> {
  SharedTile<T, Tiling::kHeld, Tiling::kWalkedQueries> dscores;  // transposed: rows are keys
  unsigned ticket;
};

template <typename T, int kHeadDim, Wanted kWanted>
using KeyStorage =
    std::conditional_t<kWanted == Wanted::kAll, FiveProductStorage<FiveProductTiling<kHeadDim>, T>,
                       KeyGradientStorage<BackwardTiling<T, kHeadDim>, T>>;

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

// Adds the term of this block of keys to dq of a tile of queries (five products).
template <typename Tiling, typename T>
__device__ __forceinline__ void add_query_gradient(FiveProductStorage<Tiling, T>& shared,
                                                   float* sum, bool is_first) {
  using Layout = typename Tiling::QueryGradient;
  typename Layout::Accumulator dq = {};
  multiply_left_transposed(dq, shared.dscores, Layout::first_row(), shared.k, Layout::first_col());
  float* own = sum + threadIdx.x;
  const auto for_each = [&](auto&& f) {
#pragma unroll
    for (int m = 0; m < Layout::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Layout::kCols / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) f(own + Layout::position(m, n, c, 0), dq[m][n][c]);
      }
    }
  };
  if (is_first) {
    for_each([](float* target, float term) { *target = term; });
  } else {
    for_each([](float* target, float term) { add_to_memory(target, term); });
  }
}

template <typename T, int kHeadDim, bool kCapped, Wanted kWanted>
__global__ void __launch_bounds__(KeyTiling<T, kHeadDim, kWanted>::kThreads,
                                  KeyTiling<T, kHeadDim, kWanted>::kBlocksPerMultiprocessor)
    key_gradient_kernel(const FlashAttentionBackward p, const BackwardWorkspace workspace) {
  using Tiling = KeyTiling<T, kHeadDim, kWanted>;
  constexpr bool kWantsAll = kWanted == Wanted::kAll;
  constexpr bool kWantsDk = kWanted != Wanted::kDv, kWantsDv = kWanted != Wanted::kDk;
  constexpr int kRowTiles = Tiling::kRowTiles, kTogether = Tiling::kQueriesTogether;
  auto& shared = dynamic_shared<KeyStorage<T, kHeadDim, kWanted>>();
  const FlashAttentionShape& shape = p.shape;
  unsigned flat_index = blockIdx.x;
  if constexpr (kWantsAll) {
    if (threadIdx.x == 0) shared.ticket = take_ticket(workspace.dq_sums.ticket());
    __syncthreads();
    flat_index = shared.ticket;
  }
  const BlockTask task(shape.seq_k, Tiling::kHeld, shape.heads_k, kWantsAll, flat_index);
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
  if (!walk.at_end()) load_queries(shared, 0, p, workspace.delta, walk);
  copy_async_commit();

  const int warp_row = warp_id() * kRowTiles * 16;
  [[maybe_unused]] float dk[kRowTiles][kHeadDim / 8][4] = {};
  [[maybe_unused]] float dv[kRowTiles][kHeadDim / 8][4] = {};
  [[maybe_unused]] int tile = -1;  // the tile of queries whose dq this block may add to
  [[maybe_unused]] const auto pass_on_turn = [&] {
    if (tile >= 0 && threadIdx.x == 0) workspace.dq_sums.pass_on(tile, task.first);
  };
  for (int stage = 0; !walk.at_end(); stage ^= 1) {
    const ScoreRule rule(shape, task.b, walk.head_q());
    const int first_query = walk.first;
    const BlockState state = walk.state;
    copy_async_wait_all();
    __syncthreads();  // this stage has arrived; nobody uses the other one or dS any more
    if constexpr (kWantsAll) pass_on_turn();
    tile = walk.tile();
    walk.advance();
    if (!walk.at_end()) load_queries(shared, stage ^ 1, p, workspace.delta, walk);
    copy_async_commit();

#pragma unroll 1
    for (int part = 0; part < Tiling::kWalkedQueries; part += kTogether) {
      const auto& q = shared.q[stage].template part<kTogether>(part);
      const auto& dout = shared.dout[stage].template part<kTogether>(part);
      const float *lse = shared.lse[stage] + part, *delta = shared.delta[stage] + part;
      const auto delta_of = [&](int, int n, int c) { return delta[col_in_tile(n, c)]; };
      float scores[kRowTiles][kTogether / 8][4] = {};  // transposed: rows are keys
      multiply_transposed(scores, shared.k, warp_row, q);
      [[maybe_unused]] float dscores[kRowTiles][kTogether / 8][4] = {};
      if constexpr (kWantsDk) multiply_transposed(dscores, shared.v, warp_row, dout);
      if constexpr (kCapped) {
        rule.template to_tangents<T>(scores);
        if constexpr (kWantsDk) apply_cap_slopes(dscores, scores, delta_of);
      }
      rule.template apply<true, kCapped>(scores, task.first + warp_row, first_query + part, state);
      to_probabilities(scores, rule.template unit<kCapped>(),
                       [&](int, int n, int c) { return lse_to_subtract(lse[col_in_tile(n, c)]); });
      if constexpr (kWantsDk && kCapped) to_score_gradients(dscores, scores, NoDelta());
      if constexpr (kWantsDk && !kCapped) to_score_gradients(dscores, scores, delta_of);
      if constexpr (kWantsAll) store_operand(shared.dscores, warp_row, part, dscores);
      if constexpr (kWantsDv) multiply(dv, scores, dout);
      if constexpr (kWantsDk) multiply(dk, dscores, q);
    }
    if constexpr (kWantsAll) {
      const int neighbour = task.first + Tiling::kHeld;
      const bool has_neighbour = neighbour < shape.seq_k &&
                                 rule.template block_state<Tiling::kWalkedQueries, Tiling::kHeld>(
                                     first_query, neighbour) != BlockState::kSkip;
      if (has_neighbour && threadIdx.x == 0) workspace.dq_sums.wait(tile, neighbour);
      __syncthreads();  // all warps have written dS, and it is this block's turn
      add_query_gradient(shared,
                         workspace.dq_sums.tiles + int64_t(tile) * Tiling::QueryGradient::kSize,
                         !has_neighbour);
    }
  }
  copy_async_wait_all();
  __syncthreads();
  if constexpr (kWantsAll) pass_on_turn();
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

constexpr int kRoundingThreads = 256;

// dq = scale * sum, one tile of queries per block; zero for queries that see no key.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRoundingThreads)
    query_gradient_sum_kernel(const FlashAttentionBackward p, const OrderedSums sums) {
  using Tiling = FiveProductTiling<kHeadDim>;
  using Layout = typename Tiling::QueryGradient;
  constexpr int kChunks = kHeadDim / 8;
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, Tiling::kWalkedQueries, shape.heads_q, false, blockIdx.x);
  const HeadRows<T> rows(static_cast<T*>(p.dq), task.b, shape.seq_q, task.head, shape.q_stride(),
                         shape.head_dim);
  const float* sum = sums.tiles + int64_t(blockIdx.x) * Layout::kSize;
  const bool is_seen = sums.state[blockIdx.x] != 0;
  // A warp covers four chunks of eight rows.
  for (int id = threadIdx.x; id < Tiling::kWalkedQueries * kChunks; id += kRoundingThreads) {
    const int row = id / (8 * kChunks) * 8 + id / 4 % 8;
    const int chunk = id / kWarpSize % (kChunks / 4) * 4 + id % 4;
    if (task.first + row >= shape.seq_q || 8 * chunk >= shape.head_dim) continue;
    Pack<float, 4> even = {}, odd = {};
    if (is_seen) {
      const float* source = sum + Layout::position_of_chunk(row, chunk);
      even = Pack<float, 4>::load(source);
      odd = Pack<float, 4>::load(source + Layout::kThreads);
    }
    Pack<T, 8> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.set(2 * i, even[i] * shape.scale);
      result.set(2 * i + 1, odd[i] * shape.scale);
    }
    result.store(rows.data + (task.first + row) * rows.stride + 8 * chunk);
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
    query_gradient_kernel(const FlashAttentionBackward p, const BackwardWorkspace workspace) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  constexpr int kThreads = Tiling::kThreads, kWalked = Tiling::kWalkedKeys;
  constexpr int kRowTiles = Tiling::kRowTiles, kColTiles = kWalked / 8;
  auto& shared = dynamic_shared<QueryGradientStorage<Tiling, T>>();
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, Tiling::kHeld, shape.heads_q, shape.mask.causal, blockIdx.x);
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
  const auto sums = QuerySums<kRowTiles>::load(p.softmax_lse + head_row, workspace.delta + head_row,
                                               task.first + warp_row, shape.seq_q);
  float dq[kRowTiles][kHeadDim / 8][4] = {};
  for (int stage = 0; first_key < shape.seq_k; stage ^= 1) {
    const int this_key = first_key;
    const BlockState this_state = state;
    copy_async_wait_all();
    __syncthreads();  // this stage has arrived; nobody uses the other one any more
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
    to_probabilities(scores, rule.template unit<kCapped>(),
                     [&](int m, int, int c) { return sums.lse.of[m][c / 2]; });
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

template <typename T, int kHeadDim, bool kCapped, Wanted kWanted>
void launch_key_gradients(const char* operation, const FlashAttentionBackward& p,
                          const BackwardWorkspace& workspace, Stream stream) {
  using Tiling = KeyTiling<T, kHeadDim, kWanted>;
  const FlashAttentionShape& shape = p.shape;
  launch_sm80<KeyStorage<T, kHeadDim, kWanted>, kWanted == Wanted::kAll>(
      attention_site(operation, shape), key_gradient_kernel<T, kHeadDim, kCapped, kWanted>,
      attention_grid(shape.batch, shape.heads_k, shape.seq_k, Tiling::kHeld), Tiling::kThreads,
      stream, p, workspace);
}

template <typename T, int kHeadDim, bool kCapped>
void launch_five_products(const FlashAttentionBackward& p, const BackwardWorkspace& workspace,
                          Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  launch_key_gradients<T, kHeadDim, kCapped, Wanted::kAll>(
      "flash_attention_backward (dk, dv, sum of dq)", p, workspace, stream);
  launch(attention_site("flash_attention_backward (dq of its sum)", shape),
         query_gradient_sum_kernel<T, kHeadDim>,
         attention_grid(shape.batch, shape.heads_q, shape.seq_q,
                        FiveProductTiling<kHeadDim>::kWalkedQueries),
         dim3(kRoundingThreads), 0, stream, p, workspace.dq_sums);
}

template <typename T, int kHeadDim, bool kCapped>
void launch_seven_products(const FlashAttentionBackward& p, const BackwardWorkspace& workspace,
                           Stream stream) {
  using Tiling = BackwardTiling<T, kHeadDim>;
  const FlashAttentionShape& shape = p.shape;
  if (shape.seq_k > 0) {
    if constexpr (Tiling::kWide) {
      launch_key_gradients<T, kHeadDim, kCapped, Wanted::kDv>("flash_attention_backward (dv)", p,
                                                              workspace, stream);
      launch_key_gradients<T, kHeadDim, kCapped, Wanted::kDk>("flash_attention_backward (dk)", p,
                                                              workspace, stream);
    } else {
      launch_key_gradients<T, kHeadDim, kCapped, Wanted::kDkDv>("flash_attention_backward (dk, dv)",
                                                                p, workspace, stream);
    }
  }
  if (shape.seq_q > 0) {
    launch_sm80<QueryGradientStorage<Tiling, T>>(
        attention_site("flash_attention_backward (dq)", shape),
        query_gradient_kernel<T, kHeadDim, kCapped>,
        attention_grid(shape.batch, shape.heads_q, shape.seq_q, Tiling::kHeld), Tiling::kThreads,
        stream, p, workspace);
  }
}

}  // namespace

DqSumSizes dq_sum_sizes_sm80(const FlashAttentionShape& shape) {
  DqSumSizes sizes;
  dispatch_sm80(shape, [&](auto tag, auto head_dim, auto) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    if constexpr (has_five_products<T, kHeadDim>) {
      using Tiling = FiveProductTiling<kHeadDim>;
      constexpr int kNeeded = sizeof(FiveProductStorage<Tiling, T>);
      if (shape.seq_q == 0 || shape.seq_k == 0 || kNeeded > shared_memory_limit()) return;
      sizes.tiles =
          shape.batch * shape.heads_q * ceil_div<int64_t>(shape.seq_q, Tiling::kWalkedQueries);
      sizes.tile_size = Tiling::QueryGradient::kSize;
    }
  });
  return sizes;
}

void flash_attention_backward_sm80(const FlashAttentionBackward& p,
                                   const BackwardWorkspace& workspace, Stream stream) {
  dispatch_sm80(p.shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    if constexpr (has_five_products<T, kHeadDim>) {
      if (workspace.dq_sums.count > 0) {
        return launch_five_products<T, kHeadDim, kCapped>(p, workspace, stream);
      }
    }
    launch_seven_products<T, kHeadDim, kCapped>(p, workspace, stream);
  });
}

}  // namespace pypkg
