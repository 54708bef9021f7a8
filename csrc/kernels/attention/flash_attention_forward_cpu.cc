#include <cmath>
#include <numeric>

#include "attention/cpu_attention.h"

namespace pypkg {
namespace {

// Number of queries whose softmax is computed together: whole panels, and whole tiles of rows.
template <class X>
constexpr int64_t kStrip = std::lcm(X::kWidth, X::kRows);

// Cache-sized operands of one thread; panels as in cpu_panels.h.
struct Scratch {
  float* q;       // transposed: kQueries queries
  float* k;       // slots of kKeys rows
  float* v;       // slots of kKeys rows
  float* out;     // kQueries rows, not yet divided by row_sum
  float* scores;  // [kKeys, kStrip]
  float row_max[kQueries];
  float row_sum[kQueries];
  VisibleKeys visible;
  PackedBlocks packed;  // in the slots of k and v
};

// A block of keys and its values.
struct KeyPanels {
  const float* k;
  const float* v;
};

// Computes the scores of the kWidth queries from `query` of the block on with a block of keys; rows
// are kStrip apart. Returns the range of keys in the block that any of the queries sees; the scores
// of other keys are -inf. `highest` receives the highest score of each query.
template <class X>
PYPKG_INLINE Range score_panel(const Head& head, BlockState block, int64_t first_row, int64_t query,
                               int64_t key, const float* keys, const Scratch& scratch,
                               float* scores, float* highest) {
  using Vec = typename X::Vec;
  Vec max[X::kVectors];
  std::fill_n(max, X::kVectors, Vec{} - kInfinity);
  const int64_t row = first_row + query, depth = padded<X>(head.s.head_dim);
  Range seen{kKeys, 0};
  for (int64_t k = 0; k < kKeys && key + k < head.s.seq_k; k += X::kRows) {
    const BlockState state = block == BlockState::kFull
                                 ? BlockState::kFull
                                 : head.state(row, X::kWidth, key + k, X::kRows);
    Sums<X> tile;
    if (state == BlockState::kSkip) {
      tile.fill(-kInfinity);
    } else {
      seen = {std::min(seen.begin, k), k + X::kRows};
      multiply_rows(tile, keys, kKeys, k, scratch.q + query * depth, head.s.head_dim);
      if (head.s.softcap > 0.0f) cap_scores<X>(head.s.softcap, tile);
      if (head.s.mask.alibi_slopes) {
        add_alibi<X, Columns::kQueries>(head.slope(), head.distance(row, key + k), tile);
      }
      if (state == BlockState::kPartial) {
        mask_tile<X, Columns::kQueries>(scratch.visible, query, key + k, tile);
      }
    }
    tile.store_to(scores + k * kStrip<X>, kStrip<X>);
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < X::kVectors; ++v)
        max[v] = tile.at[r][v] > max[v] ? tile.at[r][v] : max[v];
  }
  for (int v = 0; v < X::kVectors; ++v) store(highest + v * X::kLanes, max[v]);
  return seen;
}

// Online softmax of one vector of queries: replaces scores by exp(score - maximum over all keys so
// far). `highest` has the highest new scores; `shrink` receives the factor of the earlier sums.
template <class X>
PYPKG_INLINE void softmax_vector(float* scores, Range keys, const float* highest, float* row_max,
                                 float* row_sum, float* shrink) {
  using Vec = typename X::Vec;
  const Vec old_max = load<Vec>(row_max), new_max = load<Vec>(highest);
  const Vec max = new_max > old_max ? new_max : old_max;
  const Vec shift = max == -kInfinity ? Vec{} : max;  // a query that has seen no key yet
  Vec sum = {};
  for (int64_t k = keys.begin; k < keys.end; ++k) {
    const Vec row = fast_exp<Vec, false>(load<Vec>(scores + k * kStrip<X>) - shift);
    sum += row;
    store(scores + k * kStrip<X>, row);
  }
  const Vec factor = fast_exp<Vec, false>(old_max - shift);
  store(row_max, max);
  store(row_sum, load<Vec>(row_sum) * factor + sum);
  store(shrink, factor);
}

// out = shrink * out + scores^T v for the kStrip queries from `first` of the block on. seen: the
// range of keys that each panel of queries sees.
template <class X>
PYPKG_INLINE void accumulate_strip(const float* scores, const Range* seen, const float* shrink,
                                   const float* v, int64_t first, int64_t depth, float* out) {
  for (int64_t c = 0; c < depth; c += X::kWidth) {
    for (int64_t r0 = 0; r0 < kStrip<X>; r0 += X::kRows) {
      const Range keys = joined<X>(seen, r0);
      if (keys.empty()) continue;
      float* rows = out + c * kQueries + (first + r0) * X::kWidth;
      Sums<X> tile;
      tile.load_from(rows);
#pragma GCC unroll 16
      for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
        for (int l = 0; l < X::kVectors; ++l) tile.at[r][l] *= shrink[r0 + r];
      multiply_columns<X, kStrip<X>>(tile, scores, r0, v + c * kKeys, keys.begin, keys.end);
      tile.store_to(rows);
    }
  }
}

// Attention of the kStrip queries from `first` of the block on to a block of keys.
template <class X>
PYPKG_INLINE void attend_strip(const Head& head, BlockState block, int64_t first_row, int64_t first,
                               int64_t key, const KeyPanels& panels, Scratch& scratch) {
  const int64_t depth = padded<X>(head.s.head_dim);
  Range seen[kStrip<X> / X::kWidth];
  Range all{kKeys, 0};
  float highest[kStrip<X>];
  for (int64_t q = 0; q < kStrip<X>; q += X::kWidth) {
    Range& keys = seen[q / X::kWidth];
    keys = score_panel<X>(head, block, first_row, first + q, key, panels.k, scratch,
                          scratch.scores + q, highest + q);
    all = all.joined(keys);
  }
  if (all.empty()) return;
  float shrink[kStrip<X>];
  for (int64_t l = 0; l < kStrip<X>; l += X::kLanes) {
    softmax_vector<X>(scratch.scores + l, all, highest + l, scratch.row_max + first + l,
                      scratch.row_sum + first + l, shrink + l);
  }
  accumulate_strip<X>(scratch.scores, seen, shrink, panels.v, first, depth, scratch.out);
}

// The packed block of keys from `key` on; packs it unless this thread holds it already.
template <class T, class X>
PYPKG_INLINE KeyPanels key_panels(const FlashAttentionForward& p, const Head& head, int64_t key,
                                  Scratch& scratch) {
  const FlashAttentionShape& s = p.shape;
  const int64_t key_blocks = blocks(s.seq_k, kKeys), floats = padded<X>(s.head_dim) * kKeys;
  const int64_t number = (head.b * s.heads_k + head.key_head()) * key_blocks + key / kKeys;
  const int64_t slot = number % PackedBlocks::slots(key_blocks);
  float* k = scratch.k + slot * floats;
  float* v = scratch.v + slot * floats;
  if (scratch.packed.take(number + 1, slot)) {
    const int64_t count = std::min(kKeys, s.seq_k - key), stride = s.k_stride();
    pack<X>(static_cast<const T*>(p.k) + head.k_offset(key), stride, count, s.head_dim, 1.0f, k,
            kKeys);
    pack<X>(static_cast<const T*>(p.v) + head.k_offset(key), stride, count, s.head_dim, 1.0f, v,
            kKeys);
  }
  return {k, v};
}

template <class T, class X>
PYPKG_INLINE void forward_block(const FlashAttentionForward& p, const Head& head, int64_t first_row,
                                Scratch& scratch) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded<X>(s.head_dim);
  const int64_t count = std::min(kQueries, s.seq_q - first_row);
  pack_transposed<X>(static_cast<const T*>(p.q) + head.q_offset(first_row), s.q_stride(), count,
                     s.head_dim, s.scale, scratch.q, kQueries);
  std::fill_n(scratch.out, depth * kQueries, 0.0f);
  std::fill_n(scratch.row_max, kQueries, -kInfinity);
  std::fill_n(scratch.row_sum, kQueries, 0.0f);
  scratch.visible.set(head, first_row);

  for (int64_t key = 0; key < s.seq_k; key += kKeys) {
    const BlockState block = head.state(first_row, kQueries, key, kKeys);
    if (block == BlockState::kSkip) continue;
    const KeyPanels panels = key_panels<T, X>(p, head, key, scratch);
    for (int64_t q = 0; q < count; q += kStrip<X>) {
      attend_strip<X>(head, block, first_row, q, key, panels, scratch);
    }
  }

  float* lse = p.softmax_lse + head.row_index(first_row);
  float factor[kQueries];
  for (int64_t r = 0; r < count; ++r) {
    const float sum = scratch.row_sum[r];
    factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    lse[r] = scratch.row_max[r] + std::log(sum);
  }
  unpack<X>(scratch.out, kQueries, count, s.head_dim, factor,
            static_cast<T*>(p.out) + head.out_offset(first_row), s.out_stride());
}

template <class T, CpuIsa kIsa>
void forward(const FlashAttentionForward& p) {
  using X = Tile<kIsa>;
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded<X>(s.head_dim), query_blocks = blocks(s.seq_q, kQueries);
  const int64_t slots = PackedBlocks::slots(blocks(s.seq_k, kKeys));
  const int threads = num_threads();
  ThreadScratch<Scratch> scratch(threads, {{&Scratch::q, depth * kQueries},
                                           {&Scratch::k, slots * depth * kKeys},
                                           {&Scratch::v, slots * depth * kKeys},
                                           {&Scratch::out, depth * kQueries},
                                           {&Scratch::scores, kStrip<X> * kKeys}});
  // Last rows first: under a causal mask they take longest, so short tasks balance the threads.
  const int64_t group = s.heads_q / s.heads_k, tasks_of_unit = group * query_blocks;
  const std::vector<Range> ranges = task_ranges(s.batch * s.heads_k, tasks_of_unit, 2, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (size_t taken = 0; taken < ranges.size(); ++taken) {
    for (int64_t task = ranges[taken].begin; task < ranges[taken].end; ++task) {
      const int64_t index = task / query_blocks, block = query_blocks - 1 - task % query_blocks;
      const Head head{s, index / s.heads_q, index % s.heads_q};
      CpuVersion<kIsa, forward_block<T, X>>::run(p, head, block * kQueries, scratch.mine());
    }
  }
}

}  // namespace

void flash_attention_forward_cpu(const FlashAttentionForward& params) {
  dispatch_attention(params.shape, [&](auto t, auto isa) { forward<decltype(t), isa()>(params); });
}

}  // namespace pypkg
