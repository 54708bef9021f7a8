#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "cpu_panels.h"
#include "flash_attention.h"

namespace pypkg {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kQueries = 128;      // queries in a block
constexpr int64_t kForwardKeys = 128;  // keys in a block
constexpr int64_t kBackwardKeys = 64;  // fewer: nine operands have to fit the cache, not four
constexpr int64_t kMaxHeadDim = 128;

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// One head of one sequence: where it lies in [batch, sequence, heads, head_dim].
struct Head {
  const FlashAttentionShape& s;
  int64_t b;
  int64_t h;  // query head

  int64_t key_head() const { return h / (s.heads_q / s.heads_k); }
  int64_t q_stride() const { return s.heads_q * s.head_dim; }
  int64_t k_stride() const { return s.heads_k * s.head_dim; }
  int64_t q_offset(int64_t row) const { return ((b * s.seq_q + row) * s.heads_q + h) * s.head_dim; }
  int64_t k_offset(int64_t row) const {
    return ((b * s.seq_k + row) * s.heads_k + key_head()) * s.head_dim;
  }
  int64_t row_index(int64_t row) const { return (b * s.heads_q + h) * s.seq_q + row; }
  int64_t position(int64_t row) const { return row + s.seq_k - s.seq_q; }
  float slope() const { return s.mask.alibi_slopes ? s.mask.alibi_slopes[h] : 0.0f; }

  bool visible(int64_t row, int64_t key) const {
    return is_visible(s.mask, b, position(row), key, s.seq_k);
  }
  // State of rows [row, row + rows) x keys [key, key + keys). Blocks that reach over the end of the
  // sequence are never full.
  BlockState state(int64_t row, int64_t rows, int64_t key, int64_t keys) const {
    const int64_t row_end = std::min(row + rows, s.seq_q), key_end = std::min(key + keys, s.seq_k);
    if (row >= row_end || key >= key_end) return BlockState::kSkip;
    const BlockState inside =
        key_block_state(s.mask, b, position(row), position(row_end), key, key_end, s.seq_k);
    const bool whole = row_end == row + rows && key_end == key + keys;
    return inside == BlockState::kFull && !whole ? BlockState::kPartial : inside;
  }
};

// A tile of scores has kRows rows and kLanes columns. In the forward pass its rows are keys and its
// columns queries, so that the softmax runs over whole vectors; in the backward pass, where keys
// stay and queries pass by, it is the other way round.
enum class Columns { kQueries, kKeys };

// Hides what query rows from `row` on must not see of the keys from `key` on.
template <Columns kColumns, int kRows>
PYPKG_INLINE void mask_tile(const Head& head, int64_t row, int64_t key, Vec (&scores)[kRows]) {
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kLanes; ++c) {
      const int64_t i = row + (kColumns == Columns::kQueries ? c : r);
      const int64_t j = key + (kColumns == Columns::kQueries ? r : c);
      if (i >= head.s.seq_q || j >= head.s.seq_k || !head.visible(i, j)) scores[r][c] = -kInfinity;
    }
  }
}

template <Columns kColumns, int kRows>
PYPKG_INLINE void add_alibi(const Head& head, int64_t row, int64_t key, Vec (&scores)[kRows]) {
  const float slope = head.slope();
  const float step = kColumns == Columns::kQueries ? -1.0f : 1.0f;
  Vec distance;  // key - query, of the first row
  for (int c = 0; c < kLanes; ++c)
    distance[c] = static_cast<float>(key - head.position(row)) + step * c;
  for (int r = 0; r < kRows; ++r) scores[r] += slope * (distance - step * r);
}

struct Range {
  int64_t begin;
  int64_t end;
};

// Cache-sized operands of one thread; panels as in cpu_panels.h.
struct ForwardScratch {
  float* q;       // transposed: kQueries queries
  float* k;       // kForwardKeys rows
  float* v;       // kForwardKeys rows
  float* out;     // kQueries rows, not yet divided by row_sum
  float* scores;  // one panel of kForwardKeys rows: keys down, queries across
  float row_max[kQueries];
  float row_sum[kQueries];
};

// Scores of the kLanes queries from `row` on against a block of keys; returns the keys (counted
// within the block) that any of the queries sees.
template <int kRows>
PYPKG_INLINE Range score_panel(const Head& head, BlockState block, int64_t row, int64_t key,
                               const float* q_panel, const ForwardScratch& scratch) {
  const int64_t depth = padded(head.s.head_dim);
  Range seen{kForwardKeys, 0};
  for (int64_t k = 0; k < kForwardKeys && key + k < head.s.seq_k; k += kRows) {
    float* scores = scratch.scores + k * kLanes;
    const BlockState state =
        block == BlockState::kFull ? BlockState::kFull : head.state(row, kLanes, key + k, kRows);
    if (state == BlockState::kSkip) {
      std::fill_n(scores, kRows * kLanes, -kInfinity);
      continue;
    }
    seen = {std::min(seen.begin, k), k + kRows};
    Vec tile[kRows] = {};
    multiply_rows(tile, scratch.k, kForwardKeys, k, q_panel, depth);
    if (head.s.mask.alibi_slopes) add_alibi<Columns::kQueries>(head, row, key + k, tile);
    if (state == BlockState::kPartial) mask_tile<Columns::kQueries>(head, row, key + k, tile);
    for (int r = 0; r < kRows; ++r) store(scores + r * kLanes, tile[r]);
  }
  return seen;
}

// Turns scores into exp(score - maximum) over all keys so far; returns by how much what was summed
// before has to shrink.
PYPKG_INLINE void softmax_panel(float* scores, Range keys, float* row_max, float* row_sum,
                                float* shrink) {
  const Vec old_max = load(row_max);
  Vec max = old_max;
  for (int64_t k = keys.begin; k < keys.end; ++k) {
    const Vec row = load(scores + k * kLanes);
    max = row > max ? row : max;
  }
  const Vec shift = max == -kInfinity ? Vec{} : max;  // a query that has seen no key yet
  Vec sum = {};
  for (int64_t k = keys.begin; k < keys.end; ++k) {
    const Vec row = fast_exp<Vec>(load(scores + k * kLanes) - shift);
    sum += row;
    store(scores + k * kLanes, row);
  }
  const Vec factor = fast_exp<Vec>(old_max - shift);
  store(row_max, max);
  store(row_sum, load(row_sum) * factor + sum);
  store(shrink, factor);
}

// out = shrink * out + scores^T v for the kLanes queries from `first` of the block on.
template <int kRows>
PYPKG_INLINE void accumulate_panel(const float* scores, Range keys, const float* shrink,
                                   const float* v, int64_t first, int64_t depth, float* out) {
  for (int64_t c = 0; c < depth; c += kLanes) {
    for (int64_t r0 = 0; r0 < kLanes; r0 += kRows) {
      float* rows = out + c * kQueries + (first + r0) * kLanes;
      Vec tile[kRows];
      for (int r = 0; r < kRows; ++r) tile[r] = load(rows + r * kLanes) * shrink[r0 + r];
      multiply_columns(tile, scores, r0, v + c * kForwardKeys, keys.begin, keys.end);
      for (int r = 0; r < kRows; ++r) store(rows + r * kLanes, tile[r]);
    }
  }
}

template <class T, int kRows>
PYPKG_TARGET_CLONES void forward_block(const FlashAttentionForward& p, const Head& head,
                                       int64_t first_row, ForwardScratch& scratch) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded(s.head_dim);
  const int64_t count = std::min(kQueries, s.seq_q - first_row);
  pack_transposed(static_cast<const T*>(p.q) + head.q_offset(first_row), head.q_stride(), count,
                  s.head_dim, s.scale, scratch.q, kQueries);
  std::fill_n(scratch.out, depth * kQueries, 0.0f);
  std::fill_n(scratch.row_max, kQueries, -kInfinity);
  std::fill_n(scratch.row_sum, kQueries, 0.0f);

  for (int64_t key = 0; key < s.seq_k; key += kForwardKeys) {
    const BlockState block = head.state(first_row, kQueries, key, kForwardKeys);
    if (block == BlockState::kSkip) continue;
    const int64_t keys = std::min(kForwardKeys, s.seq_k - key);
    pack(static_cast<const T*>(p.k) + head.k_offset(key), head.k_stride(), keys, s.head_dim, 1.0f,
         scratch.k, kForwardKeys);
    pack(static_cast<const T*>(p.v) + head.k_offset(key), head.k_stride(), keys, s.head_dim, 1.0f,
         scratch.v, kForwardKeys);
    for (int64_t q = 0; q < count; q += kLanes) {
      const Range seen =
          score_panel<kRows>(head, block, first_row + q, key, scratch.q + q * depth, scratch);
      if (seen.begin >= seen.end) continue;
      float shrink[kLanes];
      softmax_panel(scratch.scores, seen, scratch.row_max + q, scratch.row_sum + q, shrink);
      accumulate_panel<kRows>(scratch.scores, seen, shrink, scratch.v, q, depth, scratch.out);
    }
  }

  float* lse = p.softmax_lse + head.row_index(first_row);
  float factor[kQueries];
  for (int64_t r = 0; r < count; ++r) {
    const float sum = scratch.row_sum[r];
    factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
    lse[r] = scratch.row_max[r] + std::log(sum);
  }
  unpack(scratch.out, kQueries, count, s.head_dim, factor,
         static_cast<T*>(p.out) + head.q_offset(first_row), head.q_stride());
}

// --- backward -----------------------------------------------------------------------------------

// Key blocks of one key head are dealt to several chunks, each with its own dq to sum into, when
// there are few heads to share out. Depends on the shape alone, and so does the order of every sum.
int64_t key_chunks(const FlashAttentionShape& s) {
  constexpr int64_t kWantedTasks = 16, kMaxChunks = 4;
  const int64_t wanted = blocks(kWantedTasks, std::max<int64_t>(1, s.batch * s.heads_k));
  return std::max<int64_t>(1, std::min({wanted, kMaxChunks, blocks(s.seq_k, kBackwardKeys)}));
}

// What lies in params.workspace.
struct BackwardWorkspace {
  int64_t query_blocks;
  int64_t block_floats;  // of dq: one block of kQueries rows in panels
  int64_t rows;          // batch * heads_q * seq_q
  int64_t heads;         // batch * heads_q

  explicit BackwardWorkspace(const FlashAttentionShape& s)
      : query_blocks(blocks(s.seq_q, kQueries)),
        block_floats(kQueries * padded(s.head_dim)),
        rows(s.batch * s.heads_q * s.seq_q),
        heads(s.batch * s.heads_q) {}
  int64_t floats(int64_t chunks) const {
    return rows + chunks * heads * query_blocks * block_floats;
  }
  // delta[row] = sum(dout * out) comes first, then dq[chunk][batch][head][block].
  float* dq(float* workspace, int64_t chunk, int64_t head, int64_t block) const {
    return workspace + rows + ((chunk * heads + head) * query_blocks + block) * block_floats;
  }
};

struct BackwardScratch {
  float* k;             // kBackwardKeys rows
  float* k_transposed;  // kBackwardKeys keys
  float* v_transposed;
  float* dk;  // kBackwardKeys rows
  float* dv;
  float* q;     // kQueries rows, times scale
  float* dout;  // kQueries rows
  float* p;     // kQueries rows, keys across
  float* ds;
  float lse[kQueries];
  float delta[kQueries];
};

constexpr int64_t kKeyPanels = kBackwardKeys / kLanes;

// Probabilities p and score gradients ds of a block. Sets live[panel] to the rows of the panel's
// keys that hold anything; outside of them p and ds are zero.
template <int kRows>
PYPKG_INLINE void backward_scores(const Head& head, BlockState block, int64_t row, int64_t key,
                                  const BackwardScratch& scratch, Range (&live)[kKeyPanels]) {
  const int64_t depth = padded(head.s.head_dim);
  for (int64_t panel = 0; panel < kKeyPanels; ++panel) {
    const int64_t k = panel * kLanes;
    live[panel] = {kQueries, 0};
    for (int64_t r0 = 0; r0 < kQueries; r0 += kRows) {
      float* p = scratch.p + k * kQueries + r0 * kLanes;
      float* ds = scratch.ds + k * kQueries + r0 * kLanes;
      const BlockState state = block == BlockState::kFull
                                   ? BlockState::kFull
                                   : head.state(row + r0, kRows, key + k, kLanes);
      if (state == BlockState::kSkip) {
        std::fill_n(p, kRows * kLanes, 0.0f);
        std::fill_n(ds, kRows * kLanes, 0.0f);
        continue;
      }
      live[panel] = {std::min(live[panel].begin, r0), r0 + kRows};
      Vec tile[kRows] = {};
      multiply_rows(tile, scratch.q, kQueries, r0, scratch.k_transposed + k * depth, depth);
      if (head.s.mask.alibi_slopes) add_alibi<Columns::kKeys>(head, row + r0, key + k, tile);
      if (state == BlockState::kPartial) mask_tile<Columns::kKeys>(head, row + r0, key + k, tile);
      Vec dp[kRows] = {};
      multiply_rows(dp, scratch.dout, kQueries, r0, scratch.v_transposed + k * depth, depth);
      for (int r = 0; r < kRows; ++r) {
        const Vec probability = fast_exp<Vec>(tile[r] - scratch.lse[r0 + r]);
        store(p + r * kLanes, probability);
        store(ds + r * kLanes, probability * (dp[r] - scratch.delta[r0 + r]));
      }
    }
  }
}

// target += a^T b over the live rows: dv from p and dout, dk from ds and q.
template <int kRows>
PYPKG_INLINE void accumulate_key_gradient(const float* a, const float* b, int64_t depth,
                                          const Range (&live)[kKeyPanels], float* target) {
  for (int64_t c = 0; c < depth; c += kLanes) {
    for (int64_t k = 0; k < kBackwardKeys; k += kRows) {
      const int64_t panel = k / kLanes;
      const Range rows = live[panel];
      if (rows.begin >= rows.end) continue;
      float* to = target + c * kBackwardKeys + k * kLanes;
      Vec tile[kRows];
      for (int r = 0; r < kRows; ++r) tile[r] = load(to + r * kLanes);
      multiply_columns(tile, a + panel * kLanes * kQueries, k % kLanes, b + c * kQueries,
                       rows.begin, rows.end);
      for (int r = 0; r < kRows; ++r) store(to + r * kLanes, tile[r]);
    }
  }
}

// dq += ds k.
template <int kRows>
PYPKG_INLINE void accumulate_query_gradient(const BackwardScratch& scratch, int64_t depth,
                                            const Range (&live)[kKeyPanels], float* dq) {
  for (int64_t c = 0; c < depth; c += kLanes) {
    for (int64_t r0 = 0; r0 < kQueries; r0 += kRows) {
      float* to = dq + c * kQueries + r0 * kLanes;
      Vec tile[kRows];
      for (int r = 0; r < kRows; ++r) tile[r] = load(to + r * kLanes);
      for (int64_t panel = 0; panel < kKeyPanels; ++panel) {
        if (r0 < live[panel].begin || r0 >= live[panel].end) continue;
        const int64_t k = panel * kLanes;
        multiply_rows(tile, scratch.ds + k * kQueries, kQueries, r0,
                      scratch.k + c * kBackwardKeys + k * kLanes, kLanes);
      }
      for (int r = 0; r < kRows; ++r) store(to + r * kLanes, tile[r]);
    }
  }
}

// One block of keys against one block of queries of one head.
template <class T, int kRows>
PYPKG_TARGET_CLONES void backward_pair(const FlashAttentionBackward& p, const Head& head,
                                       BlockState block, int64_t row, int64_t key,
                                       BackwardScratch& scratch, float* dq) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded(s.head_dim);
  const int64_t count = std::min(kQueries, s.seq_q - row);
  pack(static_cast<const T*>(p.q) + head.q_offset(row), head.q_stride(), count, s.head_dim, s.scale,
       scratch.q, kQueries);
  pack(static_cast<const T*>(p.dout) + head.q_offset(row), head.q_stride(), count, s.head_dim, 1.0f,
       scratch.dout, kQueries);
  // +inf makes every probability 0: rows past the end and rows that see no key.
  std::fill_n(scratch.lse, kQueries, kInfinity);
  std::fill_n(scratch.delta, kQueries, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const float lse = p.softmax_lse[head.row_index(row + r)];
    if (lse != -kInfinity) scratch.lse[r] = lse;
    scratch.delta[r] = p.workspace[head.row_index(row + r)];
  }
  Range live[kKeyPanels];
  backward_scores<kRows>(head, block, row, key, scratch, live);
  accumulate_key_gradient<kRows>(scratch.p, scratch.dout, depth, live, scratch.dv);
  accumulate_key_gradient<kRows>(scratch.ds, scratch.q, depth, live, scratch.dk);
  accumulate_query_gradient<kRows>(scratch, depth, live, dq);
}

template <class T>
PYPKG_TARGET_CLONES void pack_keys(const FlashAttentionBackward& p, const Head& head, int64_t key,
                                   BackwardScratch& scratch) {
  const int64_t count = std::min(kBackwardKeys, p.shape.seq_k - key);
  const T* k = static_cast<const T*>(p.k) + head.k_offset(key);
  const T* v = static_cast<const T*>(p.v) + head.k_offset(key);
  const int64_t stride = head.k_stride(), columns = p.shape.head_dim;
  pack(k, stride, count, columns, 1.0f, scratch.k, kBackwardKeys);
  pack_transposed(k, stride, count, columns, 1.0f, scratch.k_transposed, kBackwardKeys);
  pack_transposed(v, stride, count, columns, 1.0f, scratch.v_transposed, kBackwardKeys);
}

// Every query head of one key head against the key blocks of one chunk.
template <class T, int kRows>
void backward_chunk(const FlashAttentionBackward& p, int64_t b, int64_t key_head, int64_t chunk,
                    BackwardScratch& scratch) {
  const FlashAttentionShape& s = p.shape;
  const BackwardWorkspace workspace(s);
  const int64_t chunks = key_chunks(s), group = s.heads_q / s.heads_k;
  const int64_t depth = padded(s.head_dim);
  const int64_t first_head = key_head * group;
  std::fill_n(workspace.dq(p.workspace, chunk, b * s.heads_q + first_head, 0),
              group * workspace.query_blocks * workspace.block_floats, 0.0f);
  for (int64_t key = chunk * kBackwardKeys; key < s.seq_k; key += chunks * kBackwardKeys) {
    const Head keys{s, b, first_head};
    pack_keys<T>(p, keys, key, scratch);
    std::fill_n(scratch.dk, depth * kBackwardKeys, 0.0f);
    std::fill_n(scratch.dv, depth * kBackwardKeys, 0.0f);
    for (int64_t h = first_head; h < first_head + group; ++h) {
      const Head head{s, b, h};
      for (int64_t block = 0; block < workspace.query_blocks; ++block) {
        const BlockState state = head.state(block * kQueries, kQueries, key, kBackwardKeys);
        if (state == BlockState::kSkip) continue;
        backward_pair<T, kRows>(p, head, state, block * kQueries, key, scratch,
                                workspace.dq(p.workspace, chunk, b * s.heads_q + h, block));
      }
    }
    const int64_t count = std::min(kBackwardKeys, s.seq_k - key);
    float one[kBackwardKeys];
    std::fill_n(one, kBackwardKeys, 1.0f);
    unpack(scratch.dk, kBackwardKeys, count, s.head_dim, one,
           static_cast<T*>(p.dk) + keys.k_offset(key), keys.k_stride());
    unpack(scratch.dv, kBackwardKeys, count, s.head_dim, one,
           static_cast<T*>(p.dv) + keys.k_offset(key), keys.k_stride());
  }
}

// delta[row] = sum(dout * out), the part of the softmax gradient that is the same for every key.
template <class T>
PYPKG_TARGET_CLONES void compute_delta(const FlashAttentionBackward& p, const Head& head,
                                       int64_t first_row, int64_t count) {
  for (int64_t row = first_row; row < first_row + count; ++row) {
    const T* dout = static_cast<const T*>(p.dout) + head.q_offset(row);
    const T* out = static_cast<const T*>(p.out) + head.q_offset(row);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < p.shape.head_dim; ++c) sum += to_float(dout[c]) * to_float(out[c]);
    p.workspace[head.row_index(row)] = sum;
  }
}

// dq of one block: the sum over the chunks, in their order.
template <class T>
PYPKG_TARGET_CLONES void write_query_gradient(const FlashAttentionBackward& p, const Head& head,
                                              int64_t block) {
  const FlashAttentionShape& s = p.shape;
  const BackwardWorkspace workspace(s);
  const int64_t index = head.b * s.heads_q + head.h, row = block * kQueries;
  float* total = workspace.dq(p.workspace, 0, index, block);
  for (int64_t chunk = 1; chunk < key_chunks(s); ++chunk) {
    const float* part = workspace.dq(p.workspace, chunk, index, block);
#pragma omp simd
    for (int64_t i = 0; i < workspace.block_floats; ++i) total[i] += part[i];
  }
  float scale[kQueries];
  std::fill_n(scale, kQueries, s.scale);
  unpack(total, kQueries, std::min(kQueries, s.seq_q - row), s.head_dim, scale,
         static_cast<T*>(p.dq) + head.q_offset(row), head.q_stride());
}

// --- sharing out the work -----------------------------------------------------------------------

// One scratch structure per thread, its arrays carved from one allocation.
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

template <class T, int kRows>
void forward(const FlashAttentionForward& p) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded(s.head_dim), query_blocks = blocks(s.seq_q, kQueries);
  const int threads = num_threads();
  ThreadScratch<ForwardScratch> scratch(threads,
                                        {{&ForwardScratch::q, depth * kQueries},
                                         {&ForwardScratch::k, depth * kForwardKeys},
                                         {&ForwardScratch::v, depth * kForwardKeys},
                                         {&ForwardScratch::out, depth * kQueries},
                                         {&ForwardScratch::scores, kLanes * kForwardKeys}});
  const int64_t heads = s.batch * s.heads_q;
  // Last rows first: under a causal mask they are the longest, and short ones fill the gaps.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = heads * query_blocks - 1; task >= 0; --task) {
    const int64_t index = task % heads;
    const Head head{s, index / s.heads_q, index % s.heads_q};
    forward_block<T, kRows>(p, head, task / heads * kQueries, scratch.mine());
  }
}

template <class T, int kRows>
void backward(const FlashAttentionBackward& p) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded(s.head_dim), query_blocks = blocks(s.seq_q, kQueries);
  const int64_t chunks = key_chunks(s), heads = s.batch * s.heads_q;
  const int threads = num_threads();
  ThreadScratch<BackwardScratch> scratch(threads,
                                         {{&BackwardScratch::k, depth * kBackwardKeys},
                                          {&BackwardScratch::k_transposed, depth * kBackwardKeys},
                                          {&BackwardScratch::v_transposed, depth * kBackwardKeys},
                                          {&BackwardScratch::dk, depth * kBackwardKeys},
                                          {&BackwardScratch::dv, depth * kBackwardKeys},
                                          {&BackwardScratch::q, depth * kQueries},
                                          {&BackwardScratch::dout, depth * kQueries},
                                          {&BackwardScratch::p, kBackwardKeys * kQueries},
                                          {&BackwardScratch::ds, kBackwardKeys * kQueries}});
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * query_blocks; ++task) {
      const int64_t index = task / query_blocks, row = task % query_blocks * kQueries;
      compute_delta<T>(p, Head{s, index / s.heads_q, index % s.heads_q}, row,
                       std::min(kQueries, s.seq_q - row));
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.batch * s.heads_k * chunks; ++task) {
      const int64_t index = task / chunks;
      backward_chunk<T, kRows>(p, index / s.heads_k, index % s.heads_k, task % chunks,
                               scratch.mine());
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * query_blocks; ++task) {
      const int64_t index = task / query_blocks;
      write_query_gradient<T>(p, Head{s, index / s.heads_q, index % s.heads_q},
                              task % query_blocks);
    }
  }
}

// Rows of a register tile: as many as leave room for the operands in 32 or 16 vector registers.
bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

// Calls function(T{}, std::integral_constant<int, kRows>{}).
template <class Function>
void dispatch(const FlashAttentionShape& s, Function&& function) {
  if (s.head_dim % 8 != 0 || s.head_dim < 8 || s.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("flash_attention: head_dim " + std::to_string(s.head_dim) +
                                " must be a multiple of 8, at most 128");
  }
  dispatch_dtype(s.dtype, "flash_attention", [&](auto t) {
    if (has_wide_registers()) {
      function(t, std::integral_constant<int, 8>{});
    } else {
      function(t, std::integral_constant<int, 4>{});
    }
  });
}

}  // namespace

void flash_attention_forward_cpu(const FlashAttentionForward& params) {
  dispatch(params.shape,
           [&](auto t, auto rows) { forward<decltype(t), decltype(rows)::value>(params); });
}

void flash_attention_backward_cpu(const FlashAttentionBackward& params) {
  dispatch(params.shape,
           [&](auto t, auto rows) { backward<decltype(t), decltype(rows)::value>(params); });
}

int64_t flash_attention_backward_workspace_cpu(const FlashAttentionShape& shape) {
  return BackwardWorkspace(shape).floats(key_chunks(shape));
}

}  // namespace pypkg
