// Backward attention for Hopper (sm_90a), deterministic and without atomics.
//
// As in flash_attention_backward.cu one kernel is for dk and dv and one for dq, and each recomputes
// P and dS (cuda_attention_gradients.cuh). Consumers of the first hold keys and values and walk
// over blocks of queries; scores are transposed there. Those of the second hold queries and walk
// over blocks of keys. P and dS are made in registers, where the next product has its left operand.
// Of the products of a block the last one runs while the first of the next block start.
#include "attention/cuda/cuda_attention_gradients.cuh"
#include "attention/cuda/cuda_hopper_attention.cuh"

namespace pypkg {
namespace {

// Of a block, and of the rings. What fits into registers: consumers of the first kernel have two
// accumulators of results.
constexpr int kQueries = 64;
constexpr int kQueryStages = 4;
constexpr int kKeys = 128;
template <int kHeadDim>
constexpr int kKeyStages = kHeadDim == 64 ? 4 : 2;

struct HopperBackward {
  FlashAttentionBackward attention;
  const float* delta;
};

// --- dk and dv ----------------------------------------------------------------------------------

struct KeyGradientParams : HopperBackward {
  TileOrder order;
  TensorMap held[2], q, dout;  // [batch, sequence, heads, head_dim]; held are k and v
};

using Walk = QueryWalk<kQueries, kTileRows>;

template <typename T, int kHeadDim>
struct KeyGradientStorage {
  HeldTile<T, kHeadDim> held[2];  // k and v, then dk and dv
  BoxTile<T, kQueries, kHeadDim> q[kQueryStages], dout[kQueryStages];
  alignas(16) float lse[kQueryStages][kQueries], delta[kQueryStages][kQueries];  // lse_to_subtract
  Mbarrier held_full, held_empty, full[kQueryStages], empty[kQueryStages];

  __device__ void init_barriers();
};

#ifdef PYPKG_SM90A_INSTRUCTIONS

template <typename T, int kHeadDim>
__device__ void KeyGradientStorage<T, kHeadDim>::init_barriers() {
  init_barrier_pair(held_full, held_empty, 1);
  for (int i = 0; i < kQueryStages; ++i) init_barrier_pair(full[i], empty[i], 2);
}

// A warp that starts all copies and brings lse and delta itself: their rows start anywhere, the
// copy engine's at multiples of 16 bytes.
template <typename T, int kHeadDim>
class QueryProducer {
 public:
  using Storage = KeyGradientStorage<T, kHeadDim>;
  static constexpr int kThreads = kWarpSize;

  __device__ QueryProducer(const KeyGradientParams& p, Storage& shared) : p_(p), shared_(shared) {}

  __device__ void run() {
    uint32_t parity = 0;
    for (TileWalk tiles(p_.order); !tiles.done(); tiles.advance()) {
      const BlockTask task = tiles.task();
      mbarrier_wait(shared_.held_empty, parity ^ 1);
      parity ^= 1;
      if (lane_id() == 0) copy_held(shared_.held, p_.held, shared_.held_full, task);
      Walk walk(p_.attention.shape, task);
      for (walk.advance(); !walk.at_end(); walk.advance()) load_queries(task, walk);
    }
  }

 private:
  __device__ void load_queries(const BlockTask& task, const Walk& walk) {
    constexpr int kPerLane = kQueries / kWarpSize;
    const int64_t offset = walk.offset();
    float lse[kPerLane], delta[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int row = i * kWarpSize + lane_id();
      const bool valid = walk.first + row < p_.attention.shape.seq_q;
      lse[i] = valid ? lse_to_subtract(p_.attention.softmax_lse[offset + row]) : 0.0f;
      delta[i] = valid ? p_.delta[offset + row] : 0.0f;
    }
    const int stage = place_.stage;
    mbarrier_wait(shared_.empty[stage], place_.parity ^ 1);
    Mbarrier& full = shared_.full[stage];
    if (lane_id() == 0) {
      mbarrier_arrive_expect(full, sizeof(shared_.q[0]) + sizeof(shared_.dout[0]));
      copy_tile(shared_.q[stage], p_.q, full, walk.head_q(), walk.first, task.b);
      copy_tile(shared_.dout[stage], p_.dout, full, walk.head_q(), walk.first, task.b);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int row = i * kWarpSize + lane_id();
      shared_.lse[stage][row] = lse[i];
      shared_.delta[stage][row] = delta[i];
    }
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(full);
    place_.advance();
  }

  const KeyGradientParams& p_;
  Storage& shared_;
  RingPlace<kQueryStages> place_;
};

// A group of four warps with 64 keys of every tile.
template <typename T, int kHeadDim, bool kCapped>
class KeyGradientConsumer {
 public:
  using Storage = KeyGradientStorage<T, kHeadDim>;

  __device__ KeyGradientConsumer(const KeyGradientParams& p, Storage& shared)
      : p_(p), shared_(shared), group_(threadIdx.x / kGroupThreads) {}

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    for (TileWalk tiles(p_.order); !tiles.done(); tiles.advance()) {
      const BlockTask task = tiles.task();
      mbarrier_wait(shared_.held_full, parity);
      parity ^= 1;
      Gradient dk = {}, dv = {};
      accumulate(task, dk, dv);
      named_barrier_sync(kStoreBarrier + group_, kGroupThreads);
      store(task, dk, p_.attention.shape.scale, shared_.held[0], p_.attention.dk);
      store(task, dv, 1, shared_.held[1], p_.attention.dv);
      fence_proxy_async();
      release(shared_.held_empty);
    }
  }

 private:
  using Gradient = float[1][kHeadDim / 8][4];
  using Scores = float[1][kQueries / 8][4];  // transposed: rows are keys

  __device__ __forceinline__ void accumulate(const BlockTask& task, Gradient& dk, Gradient& dv) {
    PackedRows<kQueries> p, ds = {};
    bool under_way = false;  // the product for dk of the block before
    Walk walk(p_.attention.shape, task);
    for (walk.advance(); !walk.at_end(); walk.advance()) {
      const int stage = place_.stage;
      const auto& q = shared_.q[stage];
      const auto& dout = shared_.dout[stage];
      Scores scores, dscores;
      mbarrier_wait(shared_.full[stage], place_.parity);
      place_.advance();
      wgmma_fence();
      start_transposed(scores[0], shared_.held[0].group[group_], q);
      wgmma_wait<1>();  // for the block before
      wgmma_finished(dk[0]);
      wgmma_finished(ds);
      if (under_way) release_block();
      wgmma_fence();
      start_transposed(dscores[0], shared_.held[1].group[group_], dout);
      wgmma_wait<1>();
      wgmma_finished(scores[0]);
      const ScoreRule rule(p_.attention.shape, task.b, walk.head_q());
      const auto delta_of = by_query(shared_.delta[stage]);
      if constexpr (kCapped) {
        rule.template to_tangents<T>(scores);
        wgmma_wait<0>();
        wgmma_finished(dscores[0]);
        apply_cap_slopes(dscores, scores, delta_of);
      }
      rule.template apply<true, kCapped>(scores, task.first + warp_id() * 16, walk.first,
                                         walk.state);
      to_probabilities(scores, rule.template unit<kCapped>(), by_query(shared_.lse[stage]));
      pack_rows<T, kQueries>(p, scores[0]);
      wgmma_fence();
      start_product(dv[0], p, dout);
      if constexpr (kCapped) {
        to_score_gradients(dscores, scores, NoDelta());
      } else {
        wgmma_wait<1>();
        wgmma_finished(dscores[0]);
        to_score_gradients(dscores, scores, delta_of);
      }
      pack_rows<T, kQueries>(ds, dscores[0]);
      wgmma_fence();
      start_product(dk[0], ds, q);
      wgmma_wait<1>();
      wgmma_finished(dv[0]);
      wgmma_finished(p);
      under_way = true;
    }
    wgmma_wait<0>();
    wgmma_finished(dk[0]);
    wgmma_finished(ds);
    if (under_way) release_block();
  }

  // One value per column of a transposed accumulator.
  __device__ __forceinline__ static auto by_query(const float (&values)[kQueries]) {
    return [&values](int, int n, int c) { return values[col_in_tile(n, c)]; };
  }

  // The oldest block that is not released yet.
  __device__ __forceinline__ void release_block() {
    release(shared_.empty[oldest_.stage]);
    oldest_.advance();
  }

  __device__ __forceinline__ void store(const BlockTask& task, const Gradient& gradient,
                                        float factor, HeldTile<T, kHeadDim>& tile, void* target) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const HeadRows<T> rows(static_cast<T*>(target), task.b, shape.seq_k, task.head,
                           shape.k_stride(), shape.head_dim);
    store_rows(gradient, RowValues<1>::all(factor), tile.result, rows, task.first, shape.seq_k);
  }

  const KeyGradientParams& p_;
  Storage& shared_;
  const int group_;
  RingPlace<kQueryStages> place_, oldest_;
};

#endif

template <typename T, int kHeadDim, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_key_gradient_kernel(const __grid_constant__ KeyGradientParams p) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  using Storage = KeyGradientStorage<T, kHeadDim>;
  run_roles<Storage>(
      [&](Storage& shared) { return QueryProducer<T, kHeadDim>(p, shared); },
      [&](Storage& shared) { return KeyGradientConsumer<T, kHeadDim, kCapped>(p, shared); });
#endif
}

// --- dq -----------------------------------------------------------------------------------------

struct QueryGradientParams : HopperBackward {
  QueryWork<2> work;  // held are q and dout
};

template <typename T, int kHeadDim>
using QueryGradientTiling = QueryTiling<T, kHeadDim, 2, kKeys, kKeyStages<kHeadDim>>;

#ifdef PYPKG_SM90A_INSTRUCTIONS

// A group of four warps with 64 queries of every tile.
template <typename T, int kHeadDim, bool kCapped>
class QueryGradientConsumer {
 public:
  using Tiling = QueryGradientTiling<T, kHeadDim>;

  __device__ QueryGradientConsumer(const QueryGradientParams& p, typename Tiling::Storage& shared)
      : p_(p), shared_(shared), group_(threadIdx.x / kGroupThreads) {}

  __device__ __forceinline__ void run() {
    const FlashAttentionShape& shape = p_.attention.shape;
    uint32_t parity = 0;
    for (TileWalk tiles(p_.work.order); !tiles.done(); tiles.advance()) {
      const BlockTask task = tiles.task();
      mbarrier_wait(shared_.held_full, parity);
      parity ^= 1;
      Gradient dq = {};
      accumulate(task, dq);
      named_barrier_sync(kStoreBarrier + group_, kGroupThreads);
      const HeadRows<T> rows(static_cast<T*>(p_.attention.dq), task.b, shape.seq_q, task.head,
                             shape.q_stride(), shape.head_dim);
      store_rows(dq, RowValues<1>::all(shape.scale), shared_.held[0].result, rows, task.first,
                 shape.seq_q);
      fence_proxy_async();
      release(shared_.held_empty);
    }
  }

 private:
  using Gradient = float[1][kHeadDim / 8][4];
  using Scores = float[1][kKeys / 8][4];

  __device__ __forceinline__ void accumulate(const BlockTask& task, Gradient& dq) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const ScoreRule rule(shape, task.b, task.head);
    const int first_row = task.first + warp_id() * 16;
    const int64_t head_row = (task.b * shape.heads_q + task.head) * shape.seq_q;
    const auto sums = QuerySums<1>::load(p_.attention.softmax_lse + head_row, p_.delta + head_row,
                                         first_row, shape.seq_q);
    BlockState state = BlockState::kSkip;
    const auto seek = [&](int first) {
      return rule.template next_key_block<kTileRows, kKeys>(task.first, first, state);
    };
    PackedRows<kKeys> ds = {};
    bool under_way = false;  // the product for dq of the block before
    for (int key = seek(0); key < shape.seq_k; key = seek(key + kKeys)) {
      const auto& k = shared_.k[k_.stage];
      Scores scores, dscores;
      mbarrier_wait(shared_.k_full[k_.stage], k_.parity);
      k_.advance();
      wgmma_fence();
      start_transposed(scores[0], shared_.held[0].group[group_], k);
      wgmma_wait<1>();
      wgmma_finished(dq[0]);
      wgmma_finished(ds);
      if (under_way) release_keys();
      mbarrier_wait(shared_.v_full[v_.stage], v_.parity);
      wgmma_fence();
      start_transposed(dscores[0], shared_.held[1].group[group_], shared_.v[v_.stage]);
      wgmma_wait<1>();
      wgmma_finished(scores[0]);
      const auto delta_of = [&](int m, int, int c) { return sums.delta.of[m][c / 2]; };
      if constexpr (kCapped) {
        rule.template to_tangents<T>(scores);
        finish_dscores(dscores[0]);
        apply_cap_slopes(dscores, scores, delta_of);
      }
      rule.template apply<false, kCapped>(scores, first_row, key, state);
      to_probabilities(scores, rule.template unit<kCapped>(),
                       [&](int m, int, int c) { return sums.lse.of[m][c / 2]; });
      if constexpr (kCapped) {
        to_score_gradients(dscores, scores, NoDelta());
      } else {
        finish_dscores(dscores[0]);
        to_score_gradients(dscores, scores, delta_of);
      }
      pack_rows<T, kKeys>(ds, dscores[0]);
      wgmma_fence();
      start_product(dq[0], ds, k);
      under_way = true;
    }
    wgmma_wait<0>();
    wgmma_finished(dq[0]);
    wgmma_finished(ds);
    if (under_way) release_keys();
  }

  __device__ __forceinline__ void finish_dscores(float (&dscores)[kKeys / 8][4]) {
    wgmma_wait<0>();
    wgmma_finished(dscores);
    release(shared_.v_empty[v_.stage]);
    v_.advance();
  }

  // The oldest block of keys that is not released yet.
  __device__ __forceinline__ void release_keys() {
    release(shared_.k_empty[oldest_.stage]);
    oldest_.advance();
  }

  const QueryGradientParams& p_;
  typename Tiling::Storage& shared_;
  const int group_;
  RingPlace<kKeyStages<kHeadDim>> k_, v_, oldest_;
};

#endif

template <typename T, int kHeadDim, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_query_gradient_kernel(const __grid_constant__ QueryGradientParams p) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  using Tiling = QueryGradientTiling<T, kHeadDim>;
  using Storage = typename Tiling::Storage;
  run_roles<Storage>(
      [&](Storage& shared) { return KeyProducer<Tiling>(p.attention.shape, p.work, shared); },
      [&](Storage& shared) { return QueryGradientConsumer<T, kHeadDim, kCapped>(p, shared); });
#endif
}

// --- launching ----------------------------------------------------------------------------------

template <typename T, int kHeadDim, bool kCapped>
void launch_key_gradients(const HopperBackward& backward, Stream stream) {
  const FlashAttentionBackward& p = backward.attention;
  const FlashAttentionShape& s = p.shape;
  const int64_t walked_bytes = 4 * s.seq_q * s.head_dim * (s.heads_q / s.heads_k);
  const KeyGradientParams params{
      backward,
      tile_order(s.batch, s.heads_k, s.seq_k, walked_bytes, 1, false),
      {head_rows_map(s, p.k, s.seq_k, s.heads_k, s.k_stride(), kGroupRows),
       head_rows_map(s, p.v, s.seq_k, s.heads_k, s.k_stride(), kGroupRows)},
      head_rows_map(s, p.q, s.seq_q, s.heads_q, s.q_stride(), kQueries),
      head_rows_map(s, p.dout, s.seq_q, s.heads_q, s.out_stride(), kQueries)};
  launch_hopper<KeyGradientStorage<T, kHeadDim>>(
      attention_site("flash_attention_backward (Hopper, dk and dv)", s),
      hopper_key_gradient_kernel<T, kHeadDim, kCapped>, params, params.order, stream);
}

template <typename T, int kHeadDim, bool kCapped>
void launch_query_gradient(const HopperBackward& backward, Stream stream) {
  using Tiling = QueryGradientTiling<T, kHeadDim>;
  const FlashAttentionBackward& p = backward.attention;
  const QueryGradientParams params{backward, query_work<Tiling>(p.shape, {p.q, p.dout}, p.k, p.v)};
  launch_hopper<typename Tiling::Storage>(
      attention_site("flash_attention_backward (Hopper, dq)", p.shape),
      hopper_query_gradient_kernel<T, kHeadDim, kCapped>, params, params.work.order, stream);
}

}  // namespace

void flash_attention_backward_sm90(const FlashAttentionBackward& p, const float* delta,
                                   Stream stream) {
  dispatch_hopper(p.shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    constexpr int kHeadDim = decltype(head_dim)::value;
    constexpr bool kCapped = decltype(capped)::value;
    launch_key_gradients<T, kHeadDim, kCapped>({p, delta}, stream);
    launch_query_gradient<T, kHeadDim, kCapped>({p, delta}, stream);
  });
}

}  // namespace pypkg
