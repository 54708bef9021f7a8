// float32 sums in device memory. Several thread blocks add to each sum, always in the same order.
//
// Each block of keys contributes one term to dq of every tile of queries that sees it. The block
// with the last keys adds first; each other block adds after its right neighbour. The keys that a
// tile sees form an interval, so the chain of neighbours has no gap. Under a causal mask the
// neighbour processed the tile two steps earlier, and no block waits. Under other masks, blocks
// that start together run one step apart.
//
// Thread blocks take their work by ticket, and tickets follow the order of the sum. A block
// therefore waits only for blocks that have already started, so it cannot deadlock, however few
// blocks are resident at a time.
#pragma once

#include "attention/cuda/cuda_attention_tile.cuh"

namespace pypkg {

struct OrderedSums {
  // [batch, heads_q, tiles of queries][queries * head_dim]; OrderedSumLayout orders a tile.
  float* tiles = nullptr;
  // Per tile: 0, or 1 + the first key of the block that added last. Then one entry more: the next
  // ticket.
  int* state = nullptr;
  int64_t count = 0;  // number of tiles

  // Waits until the block of keys that starts at `neighbour` has added to the tile.
  __device__ void wait(int tile, int neighbour) const {
    wait_for_value(state + tile, neighbour + 1);
  }
  // Lets the next block add. `first` is the first key of the calling block. Call it after a barrier
  // that follows the block's additions.
  __device__ void pass_on(int tile, int first) const { store_release(state + tile, first + 1); }

  __device__ int* ticket() const { return state + count; }
  __host__ __device__ static int64_t num_states(int64_t tiles) { return tiles ? tiles + 1 : 0; }
};

// How an accumulator of kQueries x kHeadDim is distributed over the warps of a block, and where its
// elements lie in memory. The values that the lanes of a warp hold in the same register are
// contiguous.
template <int kQueries, int kHeadDim, int kWarps>
struct OrderedSumLayout {
  static constexpr int kDimWarps = kHeadDim % 64 == 0 ? 4 : 2;  // warps side by side
  static constexpr int kCols = kHeadDim / kDimWarps;            // columns of a warp
  static constexpr int kRowTiles = kQueries / (kWarps / kDimWarps) / 16;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kSize = kQueries * kHeadDim;
  static_assert(kCols % 16 == 0 && kRowTiles * 16 * (kWarps / kDimWarps) == kQueries);

  using Accumulator = float[kRowTiles][kCols / 8][4];

  __device__ static int first_row() { return warp_id() / kDimWarps * kRowTiles * 16; }
  __device__ static int first_col() { return warp_id() % kDimWarps * kCols; }

  __device__ static int position(int m, int n, int c, int thread) {
    return ((m * (kCols / 8) + n) * 4 + c) * kThreads + thread;
  }
  // Position of column 8 * chunk of a row. Columns + 2, + 4 and + 6 follow it in memory; columns
  // + 1, + 3, + 5 and + 7 lie kThreads further on.
  __device__ static int position_of_chunk(int row, int chunk) {
    const int warp = row / (16 * kRowTiles) * kDimWarps + chunk / (kCols / 8);
    const int m = row / 16 % kRowTiles, n = chunk % (kCols / 8), c = row / 8 % 2 * 2;
    return position(m, n, c, warp * kWarpSize + row % 8 * 4);
  }
};

}  // namespace pypkg
