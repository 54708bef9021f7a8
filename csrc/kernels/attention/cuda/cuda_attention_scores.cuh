// Scores of a block of queries against a block of keys (scale, soft cap, ALiBi, mask), and the
// choice of the blocks to visit. Shared by the forward and the backward kernels.
#pragma once

#include "attention/cuda/cuda_attention_tile.cuh"
#include "attention/flash_attention.h"

namespace pypkg {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.69314718055994531f;

// The work of one thread block: one block of rows of one (batch, head), decoded from a flat index.
struct BlockTask {
  int b, head;
  int first;

  // Neighbouring indices share a head, so the other operand of that head stays in cache.
  // `last_first` reverses the order inside a head: under a causal mask the last queries take
  // longest, and the longest work should start first.
  __device__ BlockTask(int64_t rows, int rows_per_block, int64_t heads, bool last_first,
                       unsigned flat_index) {
    const int64_t blocks = ceil_div<int64_t>(rows, rows_per_block);
    const int64_t index = flat_index % blocks;
    first = (last_first ? blocks - 1 - index : index) * rows_per_block;
    head = flat_index / blocks % heads;
    b = flat_index / blocks / heads;
  }
  __device__ BlockTask(int64_t b_, int64_t head_, int first_) : b(b_), head(head_), first(first_) {}
};

// tanh(x): accurate for float32, with an absolute error below 2^-21 for 16-bit types.
template <typename T>
__device__ __forceinline__ float hyperbolic_tangent(float x) {
  if constexpr (std::is_same_v<T, float>) return tanhf(x);
  const float squared = exp2_approximate(2 * kLog2E * fabsf(x));  // exp(|x|)^2; may be infinite
  return copysignf(1.0f - __fdividef(2.0f, squared + 1.0f), x);
}

// Scores for one batch and query head. A score times unit() is in units of log 2, because exp2 is
// one instruction. Where nothing is added to the scores, unit() is the scale: the instruction that
// subtracts the maximum or lse also multiplies by it, so scaling costs no instruction of its own.
class ScoreRule {
 public:
  __device__ ScoreRule(const FlashAttentionShape& shape, int64_t b, int64_t head_q)
      : mask_(shape.mask),
        b_(b),
        seq_q_(shape.seq_q),
        seq_k_(shape.seq_k),
        key_offset_(shape.key_offset),
        lead_(shape.query_offset - shape.key_offset),
        factor_((shape.softcap > 0 ? shape.softcap : shape.scale) * kLog2E),
        to_softcap_(shape.scale / shape.softcap),
        slope_(shape.mask.alibi_slopes ? shape.mask.alibi_slopes[head_q] * kLog2E : 0.0f),
        adds_(shape.mask.alibi_slopes != nullptr || !(factor_ > 0)) {}

  // Positive, so that the largest score stays the largest.
  template <bool kCapped>
  __device__ float unit() const {
    return kCapped || adds_ ? 1.0f : factor_;
  }

  // State of the block of kQueries queries from q_first on and kKeys keys from k_first on. Rows and
  // columns beyond the sequences count as masked.
  template <int kQueries, int kKeys>
  __device__ BlockState block_state(int q_first, int k_first) const {
    const int q_end = min(q_first + kQueries, seq_q_);
    const int k_end = min(k_first + kKeys, seq_k_);
    const BlockState state =
        key_block_state(mask_, b_, key_offset_ + beside(q_first), key_offset_ + beside(q_end),
                        key_offset_ + k_first, key_offset_ + k_end);
    const bool whole = q_end == q_first + kQueries && k_end == k_first + kKeys;
    return state == BlockState::kFull && !whole ? BlockState::kPartial : state;
  }

  // First key of the next block at or after `first` that is not skipped; at least seq_k if there is
  // none.
  template <int kQueries, int kKeys>
  __device__ int next_key_block(int q_first, int first, BlockState& state) const {
    for (; first < seq_k_; first += kKeys) {
      state = block_state<kQueries, kKeys>(q_first, first);
      if (state != BlockState::kSkip) break;
    }
    return first;
  }

  // Turns products q k into tanh(scale * q k / softcap), in place.
  template <typename T, int kRowTiles, int kColTiles>
  __device__ __forceinline__ void to_tangents(float (&scores)[kRowTiles][kColTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          scores[m][n][c] = hyperbolic_tangent<T>(scores[m][n][c] * to_softcap_);
        }
      }
    }
  }

  // Turns products q k (or the result of to_tangents) into scores, in place; -inf where the query
  // does not see the key. Rows of the accumulator are queries, or keys if kRowsAreKeys.
  template <bool kRowsAreKeys, bool kCapped, int kRowTiles, int kColTiles>
  __device__ __forceinline__ void apply(float (&scores)[kRowTiles][kColTiles][4], int first_row,
                                        int first_col, BlockState state) const {
    const int lane = opaque(lane_id());
    const int row0 = first_row + lane / 4, col0 = first_col + 2 * (lane % 4);
    if constexpr (kCapped) {  // here, because registers are short in the loops below
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) scores[m][n][c] *= factor_;
        }
      }
    }
    if (adds_) add_distances<kRowsAreKeys>(scores, row0, col0, kCapped ? 1.0f : factor_);
    if (state == BlockState::kPartial) hide<kRowsAreKeys>(scores, row0, col0);
  }

 private:
  // row0 and col0 are the row and column of this lane's first element.
  template <bool kRowsAreKeys, int kRowTiles, int kColTiles>
  __device__ __forceinline__ void add_distances(float (&scores)[kRowTiles][kColTiles][4], int row0,
                                                int col0, float factor) const {
    // Key minus query position; exact up to 2^24.
    const float distance0 = kRowsAreKeys ? row0 - beside(col0) : col0 - beside(row0);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row_step = 16 * m + 8 * (c / 2), col_step = 8 * n + c % 2;
          const int step = kRowsAreKeys ? row_step - col_step : col_step - row_step;
          scores[m][n][c] =
              scores[m][n][c] * factor + slope_ * (distance0 + static_cast<float>(step));
        }
      }
    }
  }

  template <bool kRowsAreKeys, int kRowTiles, int kColTiles>
  __device__ __forceinline__ void hide(float (&scores)[kRowTiles][kColTiles][4], int row0,
                                       int col0) const {
    constexpr int kQueryTiles = kRowsAreKeys ? kColTiles : kRowTiles;
    constexpr int kKeyTiles = kRowsAreKeys ? kRowTiles : kColTiles;
    // Many queries are handled one at a time, because the ranges of all would not fit in registers.
    constexpr bool kInOrder = kQueryTiles > 8;
    const int q0 = kRowsAreKeys ? col0 : row0, k0 = kRowsAreKeys ? row0 : col0;
#pragma unroll
    for (int x = 0; x < kQueryTiles; ++x) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int q = q0 + (kRowsAreKeys ? 8 * x + i : 16 * x + 8 * i);
        const KeyRange seen = keys_seen_by(kInOrder ? opaque(q) : q);
        const int begin = seen.begin - k0, end = seen.end - k0;
#pragma unroll
        for (int y = 0; y < kKeyTiles; ++y) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int step = kRowsAreKeys ? 16 * y + 8 * j : 8 * y + j;
            float& score = kRowsAreKeys ? scores[y][x][2 * j + i] : scores[x][y][2 * i + j];
            if (step < begin || step >= end) score = -INFINITY;
            if constexpr (kInOrder) score = opaque_float(score);
          }
        }
      }
    }
  }

  struct KeyRange {
    int begin, end;
  };

  // Rows of the keys that query q sees, as is_visible defines it. They form an interval under every
  // mask.
  __device__ __forceinline__ KeyRange keys_seen_by(int q) const {
    if (q >= seq_q_) return {0, 0};
    const int i = beside(q);
    KeyRange keys{0, seq_k_};
    if (mask_.causal) {
      const int prefix = mask_.prefix_lengths ? mask_.prefix_lengths[b_] - key_offset_ : 0;
      keys.end = min(seq_k_, max(i + 1, prefix));
    }
    if (mask_.window > 0) keys.begin = max(0, i - mask_.window + 1);
    if (mask_.document_starts) {
      const int32_t* starts = mask_.document_starts + b_ * mask_.tokens + key_offset_;
      keys.begin = max(keys.begin, starts[i] - key_offset_);
      for (int first = i + 1; first < keys.end;) {  // finds the start of the next document
        const int middle = first + (keys.end - first) / 2;
        if (starts[middle] == starts[i]) {
          first = middle + 1;
        } else {
          keys.end = middle;
        }
      }
    }
    return keys;
  }

  // Row of the key at the position of query q; may lie before the first key or after the last.
  __device__ int beside(int q) const { return q + lead_; }

  const AttentionMask& mask_;
  const int64_t b_;
  const int seq_q_, seq_k_, key_offset_;  // at most 2^24
  const int lead_;                        // position of the first query minus that of the first key
  const float factor_, to_softcap_, slope_;
  const bool adds_;  // whether apply adds to the scores, and so multiplies them by factor_ itself
};

}  // namespace pypkg
