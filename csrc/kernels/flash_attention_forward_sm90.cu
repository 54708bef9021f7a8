// Forward attention for Hopper (sm_90a), after FlashAttention-3 (Shah et al., 2024).
//
// A block stays on its multiprocessor and walks over tiles of queries. One group of four warps, the
// producer, has the copy engine bring queries, keys and values; keys and values go through rings of
// buffers, and a pair of barriers for each says when it is full and when it is empty. Two other
// groups, the consumers, hold 64 queries each. They take turns at the tensor cores: while one
// multiplies, the other computes its softmax. Each starts the scores of a block of keys together
// with the output of the block before, whose probabilities are in registers.
//
// Heads are padded to 64 or 128 dimensions, which the copy engine fills with zeros.
#include "cuda_attention_softmax.cuh"
#include "cuda_hopper_ptx.cuh"
#include "flash_attention_cuda.h"

namespace pypkg {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kConsumerGroups = 2;
constexpr int kConsumers = kConsumerGroups * kGroupThreads;
constexpr int kHopperThreads = kConsumers + kGroupThreads;
constexpr int kGroupQueries = 64;
constexpr int kBoxDims = 64;
constexpr int kKeys = 128;

template <typename T, int kHeadDim_>
struct HopperTiling {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBoxes = kHeadDim / kBoxDims;
  static constexpr int kQueries = kConsumerGroups * kGroupQueries;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;

  // [kBoxes][kKeys][kBoxDims], swizzled; queries are [kConsumerGroups][kBoxes][kGroupQueries]
  // [kBoxDims] until their tile becomes the way out of the result.
  using KeyTile = T[kBoxes * kKeys * kBoxDims];
  struct Storage {
    alignas(1024) SharedTile<T, kQueries, kHeadDim> q;
    alignas(1024) KeyTile k[kStages], v[kStages];
    Mbarrier q_full, q_empty;
    Mbarrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  };
};

// Tiles of queries in the order in which they are given out.
struct TileOrder {
  int64_t blocks;          // of queries, per head
  int64_t heads;           // of all batches
  int64_t heads_together;  // whose keys and values stay in the L2 cache together
  bool last_first;         // under a causal mask the last queries have most to do
};

struct HopperForward {
  FlashAttentionForward attention;
  TileOrder order;
  TensorMap q, k, v;  // [batch, sequence, heads, head_dim]
};

#ifdef PYPKG_SM90A_INSTRUCTIONS

// 128 x 40 + 256 x 232 of 65536 registers.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// Named barriers; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;   // and 2: a group's turn at the tensor cores
constexpr int kStoreBarrier = 3;  // and 4: a group's queries are done with

// This block's tiles: of every round one, forwards and backwards in turn, so that what is long and
// what is short evens out.
class TileWalk {
 public:
  __device__ explicit TileWalk(const HopperForward& p)
      : order_(p.order), heads_q_(p.attention.shape.heads_q) {}

  __device__ bool done() const { return index() >= order_.blocks * order_.heads; }
  __device__ void advance() { ++round_; }

  template <int kQueries>
  __device__ BlockTask task() const {
    const int64_t set = index() / (order_.heads_together * order_.blocks);
    const int64_t in_set = index() % (order_.heads_together * order_.blocks);
    const int64_t first_head = set * order_.heads_together;
    const int64_t heads = min(order_.heads_together, order_.heads - first_head);
    const int64_t block = in_set / heads, head = first_head + in_set % heads;
    const int64_t turned = order_.last_first ? order_.blocks - 1 - block : block;
    return BlockTask(head / heads_q_, head % heads_q_, static_cast<int>(turned * kQueries));
  }

 private:
  __device__ int64_t index() const {
    const unsigned place = round_ % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round_ * gridDim.x + place;
  }

  const TileOrder& order_;
  const int64_t heads_q_;
  int64_t round_ = 0;
};

// A place in a ring of buffers; the parity is that of the barriers' current phase.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The thread that starts all copies.
template <typename T, int kHeadDim>
class Producer {
 public:
  using Tiling = HopperTiling<T, kHeadDim>;

  __device__ Producer(const HopperForward& p, typename Tiling::Storage& shared)
      : p_(p), shared_(shared) {}

  __device__ void run() {
    const FlashAttentionShape& shape = p_.attention.shape;
    uint32_t q_parity = 0;
    for (TileWalk walk(p_); !walk.done(); walk.advance()) {
      const BlockTask task = walk.template task<Tiling::kQueries>();
      const int head_k = task.head / (shape.heads_q / shape.heads_k);
      const ScoreRule rule(shape, task.b, task.head);
      mbarrier_wait(shared_.q_empty, q_parity ^ 1);
      q_parity ^= 1;
      load_queries(task);
      BlockState state;
      const auto seek = [&](int first) {
        return rule.template next_key_block<Tiling::kQueries, kKeys>(task.first, first, state);
      };
      for (int key = seek(0); key < shape.seq_k; key = seek(key + kKeys)) {
        const int stage = place_.stage;
        mbarrier_wait(shared_.k_empty[stage], place_.parity ^ 1);
        load_keys(shared_.k[stage], p_.k, shared_.k_full[stage], head_k, key, task.b);
        mbarrier_wait(shared_.v_empty[stage], place_.parity ^ 1);
        load_keys(shared_.v[stage], p_.v, shared_.v_full[stage], head_k, key, task.b);
        place_.advance();
      }
    }
  }

 private:
  __device__ void load_queries(const BlockTask& task) {
    mbarrier_arrive_expect(shared_.q_full, sizeof(shared_.q.data));
#pragma unroll
    for (int i = 0; i < kConsumerGroups * Tiling::kBoxes; ++i) {
      copy_tensor_box(shared_.q.data + i * kGroupQueries * kBoxDims, p_.q, shared_.q_full,
                      i % Tiling::kBoxes * kBoxDims, task.head,
                      task.first + i / Tiling::kBoxes * kGroupQueries, task.b);
    }
  }

  __device__ void load_keys(typename Tiling::KeyTile& tile, const TensorMap& map, Mbarrier& full,
                            int head, int key, int b) {
    mbarrier_arrive_expect(full, sizeof(tile));
#pragma unroll
    for (int i = 0; i < Tiling::kBoxes; ++i) {
      copy_tensor_box(tile + i * kKeys * kBoxDims, map, full, i * kBoxDims, head, key, b);
    }
  }

  const HopperForward& p_;
  typename Tiling::Storage& shared_;
  RingPlace<Tiling::kStages> place_;
};

// A group of four warps with 64 queries of every tile.
template <typename T, int kHeadDim>
class Consumer {
 public:
  using Tiling = HopperTiling<T, kHeadDim>;

  __device__ Consumer(const HopperForward& p, typename Tiling::Storage& shared)
      : p_(p), shared_(shared), group_(threadIdx.x / kGroupThreads) {
    if (group_ == 1) pass_turn();  // the first turn is the other group's
  }

  __device__ __forceinline__ void run() {
    uint32_t q_parity = 0;
    for (TileWalk walk(p_); !walk.done(); walk.advance()) {
      const BlockTask task = walk.template task<Tiling::kQueries>();
      mbarrier_wait(shared_.q_full, q_parity);
      q_parity ^= 1;
      float out[1][kHeadDim / 8][4] = {};
      SoftmaxState<1> softmax;
      attend(task, out, softmax);
      named_barrier_sync(kStoreBarrier + group_, kGroupThreads);
      store_result(p_.attention, task, out, softmax, shared_.q);
      fence_proxy_async();
      release(shared_.q_empty);
    }
    if (group_ == 0) wait_for_turn();  // the last one that the other group passed on
  }

 private:
  using Scores = float[1][kKeys / 8][4];
  using Out = float[1][kHeadDim / 8][4];
  using Probabilities = uint32_t[kKeys / 16][4];

  __device__ __forceinline__ void attend(const BlockTask& task, Out& out,
                                         SoftmaxState<1>& softmax) {
    const FlashAttentionShape& shape = p_.attention.shape;
    const ScoreRule rule(shape, task.b, task.head);
    const int first_row = task.first + warp_id() * 16;
    BlockState state = BlockState::kSkip;
    const auto seek = [&](int first) {
      return rule.template next_key_block<Tiling::kQueries, kKeys>(task.first, first, state);
    };
    int key = seek(0);
    if (key >= shape.seq_k) return;
    Probabilities p;
    {
      Scores scores;
      mbarrier_wait(shared_.k_full[k_.stage], k_.parity);
      wait_for_turn();
      wgmma_fence();
      start_scores(scores[0]);
      pass_turn();
      finish_scores<0>(scores[0]);
      rule.template apply<false>(scores, first_row, key, state);
      softmax.update(scores);
      pack(p, scores[0]);
    }
    for (key = seek(key + kKeys); key < shape.seq_k; key = seek(key + kKeys)) {
      Scores scores;
      mbarrier_wait(shared_.k_full[k_.stage], k_.parity);
      mbarrier_wait(shared_.v_full[v_.stage], v_.parity);
      wait_for_turn();
      wgmma_fence();
      start_scores(scores[0]);
      start_out(out[0], p);
      pass_turn();
      finish_scores<1>(scores[0]);
      rule.template apply<false>(scores, first_row, key, state);
      const RowValues<1> rescale = softmax.update(scores);
      finish_out(out[0], p);
      scale_rows(out, rescale);
      pack(p, scores[0]);
    }
    mbarrier_wait(shared_.v_full[v_.stage], v_.parity);
    wgmma_fence();
    start_out(out[0], p);
    finish_out(out[0], p);
  }

  __device__ __forceinline__ void start_scores(float (&scores)[kKeys / 8][4]) {
    const T* q = shared_.q.data + group_ * kGroupQueries * kHeadDim;
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      const int box = d / kBoxDims, in_box = d % kBoxDims;
      const T* k = shared_.k[k_.stage] + box * kKeys * kBoxDims + in_box;
      wgmma_transposed<T>(scores, wgmma_descriptor(q + box * kGroupQueries * kBoxDims + in_box, 0),
                          wgmma_descriptor(k, 0), d > 0);
    }
    wgmma_commit();
  }

  template <int kInFlight>
  __device__ __forceinline__ void finish_scores(float (&scores)[kKeys / 8][4]) {
    wgmma_wait<kInFlight>();
    wgmma_finished(scores);
    release(shared_.k_empty[k_.stage]);
    k_.advance();
  }

  __device__ __forceinline__ void start_out(float (&out)[kHeadDim / 8][4], Probabilities& p) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const T* v = shared_.v[v_.stage] + 16 * i * kBoxDims;
      wgmma<T>(out, p[i], wgmma_descriptor(v, kKeys * kBoxRowBytes));
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void finish_out(float (&out)[kHeadDim / 8][4], Probabilities& p) {
    wgmma_wait<0>();
    wgmma_finished(out);
    wgmma_finished(p);
    release(shared_.v_empty[v_.stage]);
    v_.advance();
  }

  __device__ __forceinline__ static void pack(Probabilities& p,
                                              const float (&scores)[kKeys / 8][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      pack_operand<T>(p[i], scores[2 * i], scores[2 * i + 1]);
    }
  }

  // One arrival of each warp: what its wait finished is what its own instructions started.
  __device__ __forceinline__ static void release(Mbarrier& empty) {
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(empty);
  }

  __device__ __forceinline__ void wait_for_turn() {
    named_barrier_sync(kTurnBarrier + group_, kConsumers);
  }
  __device__ __forceinline__ void pass_turn() {
    named_barrier_arrive(kTurnBarrier + (group_ ^ 1), kConsumers);
  }

  const HopperForward& p_;
  typename Tiling::Storage& shared_;
  const int group_;
  RingPlace<Tiling::kStages> k_, v_;
};

template <int kStages>
__device__ void init_barriers(Mbarrier (&full)[kStages], Mbarrier (&empty)[kStages]) {
  for (int i = 0; i < kStages; ++i) {
    mbarrier_init(full[i], 1);
    mbarrier_init(empty[i], kConsumers / kWarpSize);
  }
}

#endif

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_forward_kernel(const __grid_constant__ HopperForward p) {
#ifdef PYPKG_SM90A_INSTRUCTIONS
  auto& shared = dynamic_shared<typename HopperTiling<T, kHeadDim>::Storage>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.q_full, 1);
    mbarrier_init(shared.q_empty, kConsumers / kWarpSize);
    init_barriers(shared.k_full, shared.k_empty);
    init_barriers(shared.v_full, shared.v_empty);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x == kConsumers) Producer<T, kHeadDim>(p, shared).run();
  } else {
    take_registers<kConsumerRegisters>();
    Consumer<T, kHeadDim>(p, shared).run();
  }
#endif
}

TensorMap tensor_map(const FlashAttentionShape& shape, const void* tensor, int64_t sequence,
                     int64_t heads, int box_rows) {
  const uint64_t row = 2 * shape.head_dim, token = row * heads;
  const uint64_t dims[] = {uint64_t(shape.head_dim), uint64_t(heads), uint64_t(sequence),
                           uint64_t(shape.batch)};
  const uint32_t box[] = {kBoxDims, 1, uint32_t(box_rows), 1};
  return make_tensor_map(shape.dtype, tensor, dims, {row, token, token * sequence}, box);
}

TileOrder tile_order(const FlashAttentionShape& shape, int queries) {
  constexpr int64_t kCacheBytes = 32 << 20;             // most of the 50 MB of L2
  const int64_t group = shape.heads_q / shape.heads_k;  // query heads that share keys and values
  const int64_t bytes = 4 * shape.seq_k * shape.head_dim;
  const int64_t heads = shape.batch * shape.heads_q;
  const int64_t together = std::min(heads, std::max<int64_t>(1, kCacheBytes / bytes) * group);
  return {ceil_div<int64_t>(shape.seq_q, queries), heads, together, shape.mask.causal};
}

template <typename T, int kHeadDim>
void launch_hopper(const FlashAttentionForward& p, Stream stream) {
  using Tiling = HopperTiling<T, kHeadDim>;
  const FlashAttentionShape& shape = p.shape;
  const HopperForward params{p, tile_order(shape, Tiling::kQueries),
                             tensor_map(shape, p.q, shape.seq_q, shape.heads_q, kGroupQueries),
                             tensor_map(shape, p.k, shape.seq_k, shape.heads_k, kKeys),
                             tensor_map(shape, p.v, shape.seq_k, shape.heads_k, kKeys)};
  const int64_t tiles = params.order.blocks * params.order.heads;
  launch(attention_site("flash_attention_forward (Hopper)", shape),
         hopper_forward_kernel<T, kHeadDim>, dim3(std::min<int64_t>(tiles, multiprocessor_count())),
         dim3(kHopperThreads), sizeof(typename Tiling::Storage), stream, params);
}

}  // namespace

void flash_attention_forward_sm90(const FlashAttentionForward& p, Stream stream) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 2) {
      p.shape.head_dim <= 64 ? launch_hopper<T, 64>(p, stream) : launch_hopper<T, 128>(p, stream);
    } else {
      throw std::invalid_argument("flash_attention_forward_sm90: float32");
    }
  });
}

}  // namespace pypkg
