// Sums of float32 in device memory to which several blocks add, always in the same order.
//
// The blocks of keys of a head each have a term of the gradient of the queries they see. Of a tile
// of queries the last keys that see it come first, then each block of keys after its right
// neighbour: the keys that a tile sees are an interval, so no block between two others is left
// out. Under a causal mask the neighbour had the tile two steps before, and nobody waits; under
// others blocks that start together run one step apart.
//
// Blocks take their work by ticket, neighbours in the order of the sum. So a block only waits for
// blocks that have started, and there is no deadlock, however few of them are resident at a time.
#pragma once

#include "attention/cuda/cuda_attention_tile.cuh"

namespace pypkg {

struct OrderedSums {
  float* tiles = nullptr;  // [batch, heads_q, tiles of queries][queries * head_dim], in the order
                           // of OrderedSumLayout
  int* state = nullptr;    // by tile: 1 + first key of who added last, or 0; then the next ticket
  int64_t count = 0;       // of tiles

  // Waits until the block of keys that starts at `neighbour` has added to a tile.
  __device__ void wait(int tile, int neighbour) const {
    wait_for_value(state + tile, neighbour + 1);
  }
  // To be called after a barrier that follows the additions of the block of keys from `first` on.
  __device__ void pass_on(int tile, int first) const { store_release(state + tile, first + 1); }

  __device__ int* ticket() const { return state + count; }
  __host__ __device__ static int64_t num_states(int64_t tiles) { return tiles ? tiles + 1 : 0; }
};

// How an accumulator of kQueries x kHeadDim is spread over the warps of a block, and where its
// elements are in memory: what the lanes of a warp hold in one register is contiguous.
template <int kQueries, int kHeadDim, int kWarps>
struct OrderedSumLayout {
  static constexpr int kDimWarps = kHeadDim % 64 == 0 ? 4 : 2;  // side by side
  static constexpr int kCols = kHeadDim / kDimWarps;            // of a warp
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
  // Of columns 8 chunk, + 2, + 4 and + 6 of a row, which are neighbours in memory; those of columns
  // + 1, + 3, + 5 and + 7 are kThreads further.
  __device__ static int position_of_chunk(int row, int chunk) {
    const int warp = row / (16 * kRowTiles) * kDimWarps + chunk / (kCols / 8);
    const int m = row / 16 % kRowTiles, n = chunk % (kCols / 8), c = row / 8 % 2 * 2;
    return position(m, n, c, warp * kWarpSize + row % 8 * 4);
  }
};

}  // namespace pypkg
