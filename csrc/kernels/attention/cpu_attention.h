// Shared by both passes of the CPU attention: offsets of a head, its scores, scratch memory.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "attention/flash_attention.h"
#include "common/cpu_panels.h"

namespace pypkg {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Queries and keys in a block: multiples of the rows and columns of every tile.
constexpr int64_t kQueries = 96;
constexpr int64_t kKeys = 96;

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Range {
  int64_t begin;
  int64_t end;

  bool empty() const { return begin >= end; }
  Range joined(const Range& other) const {
    return {std::min(begin, other.begin), std::max(end, other.end)};
  }
};

// The union of the ranges of the (at most two) panels that hold the kRows columns from `first` on.
template <class X>
PYPKG_INLINE Range joined(const Range* of_panels, int64_t first) {
  static_assert(X::kRows <= X::kWidth);
  return of_panels[first / X::kWidth].joined(of_panels[(first + X::kRows - 1) / X::kWidth]);
}

// One query head of one sequence, and its offsets in [batch, sequence, heads, head_dim]. Offsets of
// q are also those of its gradient, offsets of k those of v and both gradients, offsets of out
// those of its gradient.
struct Head {
  const FlashAttentionShape& s;
  int64_t b;
  int64_t h;  // query head

  int64_t key_head() const { return h / (s.heads_q / s.heads_k); }
  int64_t q_offset(int64_t row) const {
    return (b * s.seq_q + row) * s.q_stride() + h * s.head_dim;
  }
  int64_t k_offset(int64_t row) const {
    return (b * s.seq_k + row) * s.k_stride() + key_head() * s.head_dim;
  }
  int64_t out_offset(int64_t row) const {
    return (b * s.seq_q + row) * s.out_stride() + h * s.head_dim;
  }
  int64_t row_index(int64_t row) const { return (b * s.heads_q + h) * s.seq_q + row; }
  int64_t position(int64_t row) const { return row + s.query_offset; }
  // The position of a key minus that of a query.
  int64_t distance(int64_t row, int64_t key) const { return key + s.key_offset - position(row); }
  float slope() const { return s.mask.alibi_slopes ? s.mask.alibi_slopes[h] : 0.0f; }

  // The indices of the keys that is_visible allows for a query: always an interval.
  Range visible_keys(int64_t row) const {
    const AttentionMask& mask = s.mask;
    const int64_t i = position(row) - s.key_offset;
    Range keys{0, s.seq_k};
    if (mask.causal) {
      const int64_t prefix = mask.prefix_lengths ? mask.prefix_lengths[b] - s.key_offset : 0;
      keys.end = std::min(s.seq_k, std::max(i + 1, prefix));
    }
    if (mask.window > 0) keys.begin = std::max<int64_t>(0, i - mask.window + 1);
    if (mask.document_starts) {
      const int32_t* starts = mask.document_starts + b * mask.tokens + s.key_offset;
      const auto document = std::equal_range(starts, starts + s.seq_k, starts[i]);
      keys = {std::max(keys.begin, document.first - starts),
              std::min(keys.end, document.second - starts)};
    }
    return keys;
  }
  // State of rows [row, row + rows) x keys [key, key + keys). Blocks that extend beyond the end of
  // the sequence are never full.
  BlockState state(int64_t row, int64_t rows, int64_t key, int64_t keys) const {
    const int64_t row_end = std::min(row + rows, s.seq_q), key_end = std::min(key + keys, s.seq_k);
    if (row >= row_end || key >= key_end) return BlockState::kSkip;
    const BlockState inside = key_block_state(s.mask, b, position(row), position(row_end),
                                              key + s.key_offset, key_end + s.key_offset);
    const bool whole = row_end == row + rows && key_end == key + keys;
    return inside == BlockState::kFull && !whole ? BlockState::kPartial : inside;
  }
};

// visible_keys of each query of a block; queries beyond the end of the sequence see no key.
struct VisibleKeys {
  int32_t begin[kQueries];
  int32_t end[kQueries];

  void set(const Head& head, int64_t first_row) {
    for (int64_t r = 0; r < kQueries; ++r) {
      const bool exists = first_row + r < head.s.seq_q;
      const Range keys = exists ? head.visible_keys(first_row + r) : Range{0, 0};
      begin[r] = static_cast<int32_t>(keys.begin);
      end[r] = static_cast<int32_t>(keys.end);
    }
  }
};

// Whether the columns of a tile of scores are queries or keys; its rows are the other. In the
// forward pass columns are queries, so that the softmax works on whole vectors. In the backward
// pass, which holds a block of keys and iterates over queries, columns are keys.
enum class Columns { kQueries, kKeys };

template <class X>
PYPKG_INLINE typename X::IntVec column_numbers(int v) {
  typename X::IntVec numbers;
  for (int l = 0; l < X::kLanes; ++l) numbers[l] = v * X::kLanes + l;
  return numbers;
}

// Replaces the scores by softcap * tanh(score / softcap), and writes the derivative, 1 - tanh^2, to
// the panel `slope` unless it is null.
template <class X>
PYPKG_INLINE void cap_scores(float softcap, Sums<X>& scores, float* slope = nullptr) {
#pragma GCC unroll 16
  for (int r = 0; r < X::kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < X::kVectors; ++v) {
      const auto tanh = fast_tanh<typename X::Vec>(scores.at[r][v] / softcap);
      scores.at[r][v] = softcap * tanh;
      if (slope) store(slope + r * kKeys + v * X::kLanes, 1.0f - tanh * tanh);
    }
  }
}

// Sets the scores that a mask hides to -inf. The tile begins at query `query` of the block and at
// key `key`.
template <class X, Columns kColumns>
PYPKG_INLINE void mask_tile(const VisibleKeys& visible, int64_t query, int64_t key,
                            Sums<X>& scores) {
  using IntVec = typename X::IntVec;
  const int32_t first = static_cast<int32_t>(key);
#pragma GCC unroll 4
  for (int v = 0; v < X::kVectors; ++v) {
    const IntVec column = column_numbers<X>(v);
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r) {
      IntVec hidden;
      if constexpr (kColumns == Columns::kQueries) {
        hidden = (load<IntVec>(visible.begin + query + v * X::kLanes) > first + r) |
                 (load<IntVec>(visible.end + query + v * X::kLanes) <= first + r);
      } else {
        hidden = (column < visible.begin[query + r] - first) |
                 (column >= visible.end[query + r] - first);
      }
      scores.at[r][v] = hidden ? typename X::Vec{} - kInfinity : scores.at[r][v];
    }
  }
}

// Adds ALiBi's bias to a tile whose first key is `distance` positions after its first query.
template <class X, Columns kColumns>
PYPKG_INLINE void add_alibi(float slope, int64_t distance, Sums<X>& scores) {
  constexpr float kStep = kColumns == Columns::kQueries ? -1.0f : 1.0f;
#pragma GCC unroll 4
  for (int v = 0; v < X::kVectors; ++v) {
    typename X::Vec column;
    for (int l = 0; l < X::kLanes; ++l) column[l] = kStep * static_cast<float>(v * X::kLanes + l);
    column += static_cast<float>(distance);
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r)
      scores.at[r][v] += slope * (column - kStep * static_cast<float>(r));
  }
}

// The blocks that a thread holds packed. Each block has one slot. A thread finds a block in its
// slot again unless it has packed another block of the same slot in between.
class PackedBlocks {
 public:
  // Number of slots for `blocks` blocks, of one head or of several that are processed in turn; at
  // most about 4096 rows.
  static int64_t slots(int64_t blocks) { return std::min(blocks, kMostSlots); }

  // Assigns the slot to the block; returns false if the block is in it already.
  bool take(int64_t block, int64_t slot) { return std::exchange(held_[slot], block) != block; }

 private:
  static constexpr int64_t kMostSlots = 43;
  int64_t held_[kMostSlots] = {};  // numbers of blocks, counted from 1
};

// Divides tasks into ranges [begin, end) that a thread takes at once. A unit is a head, whose tasks
// share packed blocks, so most units are taken whole. The last units are divided into ranges of
// `at_once` tasks, so that threads end at about the same time.
inline std::vector<Range> task_ranges(int64_t units, int64_t tasks_of_unit, int64_t at_once,
                                      int64_t threads) {
  const int64_t whole = std::max<int64_t>(0, units / threads - 1) * threads;
  std::vector<Range> ranges;
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t first = unit * tasks_of_unit, step = unit < whole ? tasks_of_unit : at_once;
    for (int64_t task = 0; task < tasks_of_unit; task += step)
      ranges.push_back({first + task, first + std::min(task + step, tasks_of_unit)});
  }
  return ranges;
}

// One scratch structure per thread; all arrays are in one allocation.
template <class Scratch>
class ThreadScratch {
 public:
  ThreadScratch(int threads, std::initializer_list<std::pair<float* Scratch::*, int64_t>> arrays)
      : scratch_(threads) {
    int64_t floats = 0;
    for (const auto& array : arrays) floats += array.second;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, threads * floats * sizeof(float))));
    if (!memory_) throw std::bad_alloc();
    float* next = memory_.get();
    for (Scratch& scratch : scratch_) {
      for (const auto& [member, size] : arrays) {
        scratch.*member = next;
        next += size;
      }
    }
  }
  Scratch& mine() { return scratch_[omp_get_thread_num()]; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<Scratch> scratch_;
  std::unique_ptr<float, Free> memory_;
};

// Calls function(T{}, std::integral_constant<CpuIsa, ...>{}) with the element type and the kernel
// version in use.
template <class Function>
void dispatch_attention(const FlashAttentionShape& s, Function&& function) {
  if (s.head_dim % 8 != 0 || s.head_dim < 8 || s.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("flash_attention: head_dim " + std::to_string(s.head_dim) +
                                " must be a multiple of 8, at most " + std::to_string(kMaxHeadDim));
  }
  dispatch_dtype(s.dtype, "flash_attention",
                 [&](auto t) { dispatch_cpu_isa([&](auto isa) { function(t, isa); }); });
}

}  // namespace pypkg
