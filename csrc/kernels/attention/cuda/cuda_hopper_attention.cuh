// Shared parts of the attention kernels for Hopper (sm_90a), after FlashAttention-3 (Shah et al.,
// 2024).
//
// A thread block stays on its multiprocessor and processes one tile of rows after the other. One
// group of four warps, the producer, makes the copy engine load the rows of a tile. Then it has the
// operands of their products loaded into rings of buffers. A pair of barriers per buffer tells when
// it is full and when it is empty. Two other groups, the consumers, hold 64 rows of a tile each and
// multiply.
//
// Heads are padded to 64 or 128 dimensions; the copy engine fills the padding with zeros.
#pragma once

#include "attention/cuda/cuda_attention_scores.cuh"
#include "attention/cuda/flash_attention_cuda.h"
#include "common/cuda_hopper_ptx.cuh"

namespace pypkg {

constexpr int kGroupThreads = 128;
constexpr int kConsumerGroups = 2;
constexpr int kConsumers = kConsumerGroups * kGroupThreads;
constexpr int kHopperThreads = kConsumers + kGroupThreads;
constexpr int kGroupRows = 64;  // rows of a tile per consumer group
constexpr int kTileRows = kConsumerGroups * kGroupRows;
constexpr int kBoxDims = 64;

// --- tiles in shared memory ---------------------------------------------------------------------

// Rows in the swizzled layout that the copy engine writes and wgmma reads.
template <typename T, int kRows, int kHeadDim>
struct BoxTile {
  alignas(1024) T data[kHeadDim / kBoxDims][kRows][kBoxDims];
};

// The rows that the consumers hold. At the end of a tile the result passes through the same memory.
template <typename T, int kHeadDim>
union HeldTile {
  BoxTile<T, kGroupRows, kHeadDim> group[kConsumerGroups];
  SharedTile<T, kTileRows, kHeadDim> result;
};

// --- the order of the tiles ---------------------------------------------------------------------

struct TileOrder {
  unsigned blocks;           // blocks of rows per head
  unsigned heads_per_batch;  // heads of the tensor whose rows are held
  unsigned heads;            // heads of all batches
  unsigned heads_together;   // processed at the same time, so that their operands fit in cache
  bool last_first;           // whether the last rows of a head come first

  __host__ __device__ unsigned tiles() const { return blocks * heads; }

  __device__ BlockTask task(unsigned tile) const {
    const unsigned set = tile / (heads_together * blocks);
    const unsigned in_set = tile - set * heads_together * blocks;
    const unsigned first_head = set * heads_together;
    const unsigned left = heads - first_head;
    const unsigned heads_of_set = left < heads_together ? left : heads_together;
    const unsigned block = in_set / heads_of_set;
    const unsigned head = first_head + in_set - block * heads_of_set;
    const unsigned turned = last_first ? blocks - 1 - block : block;
    return BlockTask(head / heads_per_batch, head % heads_per_batch,
                     static_cast<int>(turned * kTileRows));
  }
};

// The work of a kernel that holds queries and walks over keys and values.
struct QueryWork {
  TileOrder order;
  TensorMap held[1], k, v;  // [batch, sequence, heads, head_dim]
};

template <typename T, int kHeadDim, int kKeys_, int kStages_>
struct QueryTiling {
  static constexpr int kKeys = kKeys_;      // keys of a block
  static constexpr int kStages = kStages_;  // buffers of a ring
  using KeyTile = BoxTile<T, kKeys, kHeadDim>;

  struct Storage {
    HeldTile<T, kHeadDim> held[1];
    KeyTile k[kStages], v[kStages];
    Mbarrier held_full, held_empty;
    Mbarrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];

    __device__ void init_barriers();
  };
};

#ifdef PYPKG_SM90A_INSTRUCTIONS

// 128 * 24 + 256 * 240 = 64512 of 65536 registers.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
// Named barriers; number 0 is __syncthreads. The first two have one number per group.
constexpr int kStoreBarrier = 1;   // 1 and 2: the group has finished with its rows
constexpr int kTurnBarrier = 3;    // 3 and 4: the group has its turn at the tensor cores
constexpr int kScoresBarrier = 5;  // both groups have written their part

// The tiles of this thread block, one per round. Every second round assigns the tiles in reverse
// order, so that each block gets long and short tiles alike.
class TileWalk {
 public:
  __device__ explicit TileWalk(const TileOrder& order) : order_(order) {}

  __device__ bool done() const { return index() >= order_.tiles(); }
  __device__ void advance() { ++round_; }
  __device__ BlockTask task() const { return order_.task(index()); }

 private:
  __device__ unsigned index() const {
    const unsigned place = round_ % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round_ * gridDim.x + place;
  }

  const TileOrder& order_;
  unsigned round_ = 0;
};

// --- barriers -----------------------------------------------------------------------------------

// A position in a ring of buffers. `parity` is the parity of the current phase of its barriers.
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

__device__ __forceinline__ void init_barrier_pair(Mbarrier& full, Mbarrier& empty,
                                                  int producer_arrivals) {
  mbarrier_init(full, producer_arrivals);
  mbarrier_init(empty, kConsumers / kWarpSize);
}

template <typename T, int kHeadDim, int kKeys, int kStages>
__device__ void QueryTiling<T, kHeadDim, kKeys, kStages>::Storage::init_barriers() {
  init_barrier_pair(held_full, held_empty, 1);
  for (int i = 0; i < kStages; ++i) {
    init_barrier_pair(k_full[i], k_empty[i], 1);
    init_barrier_pair(v_full[i], v_empty[i], 1);
  }
}

// A consumer signals that it has read a buffer. Every warp arrives once, because its wait covers
// only the products that its own instructions started.
__device__ __forceinline__ void release(Mbarrier& empty) {
  __syncwarp();
  if (lane_id() == 0) mbarrier_arrive(empty);
}

// --- copies -------------------------------------------------------------------------------------

template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void copy_tile(BoxTile<T, kRows, kHeadDim>& tile, const TensorMap& map,
                                          Mbarrier& full, int head, int row, int b) {
#pragma unroll
  for (int i = 0; i < kHeadDim / kBoxDims; ++i) {
    copy_tensor_box(tile.data[i], map, full, i * kBoxDims, head, row, b);
  }
}

// Starts to copy the rows of a task from kHeld tensors.
template <typename T, int kHeadDim, int kHeld>
__device__ __forceinline__ void copy_held(HeldTile<T, kHeadDim> (&held)[kHeld],
                                          const TensorMap (&maps)[kHeld], Mbarrier& full,
                                          const BlockTask& task) {
  mbarrier_arrive_expect(full, sizeof(held));
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
#pragma unroll
    for (int g = 0; g < kConsumerGroups; ++g) {
      copy_tile(held[i].group[g], maps[i], full, task.head, task.first + g * kGroupRows, task.b);
    }
  }
}

// The thread that starts all copies of a kernel that walks over keys and values.
template <typename Tiling>
class KeyProducer {
 public:
  static constexpr int kThreads = 1;

  __device__ KeyProducer(const FlashAttentionShape& shape, const QueryWork& work,
                         typename Tiling::Storage& shared)
      : shape_(shape), work_(work), shared_(shared) {}

  __device__ void run() {
    uint32_t parity = 0;
    for (TileWalk walk(work_.order); !walk.done(); walk.advance()) {
      const BlockTask task = walk.task();
      const int head_k = task.head / (shape_.heads_q / shape_.heads_k);
      const ScoreRule rule(shape_, task.b, task.head);
      mbarrier_wait(shared_.held_empty, parity ^ 1);
      parity ^= 1;
      copy_held(shared_.held, work_.held, shared_.held_full, task);
      BlockState state;
      const auto seek = [&](int first) {
        return rule.template next_key_block<kTileRows, Tiling::kKeys>(task.first, first, state);
      };
      for (int key = seek(0); key < shape_.seq_k; key = seek(key + Tiling::kKeys)) {
        const int stage = place_.stage;
        mbarrier_wait(shared_.k_empty[stage], place_.parity ^ 1);
        load_keys(shared_.k[stage], work_.k, shared_.k_full[stage], head_k, key, task.b);
        mbarrier_wait(shared_.v_empty[stage], place_.parity ^ 1);
        load_keys(shared_.v[stage], work_.v, shared_.v_full[stage], head_k, key, task.b);
        place_.advance();
      }
    }
  }

 private:
  __device__ void load_keys(typename Tiling::KeyTile& tile, const TensorMap& map, Mbarrier& full,
                            int head, int key, int b) {
    mbarrier_arrive_expect(full, sizeof(tile));
    copy_tile(tile, map, full, head, key, b);
  }

  const FlashAttentionShape& shape_;
  const QueryWork& work_;
  typename Tiling::Storage& shared_;
  RingPlace<Tiling::kStages> place_;
};

// --- products -----------------------------------------------------------------------------------

// Starts d = a b^T over the head dimension, and commits the products as one group.
template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void start_transposed(float (&d)[kRows / 8][4],
                                                 const BoxTile<T, kGroupRows, kHeadDim>& a,
                                                 const BoxTile<T, kRows, kHeadDim>& b) {
#pragma unroll
  for (int i = 0; i < kHeadDim; i += 16) {
    const int box = i / kBoxDims, in_box = i % kBoxDims;
    wgmma_transposed<T>(d, wgmma_descriptor(&a.data[box][0][in_box], 0),
                        wgmma_descriptor(&b.data[box][0][in_box], 0), i > 0);
  }
  wgmma_commit();
}

// The 64 rows of a group in an accumulator, rounded to 16 bits: an operand of the next product.
template <int kInner>
using PackedRows = uint32_t[kInner / 16][4];

template <typename T, int kInner>
__device__ __forceinline__ void pack_rows(PackedRows<kInner>& packed,
                                          const float (&acc)[kInner / 8][4]) {
#pragma unroll
  for (int i = 0; i < kInner / 16; ++i) pack_operand<T>(packed[i], acc[2 * i], acc[2 * i + 1]);
}

// Starts out += p b over the rows of b, and commits the products as one group.
template <typename T, int kRows, int kHeadDim>
__device__ __forceinline__ void start_product(float (&out)[kHeadDim / 8][4],
                                              const PackedRows<kRows>& p,
                                              const BoxTile<T, kRows, kHeadDim>& b) {
#pragma unroll
  for (int i = 0; i < kRows / 16; ++i) {
    wgmma<T>(out, p[i], wgmma_descriptor(b.data[0][16 * i], sizeof(b.data[0])));
  }
  wgmma_commit();
}

// Writes the packed rows of a group to its part of a tile, which a later product reads transposed.
template <typename T, int kInner>
__device__ __forceinline__ void store_packed(BoxTile<T, kTileRows, kInner>& tile,
                                             const PackedRows<kInner>& packed) {
  constexpr int kInBox = kBoxDims / 16;
  const int lane = opaque(lane_id());
  const int row = warp_id() * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < kInner / 16; ++i) {
    auto* const pieces = reinterpret_cast<uint4*>(tile.data[i / kInBox][row]);
    store_matrices(pieces + ((2 * (i % kInBox) + lane / 16) ^ (lane & 7)), packed[i]);
  }
}

// Starts out = a^T b over all rows of a tile, for one box of a and one of b, and commits the
// products as one group.
template <typename T, int kCols, int kHeadDim>
__device__ __forceinline__ void start_left_transposed(float (&out)[kBoxDims / 8][4],
                                                      const BoxTile<T, kTileRows, kCols>& a,
                                                      int a_box, const HeldTile<T, kHeadDim>& b,
                                                      int b_box) {
#pragma unroll
  for (int i = 0; i < kTileRows; i += 16) {
    const auto& rows = b.group[i / kGroupRows].data[b_box];
    wgmma_left_transposed<T>(out, wgmma_descriptor(a.data[a_box][i], 0),
                             wgmma_descriptor(rows[i % kGroupRows], 0), i > 0);
  }
  wgmma_commit();
}

// --- roles --------------------------------------------------------------------------------------

// The body of a kernel. Each warp makes the producer or the consumer only after it knows its role.
template <typename Storage, typename MakeProducer, typename MakeConsumer>
__device__ __forceinline__ void run_roles(const MakeProducer& make_producer,
                                          const MakeConsumer& make_consumer) {
  auto& shared = dynamic_shared<Storage>();
  if (threadIdx.x == 0) {
    shared.init_barriers();
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    give_up_registers<kProducerRegisters>();
    auto producer = make_producer(shared);
    if (threadIdx.x < kConsumers + producer.kThreads) producer.run();
  } else {
    take_registers<kConsumerRegisters>();
    make_consumer(shared).run();
  }
}

#endif

// --- launching ----------------------------------------------------------------------------------

// The tensor map of a [batch, sequence, heads, head_dim] tensor, whose tokens are `token_stride`
// elements apart.
inline TensorMap head_rows_map(const FlashAttentionShape& shape, const void* tensor,
                               int64_t sequence, int64_t heads, int64_t token_stride,
                               int box_rows) {
  const uint64_t row = 2 * shape.head_dim, token = 2 * token_stride;
  const uint64_t dims[] = {uint64_t(shape.head_dim), uint64_t(heads), uint64_t(sequence),
                           uint64_t(shape.batch)};
  const uint32_t box[] = {kBoxDims, 1, uint32_t(box_rows), 1};
  return make_tensor_map(shape.dtype, tensor, dims, {row, token, token * sequence}, box);
}

// `walked_bytes` is the size of the operands that `sharing` neighbouring heads walk over.
inline TileOrder tile_order(int64_t batch, int64_t heads, int64_t rows, int64_t walked_bytes,
                            int64_t sharing, bool last_first) {
  constexpr int64_t kCacheBytes = 32 << 20;  // most of the 50 MB of L2
  const int64_t together = std::max<int64_t>(1, kCacheBytes / walked_bytes) * sharing;
  const int64_t blocks = ceil_div<int64_t>(rows, kTileRows);
  if (blocks * batch * heads > INT32_MAX) {
    throw std::invalid_argument("flash_attention: more than 2^31 tiles");
  }
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(heads),
          static_cast<unsigned>(batch * heads),
          static_cast<unsigned>(std::min(batch * heads, together)), last_first};
}

template <typename Tiling>
QueryWork query_work(const FlashAttentionShape& shape, const void* q, const void* k,
                     const void* v) {
  return {tile_order(shape.batch, shape.heads_q, shape.seq_q, 4 * shape.seq_k * shape.head_dim,
                     shape.heads_q / shape.heads_k, shape.mask.causal),
          {head_rows_map(shape, q, shape.seq_q, shape.heads_q, shape.q_stride(), kGroupRows)},
          head_rows_map(shape, k, shape.seq_k, shape.heads_k, shape.k_stride(), Tiling::kKeys),
          head_rows_map(shape, v, shape.seq_k, shape.heads_k, shape.k_stride(), Tiling::kKeys)};
}

template <typename Storage, typename Params>
void launch_hopper(const LaunchSite& site, void (*kernel)(Params), const Params& params,
                   const TileOrder& order, Stream stream) {
  static_assert(sizeof(Storage) <= 227 * 1024, "more shared memory than a block may have");
  launch(site, kernel, dim3(std::min<int64_t>(order.tiles(), multiprocessor_count())),
         dim3(kHopperThreads), sizeof(Storage), stream, params);
}

// Calls f(TypeTag<T>, head_dim, capped) with the padded head_dim.
template <typename F>
void dispatch_hopper(const FlashAttentionShape& shape, F&& f) {
  dispatch_dtype(shape.dtype, [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == 2) {
      dispatch_softcap(shape, [&](auto capped) {
        if (shape.head_dim <= 64) return f(tag, std::integral_constant<int, 64>{}, capped);
        f(tag, std::integral_constant<int, kMaxHopperHeadDim>{}, capped);
      });
    } else {
      throw std::invalid_argument("flash_attention: float32 on the Hopper kernels");
    }
  });
}

}  // namespace pypkg
