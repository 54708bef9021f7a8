// Backward attention for Hopper (sm_90a). It is deterministic: two runs give the same bits.
//
// One kernel computes the five products. The consumers hold keys and values and walk over blocks of
// queries. They compute the scores transposed, so that P and dS are in registers as the left
// operands of the products for dv and dk. dS also goes to shared memory. Each group then multiplies
// dS of both groups by all keys that the block holds. That is half of the block's term of dq. The
// group adds it to a sum in device memory, in the order of cuda_attention_ordered_sum.cuh, while
// the product for dk runs. A second kernel rounds the sums.
#include "attention/cuda/cuda_attention_gradients.cuh"
#include "attention/cuda/cuda_hopper_attention.cuh"

namespace pypkg {
namespace {

// Queries of a block and buffers of a ring: as many as fit in registers and shared memory.
template <int kHeadDim>
constexpr int kQueries = kHeadDim == 64 ? 128 : 64;
constexpr int kStages = 3;

struct HopperBackward {
  FlashAttentionBackward attention;
  OrderedSums sums;
  const float* delta;
  TileOrder order;             // of the tiles of keys
  TensorMap held[2], q, dout;  // [batch, sequence, heads, head_dim]; `held` is k and v
};

// How a tile of dq is distributed over the consumers, and how its sum lies in memory. A group owns
// 64 x 64 elements: half of the dimensions, or half of the queries. The four elements that a thread
// has in a column tile are contiguous, and those of the next thread follow.
template <int kHeadDim>
struct QueryGradientLayout {
  static constexpr int kSize = kQueries<kHeadDim> * kHeadDim;
  static constexpr int kColTiles = kBoxDims / 8;
  static_assert(kSize == kConsumers * kColTiles * 4);

  __device__ static constexpr bool splits_queries() { return kHeadDim == kBoxDims; }
  // The box of dS^T that a group multiplies by the box of k.
  __device__ static int query_box(int group) { return splits_queries() ? group : 0; }
  __device__ static int key_box(int group) { return splits_queries() ? 0 : group; }
  __device__ static int position(int n, int thread) { return (n * kConsumers + thread) * 4; }
};

// Describes the block of queries in a buffer of the ring, for the threads that wait for it.
struct WalkedBlock {
  enum End : int {
    kNoMore = -1,  // the held tile has no more blocks of queries
    kEnd = -2,     // no tile follows
  };

  int tile;  // index of the tile of dq, or an End if the buffer holds no queries
  int head_q, first;
  BlockState state;
  int b, first_key;  // of the held tile
};

template <typename T, int kHeadDim>
struct Storage {
  static constexpr int kRows = kQueries<kHeadDim>;

  HeldTile<T, kHeadDim> held[2];  // k and v, then dk and dv
  BoxTile<T, kRows, kHeadDim> q[kStages], dout[kStages];
  BoxTile<T, kTileRows, kRows> dscores[2];  // of this and the previous block; rows are keys
  alignas(16) float lse[kStages][kRows], delta[kStages][kRows];  // lse_to_subtract
  WalkedBlock block[kStages];
  Mbarrier held_full, held_empty, full[kStages], empty[kStages];
  Mbarrier turn, added;  // `turn`: this block may add to a sum; `added`: its threads have done so
  BlockTask task;        // the held tile; its first row is negative after the last tile
  float* sum;            // the sum that this block adds to at its turn
  bool starts_sum;       // whether this block is the first that adds to it

  __device__ void init_barriers();
};

#ifdef PYPKG_SM90A_INSTRUCTIONS

template <typename T, int kHeadDim>
__device__ void Storage<T, kHeadDim>::init_barriers() {
  init_barrier_pair(held_full, held_empty, 1);
  init_barrier_pair(turn, added, 1);
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(full[i], 2);
    mbarrier_init(empty[i], kConsumers / kWarpSize + 1);  // + 1 for the turn keeper
  }
}

// The warp that starts all copies. It loads lse and delta itself, because their rows may start
// anywhere and the copy engine needs multiples of 16 bytes.
template <typename T, int kHeadDim>
class Loader {
 public:
  __device__ Loader(const HopperBackward& p, Storage<T, kHeadDim>& shared)
      : p_(p), shared_(shared) {}

  // Blocks take tiles by ticket, so a block waits only for tiles that have already started.
  __device__ void run() {
    for (uint32_t parity = 1;; parity ^= 1) {
      mbarrier_wait(shared_.held_empty, parity);
      int ticket = 0;
      if (lane_id() == 0) ticket = take_ticket(p_.sums.ticket());
      ticket = __shfl_sync(kFullWarp, ticket, 0);
      if (ticket >= p_.order.tiles()) break;
      const BlockTask task = p_.order.task(ticket);
      if (lane_id() == 0) {
        shared_.task = task;
        copy_held(shared_.held, p_.held, shared_.held_full, task);
      }
      Walk walk(p_.attention.shape, task);
      for (walk.advance(); !walk.at_end(); walk.advance()) load_queries(task, walk);
      mark(WalkedBlock::kNoMore);
    }
    mark(WalkedBlock::kEnd);
    if (lane_id() == 0) {
      shared_.task.first = -1;
      mbarrier_arrive(shared_.held_full);
    }
  }

 private:
  static constexpr int kRows = kQueries<kHeadDim>;
  using Walk = QueryWalk<kRows, kTileRows>;

  __device__ void load_queries(const BlockTask& task, const Walk& walk) {
    constexpr int kPerLane = kRows / kWarpSize;
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
      shared_.block[stage] = {
          walk.tile(), static_cast<int>(walk.head_q()), walk.first, walk.state, task.b, task.first};
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

  // Puts an End, without queries, into the next buffer of the ring.
  __device__ void mark(int end) {
    mbarrier_wait(shared_.empty[place_.stage], place_.parity ^ 1);
    if (lane_id() == 0) {
      shared_.block[place_.stage].tile = end;
      mbarrier_arrive(shared_.full[place_.stage]);
      mbarrier_arrive(shared_.full[place_.stage]);
    }
    place_.advance();
  }

  const HopperBackward& p_;
  Storage<T, kHeadDim>& shared_;
  RingPlace<kStages> place_;
};

// The thread that waits for the block's turn at each sum and passes it on. It spares the consumers
// the latency of device memory.
template <typename T, int kHeadDim>
class TurnKeeper {
 public:
  __device__ TurnKeeper(const HopperBackward& p, Storage<T, kHeadDim>& shared)
      : p_(p), shared_(shared) {}

  __device__ void run() {
    RingPlace<kStages> place;
    uint32_t parity = 0;  // of `added`
    while (true) {
      mbarrier_wait(shared_.full[place.stage], place.parity);
      const WalkedBlock block = shared_.block[place.stage];
      if (block.tile == WalkedBlock::kEnd) return;
      mbarrier_arrive(shared_.empty[place.stage]);
      place.advance();
      if (block.tile == WalkedBlock::kNoMore) continue;
      keep(block, parity);
      parity ^= 1;
    }
  }

 private:
  __device__ void keep(const WalkedBlock& block, uint32_t parity) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const ScoreRule rule(shape, block.b, block.head_q);
    const int neighbour = block.first_key + kTileRows;
    const bool has_neighbour =
        neighbour < shape.seq_k && rule.template block_state<kQueries<kHeadDim>, kTileRows>(
                                       block.first, neighbour) != BlockState::kSkip;
    if (has_neighbour) p_.sums.wait(block.tile, neighbour);
    shared_.starts_sum = !has_neighbour;
    shared_.sum = p_.sums.tiles + int64_t(block.tile) * QueryGradientLayout<kHeadDim>::kSize;
    mbarrier_arrive(shared_.turn);
    mbarrier_wait(shared_.added, parity);
    p_.sums.pass_on(block.tile, block.first_key);
  }

  const HopperBackward& p_;
  Storage<T, kHeadDim>& shared_;
};

template <typename T, int kHeadDim>
class Producer {
 public:
  static constexpr int kThreads = kWarpSize + 1;

  __device__ Producer(const HopperBackward& p, Storage<T, kHeadDim>& shared)
      : p_(p), shared_(shared) {}

  __device__ void run() {
    if (threadIdx.x < kConsumers + kWarpSize) {
      Loader<T, kHeadDim>(p_, shared_).run();
    } else {
      TurnKeeper<T, kHeadDim>(p_, shared_).run();
    }
  }

 private:
  const HopperBackward& p_;
  Storage<T, kHeadDim>& shared_;
};

// A group of four warps with 64 keys of every tile.
template <typename T, int kHeadDim, bool kCapped>
class Consumer {
 public:
  __device__ Consumer(const HopperBackward& p, Storage<T, kHeadDim>& shared)
      : p_(p), shared_(shared), group_(threadIdx.x / kGroupThreads) {}

  __device__ __forceinline__ void run() {
    for (uint32_t parity = 0;; parity ^= 1) {
      mbarrier_wait(shared_.held_full, parity);
      const BlockTask task = shared_.task;
      if (task.first < 0) return;
      Gradient dk = {}, dv = {};
      accumulate(task, dk, dv);
      named_barrier_sync(kScoresBarrier, kConsumers);  // both groups have read all keys
      store(task, dk, p_.attention.shape.scale, shared_.held[0], p_.attention.dk);
      store(task, dv, 1, shared_.held[1], p_.attention.dv);
      fence_proxy_async();
      release(shared_.held_empty);
    }
  }

 private:
  static constexpr int kRows = kQueries<kHeadDim>;
  using Layout = QueryGradientLayout<kHeadDim>;
  using Gradient = float[1][kHeadDim / 8][4];
  using Scores = float[1][kRows / 8][4];  // transposed: rows are keys
  using QueryGradient = float[Layout::kColTiles][4];

  __device__ __forceinline__ void accumulate(const BlockTask& task, Gradient& dk, Gradient& dv) {
    while (true) {
      const int stage = place_.stage;
      mbarrier_wait(shared_.full[stage], place_.parity);
      place_.advance();
      const WalkedBlock& block = shared_.block[stage];
      const int first = block.first;
      const BlockState state = block.state;
      if (block.tile < 0) {
        release(shared_.empty[stage]);
        return;
      }
      const ScoreRule rule(p_.attention.shape, task.b, block.head_q);
      const auto& q = shared_.q[stage];
      const auto& dout = shared_.dout[stage];
      Scores scores, dscores;
      PackedRows<kRows> p, ds;
      QueryGradient dq;
      wgmma_fence();
      start_transposed(scores[0], shared_.held[0].group[group_], q);
      start_transposed(dscores[0], shared_.held[1].group[group_], dout);
      wgmma_wait<1>();
      wgmma_finished(scores[0]);
      const auto delta_of = by_query(shared_.delta[stage]);
      if constexpr (kCapped) {
        rule.template to_tangents<T>(scores);
        wgmma_wait<0>();
        wgmma_finished(dscores[0]);
        apply_cap_slopes(dscores, scores, delta_of);
      }
      rule.template apply<true, kCapped>(scores, task.first + warp_id() * 16, first, state);
      to_probabilities(scores, rule.template unit<kCapped>(), by_query(shared_.lse[stage]));
      // dS is computed before the product for dv starts. With that product in flight beside scores
      // and their gradients, registers would suffice only at head dim 128 without a cap.
      if constexpr (kCapped) {
        to_score_gradients(dscores, scores, NoDelta());
      } else {
        wgmma_wait<0>();
        wgmma_finished(dscores[0]);
        to_score_gradients(dscores, scores, delta_of);
      }
      pack_rows<T, kRows>(p, scores[0]);
      pack_rows<T, kRows>(ds, dscores[0]);
      wgmma_fence();
      start_product(dv[0], p, dout);
      auto& all_ds = shared_.dscores[parity_];
      store_packed(all_ds, ds);
      fence_proxy_async();
      // A group that arrives here has finished its products with dS of the previous block, so the
      // next block may overwrite it.
      named_barrier_sync(kScoresBarrier, kConsumers);
      wgmma_fence();
      start_left_transposed(dq, all_ds, Layout::query_box(group_), shared_.held[0],
                            Layout::key_box(group_));
      start_product(dk[0], ds, q);
      wgmma_wait<1>();
      wgmma_finished(dv[0]);
      wgmma_finished(p);
      wgmma_finished(dq);
      add_to_sum(dq);
      wgmma_wait<0>();
      wgmma_finished(dk[0]);
      wgmma_finished(ds);
      release(shared_.empty[stage]);
    }
  }

  __device__ __forceinline__ void add_to_sum(const QueryGradient& dq) {
    mbarrier_wait(shared_.turn, parity_);
    parity_ ^= 1;
    float* const own = shared_.sum + Layout::position(0, threadIdx.x);
    if (shared_.starts_sum) {
#pragma unroll
      for (int n = 0; n < Layout::kColTiles; ++n) {
        Pack<float, 4>{{dq[n][0], dq[n][1], dq[n][2], dq[n][3]}}.store(own +
                                                                       Layout::position(n, 0));
      }
    } else {
#pragma unroll
      for (int n = 0; n < Layout::kColTiles; ++n) {
        add_to_memory(own + Layout::position(n, 0), dq[n]);
      }
    }
    release(shared_.added);
  }

  // Returns the value of the query of an element: columns of the accumulator are queries.
  __device__ __forceinline__ static auto by_query(const float (&values)[kRows]) {
    return [&values](int, int n, int c) { return values[col_in_tile(n, c)]; };
  }

  __device__ __forceinline__ void store(const BlockTask& task, const Gradient& gradient,
                                        float factor, HeldTile<T, kHeadDim>& tile, void* target) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const HeadRows<T> rows(static_cast<T*>(target), task.b, shape.seq_k, task.head,
                           shape.k_stride(), shape.head_dim);
    store_rows(gradient, RowValues<1>::all(factor), tile.result, rows, task.first, shape.seq_k);
  }

  const HopperBackward& p_;
  Storage<T, kHeadDim>& shared_;
  const int group_;
  RingPlace<kStages> place_;
  uint32_t parity_ = 0;  // of the number of blocks of queries
};

#endif

template <typename T, int kHeadDim, bool kCapped>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_backward_kernel(const __grid_constant__ HopperBackward p) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  using Shared = Storage<T, kHeadDim>;
  run_roles<Shared>([&](Shared& shared) { return Producer<T, kHeadDim>(p, shared); },
                    [&](Shared& shared) { return Consumer<T, kHeadDim, kCapped>(p, shared); });
#endif
}

// --- dq -----------------------------------------------------------------------------------------

constexpr int kRoundingThreads = 256;

// dq = scale * sum, one tile of queries per block; zero for queries that see no key.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kRoundingThreads)
    hopper_query_gradient_sum_kernel(const FlashAttentionBackward p, const OrderedSums sums) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  using Layout = QueryGradientLayout<kHeadDim>;
  constexpr int kRows = kQueries<kHeadDim>, kChunks = kHeadDim / 8;
  const FlashAttentionShape& shape = p.shape;
  const BlockTask task(shape.seq_q, kRows, shape.heads_q, false, blockIdx.x);
  const HeadRows<T> rows(static_cast<T*>(p.dq), task.b, shape.seq_q, task.head, shape.q_stride(),
                         shape.head_dim);
  const float* sum = sums.tiles + int64_t(blockIdx.x) * Layout::kSize;
  const bool is_seen = sums.state[blockIdx.x] != 0;
  // Four lanes of a consumer warp hold the same 8 columns of two rows that are 8 rows apart.
  for (int id = threadIdx.x; id < kRows / 2 * kChunks; id += kRoundingThreads) {
    const int chunk = id % kChunks, lane_row = id / kChunks % 8, rows_16 = id / (8 * kChunks);
    const int group = Layout::splits_queries() ? rows_16 / 4 : chunk / Layout::kColTiles;
    const int thread = group * kGroupThreads + rows_16 % 4 * kWarpSize + lane_row * 4;
    Pack<float, 4> lanes[4] = {};
    if (is_seen) {
      const float* source = sum + Layout::position(chunk % Layout::kColTiles, thread);
#pragma unroll
      for (int i = 0; i < 4; ++i) lanes[i] = Pack<float, 4>::load(source + 4 * i);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = task.first + 16 * rows_16 + 8 * half + lane_row;
      if (row >= shape.seq_q || 8 * chunk >= shape.head_dim) continue;
      Pack<T, 8> result;
#pragma unroll
      for (int i = 0; i < 8; ++i) result.set(i, lanes[i / 2][2 * half + i % 2] * shape.scale);
      result.store(rows.data + row * rows.stride + 8 * chunk);
    }
  }
#endif
}

// --- launching ----------------------------------------------------------------------------------

template <typename T, int kHeadDim, bool kCapped>
void launch_backward(const FlashAttentionBackward& p, const BackwardWorkspace& workspace,
                     Stream stream) {
  const FlashAttentionShape& s = p.shape;
  // q and dout (2 bytes an element) and the sums (4 bytes).
  const int64_t walked_bytes = 8 * s.seq_q * s.head_dim * (s.heads_q / s.heads_k);
  const HopperBackward params{
      p,
      workspace.dq_sums,
      workspace.delta,
      tile_order(s.batch, s.heads_k, s.seq_k, walked_bytes, 1, true),
      {head_rows_map(s, p.k, s.seq_k, s.heads_k, s.k_stride(), kGroupRows),
       head_rows_map(s, p.v, s.seq_k, s.heads_k, s.k_stride(), kGroupRows)},
      head_rows_map(s, p.q, s.seq_q, s.heads_q, s.q_stride(), kQueries<kHeadDim>),
      head_rows_map(s, p.dout, s.seq_q, s.heads_q, s.out_stride(), kQueries<kHeadDim>)};
  launch_hopper<Storage<T, kHeadDim>>(
      attention_site("flash_attention_backward (Hopper, dk, dv, sum of dq)", s),
      hopper_backward_kernel<T, kHeadDim, kCapped>, params, params.order, stream);
  launch(attention_site("flash_attention_backward (Hopper, dq of its sum)", s),
         hopper_query_gradient_sum_kernel<T, kHeadDim>,
         attention_grid(s.batch, s.heads_q, s.seq_q, kQueries<kHeadDim>), dim3(kRoundingThreads), 0,
         stream, p, workspace.dq_sums);
}

}  // namespace

DqSumSizes dq_sum_sizes_sm90(const FlashAttentionShape& shape) {
  DqSumSizes sizes;
  dispatch_hopper(shape, [&](auto, auto head_dim, auto) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    sizes.tiles = shape.batch * shape.heads_q * ceil_div<int64_t>(shape.seq_q, kQueries<kHeadDim>);
    sizes.tile_size = QueryGradientLayout<kHeadDim>::kSize;
  });
  return sizes;
}

void flash_attention_backward_sm90(const FlashAttentionBackward& p,
                                   const BackwardWorkspace& workspace, Stream stream) {
  dispatch_hopper(p.shape, [&](auto tag, auto head_dim, auto capped) {
    using T = typename decltype(tag)::type;
    launch_backward<T, decltype(head_dim)::value, decltype(capped)::value>(p, workspace, stream);
  });
}

}  // namespace pypkg
