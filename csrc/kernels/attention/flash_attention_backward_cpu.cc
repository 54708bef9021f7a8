#include <atomic>

#include "attention/cpu_attention.h"

namespace pypkg {
namespace {

// If there are few heads, the key blocks of a key head are divided into several chunks, each of
// which sums its own dq. The number of chunks, and so the order of every sum, only depends on the
// shape.
int64_t key_chunks(const FlashAttentionShape& s) {
  constexpr int64_t kWantedTasks = 16, kMaxChunks = 4;
  const int64_t wanted = blocks(kWantedTasks, std::max<int64_t>(1, s.batch * s.heads_k));
  return std::max<int64_t>(1, std::min({wanted, kMaxChunks, blocks(s.seq_k, kKeys)}));
}

// The layout of params.workspace, which is the same for every version of the kernel.
struct Workspace {
  int64_t query_blocks;
  int64_t block_floats;  // of dq: one block of kQueries rows in panels
  int64_t heads;         // batch * heads_q

  explicit Workspace(const FlashAttentionShape& s)
      : query_blocks(blocks(s.seq_q, kQueries)),
        block_floats(kQueries * padded<Tile<CpuIsa::kV4>>(s.head_dim)),
        heads(s.batch * s.heads_q) {}
  int64_t floats(int64_t chunks) const { return chunks * heads * query_blocks * block_floats; }
  // dq[chunk][batch][head][block].
  float* dq(float* workspace, int64_t chunk, int64_t head, int64_t block) const {
    return workspace + ((chunk * heads + head) * query_blocks + block) * block_floats;
  }
};

struct Scratch {
  float* k;             // kKeys rows
  float* k_transposed;  // kKeys keys
  float* v_transposed;
  float* dk;  // kKeys rows
  float* dv;
  float* q;      // slots of kQueries rows, times scale
  float* dout;   // slots of kQueries rows
  float* lse;    // slots of kQueries
  float* delta;  // slots of kQueries
  float* p;      // [kQueries, kKeys]
  float* ds;
  VisibleKeys visible;
  PackedBlocks packed;  // in the slots
};

// A block of queries and the gradients of their outputs.
struct QueryPanels {
  float* q;
  float* dout;
  float* lse;  // softmax_lse; +inf makes every probability 0: rows past the end, rows without keys
  float* delta;  // sum(dout * out), the part of the softmax gradient that is equal for all keys
};

// Slots for the blocks of queries of the heads that share a key head.
int64_t query_slots(const FlashAttentionShape& s) {
  return PackedBlocks::slots(s.heads_q / s.heads_k * blocks(s.seq_q, kQueries));
}

// The rows of each panel of p and ds that are not zero.
template <class X>
struct LiveRows {
  Range of_panel[kKeys / X::kWidth];
};

// Computes the probabilities of a tile, and the gradients of its scores: kRows queries from `query`
// of the block on, and kWidth keys from `k` of the block on.
template <class X>
PYPKG_INLINE void backward_tile(const Head& head, BlockState state, int64_t row, int64_t query,
                                int64_t key, int64_t k, const QueryPanels& panels,
                                const Scratch& scratch) {
  using Vec = typename X::Vec;
  const int64_t columns = head.s.head_dim, depth = padded<X>(columns);
  float* p = scratch.p + query * kKeys + k;
  float* ds = scratch.ds + query * kKeys + k;
  Sums<X> tile;
  multiply_rows(tile, panels.q, kQueries, query, scratch.k_transposed + k * depth, columns);
  const bool capped = head.s.softcap > 0.0f;
  if (capped) cap_scores<X>(head.s.softcap, tile, ds);
  if (head.s.mask.alibi_slopes) {
    add_alibi<X, Columns::kKeys>(head.slope(), head.distance(row + query, key + k), tile);
  }
  if (state == BlockState::kPartial) {
    mask_tile<X, Columns::kKeys>(scratch.visible, query, key + k, tile);
  }
#pragma GCC unroll 16
  for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < X::kVectors; ++v)
      tile.at[r][v] = fast_exp<Vec, false>(tile.at[r][v] - panels.lse[query + r]);
  tile.store_to(p, kKeys);
  Sums<X> dp;
  multiply_rows(dp, panels.dout, kQueries, query, scratch.v_transposed + k * depth, columns);
#pragma GCC unroll 16
  for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < X::kVectors; ++v) {
      const int64_t at = r * kKeys + v * X::kLanes;
      dp.at[r][v] = load<Vec>(p + at) * (dp.at[r][v] - panels.delta[query + r]);
      if (capped) dp.at[r][v] *= load<Vec>(ds + at);
    }
  dp.store_to(ds, kKeys);
}

// Probabilities p and score gradients ds of a block.
template <class X>
PYPKG_INLINE LiveRows<X> backward_scores(const Head& head, BlockState block, int64_t row,
                                         int64_t key, const QueryPanels& panels,
                                         const Scratch& scratch) {
  LiveRows<X> live;
  for (int64_t k = 0; k < kKeys; k += X::kWidth) {
    Range& rows = live.of_panel[k / X::kWidth];
    rows = {kQueries, 0};
    for (int64_t r0 = 0; r0 < kQueries; r0 += X::kRows) {
      const BlockState state = block == BlockState::kFull
                                   ? BlockState::kFull
                                   : head.state(row + r0, X::kRows, key + k, X::kWidth);
      if (state == BlockState::kSkip) {
        const Sums<X> zeros;
        zeros.store_to(scratch.p + r0 * kKeys + k, kKeys);
        zeros.store_to(scratch.ds + r0 * kKeys + k, kKeys);
        continue;
      }
      rows = {std::min(rows.begin, r0), r0 + X::kRows};
      backward_tile<X>(head, state, row, r0, key, k, panels, scratch);
    }
  }
  return live;
}

// target += a^T b over the live rows: dv from p and dout, dk from ds and q.
template <class X>
PYPKG_INLINE void accumulate_key_gradient(const float* a, const float* b, int64_t depth,
                                          const LiveRows<X>& live, float* target) {
  for (int64_t c = 0; c < depth; c += X::kWidth) {
    for (int64_t k = 0; k < kKeys; k += X::kRows) {
      const Range rows = joined<X>(live.of_panel, k);
      if (rows.empty()) continue;
      float* to = target + c * kKeys + k * X::kWidth;
      Sums<X> tile;
      tile.load_from(to);
      multiply_columns<X, kKeys>(tile, a, k, b + c * kQueries, rows.begin, rows.end);
      tile.store_to(to);
    }
  }
}

// dq += ds k.
template <class X>
PYPKG_INLINE void accumulate_query_gradient(const Scratch& scratch, int64_t depth,
                                            const LiveRows<X>& live, float* dq) {
  Range live_keys[kQueries / X::kRows];
  for (int64_t r0 = 0; r0 < kQueries; r0 += X::kRows) {
    Range& keys = live_keys[r0 / X::kRows];
    keys = {kKeys, 0};
    for (int64_t k = 0; k < kKeys; k += X::kWidth) {
      const Range rows = live.of_panel[k / X::kWidth];
      if (rows.begin <= r0 && r0 < rows.end) keys = keys.joined({k, k + X::kWidth});
    }
  }
  for (int64_t c = 0; c < depth; c += X::kWidth) {
    for (int64_t r0 = 0; r0 < kQueries; r0 += X::kRows) {
      const Range keys = live_keys[r0 / X::kRows];
      if (keys.empty()) continue;
      float* to = dq + c * kQueries + r0 * X::kWidth;
      Sums<X> tile;
      tile.load_from(to);
      multiply_add<X, kKeys, 1>(tile, scratch.ds + r0 * kKeys + keys.begin,
                                scratch.k + c * kKeys + keys.begin * X::kWidth,
                                keys.end - keys.begin);
      tile.store_to(to);
    }
  }
}

// delta[r] = sum(dout * out) of the rows from `first_row` on.
template <class T>
PYPKG_INLINE void compute_delta(const FlashAttentionBackward& p, const Head& head,
                                int64_t first_row, int64_t count, float* delta) {
  for (int64_t r = 0; r < count; ++r) {
    const T* dout = static_cast<const T*>(p.dout) + head.out_offset(first_row + r);
    const T* out = static_cast<const T*>(p.out) + head.out_offset(first_row + r);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < p.shape.head_dim; ++c) sum += to_float(dout[c]) * to_float(out[c]);
    delta[r] = sum;
  }
}

// The packed block of queries from `row` on; packs it unless this thread holds it already.
template <class T, class X>
PYPKG_INLINE QueryPanels query_panels(const FlashAttentionBackward& p, const Head& head,
                                      int64_t row, Scratch& scratch) {
  const FlashAttentionShape& s = p.shape;
  const int64_t floats = padded<X>(s.head_dim) * kQueries;
  const int64_t number = (head.b * s.heads_q + head.h) * blocks(s.seq_q, kQueries) + row / kQueries;
  const int64_t slot = number % query_slots(s);
  const QueryPanels panels{scratch.q + slot * floats, scratch.dout + slot * floats,
                           scratch.lse + slot * kQueries, scratch.delta + slot * kQueries};
  if (scratch.packed.take(number + 1, slot)) {
    const int64_t count = std::min(kQueries, s.seq_q - row);
    pack<X>(static_cast<const T*>(p.q) + head.q_offset(row), s.q_stride(), count, s.head_dim,
            s.scale, panels.q, kQueries);
    pack<X>(static_cast<const T*>(p.dout) + head.out_offset(row), s.out_stride(), count, s.head_dim,
            1.0f, panels.dout, kQueries);
    std::fill_n(panels.lse, kQueries, kInfinity);
    std::fill_n(panels.delta, kQueries, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const float lse = p.softmax_lse[head.row_index(row + r)];
      if (lse != -kInfinity) panels.lse[r] = lse;
    }
    compute_delta<T>(p, head, row, count, panels.delta);
  }
  return panels;
}

// The gradients of one block of keys and one block of queries of one head.
template <class T, class X>
PYPKG_INLINE void backward_pair(const FlashAttentionBackward& p, const Head& head, BlockState block,
                                int64_t row, int64_t key, Scratch& scratch, float* dq) {
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded<X>(s.head_dim);
  const QueryPanels panels = query_panels<T, X>(p, head, row, scratch);
  if (block == BlockState::kPartial) scratch.visible.set(head, row);
  const LiveRows<X> live = backward_scores<X>(head, block, row, key, panels, scratch);
  accumulate_key_gradient<X>(scratch.p, panels.dout, depth, live, scratch.dv);
  accumulate_key_gradient<X>(scratch.ds, panels.q, depth, live, scratch.dk);
  accumulate_query_gradient<X>(scratch, depth, live, dq);
}

template <class T, class X>
PYPKG_INLINE void pack_keys(const FlashAttentionBackward& p, const Head& head, int64_t key,
                            Scratch& scratch) {
  const int64_t count = std::min(kKeys, p.shape.seq_k - key);
  const T* k = static_cast<const T*>(p.k) + head.k_offset(key);
  const T* v = static_cast<const T*>(p.v) + head.k_offset(key);
  const int64_t stride = p.shape.k_stride(), columns = p.shape.head_dim;
  pack<X>(k, stride, count, columns, 1.0f, scratch.k, kKeys);
  pack_transposed<X>(k, stride, count, columns, 1.0f, scratch.k_transposed, kKeys);
  pack_transposed<X>(v, stride, count, columns, 1.0f, scratch.v_transposed, kKeys);
}

template <class T, class X>
PYPKG_INLINE void unpack_key_gradients(const FlashAttentionBackward& p, const Head& head,
                                       int64_t key, const Scratch& scratch) {
  const int64_t count = std::min(kKeys, p.shape.seq_k - key);
  float one[kKeys];
  std::fill_n(one, kKeys, 1.0f);
  for (const auto& [panels, target] : {std::pair(scratch.dk, p.dk), std::pair(scratch.dv, p.dv)}) {
    unpack<X>(panels, kKeys, count, p.shape.head_dim, one,
              static_cast<T*>(target) + head.k_offset(key), p.shape.k_stride());
  }
}

// The gradients of the key blocks of one chunk, with every query head of a key head.
template <class T, CpuIsa kIsa>
void backward_chunk(const FlashAttentionBackward& p, int64_t b, int64_t key_head, int64_t chunk,
                    Scratch& scratch) {
  using X = Tile<kIsa>;
  const FlashAttentionShape& s = p.shape;
  const Workspace workspace(s);
  const int64_t chunks = key_chunks(s), group = s.heads_q / s.heads_k;
  const int64_t depth = padded<X>(s.head_dim);
  const int64_t first_head = key_head * group;
  std::fill_n(workspace.dq(p.workspace, chunk, b * s.heads_q + first_head, 0),
              group * workspace.query_blocks * workspace.block_floats, 0.0f);
  for (int64_t key = chunk * kKeys; key < s.seq_k; key += chunks * kKeys) {
    const Head keys{s, b, first_head};
    CpuVersion<kIsa, pack_keys<T, X>>::run(p, keys, key, scratch);
    std::fill_n(scratch.dk, depth * kKeys, 0.0f);
    std::fill_n(scratch.dv, depth * kKeys, 0.0f);
    for (int64_t h = first_head; h < first_head + group; ++h) {
      const Head head{s, b, h};
      for (int64_t block = 0; block < workspace.query_blocks; ++block) {
        const BlockState state = head.state(block * kQueries, kQueries, key, kKeys);
        if (state == BlockState::kSkip) continue;
        float* dq = workspace.dq(p.workspace, chunk, b * s.heads_q + h, block);
        CpuVersion<kIsa, backward_pair<T, X>>::run(p, head, state, block * kQueries, key, scratch,
                                                   dq);
      }
    }
    CpuVersion<kIsa, unpack_key_gradients<T, X>>::run(p, keys, key, scratch);
  }
}

// dq of one block: the sum over the chunks, in their order.
template <class T, class X>
PYPKG_INLINE void write_query_gradient(const FlashAttentionBackward& p, const Head& head,
                                       int64_t block) {
  const FlashAttentionShape& s = p.shape;
  const Workspace workspace(s);
  const int64_t index = head.b * s.heads_q + head.h, row = block * kQueries;
  float* total = workspace.dq(p.workspace, 0, index, block);
  for (int64_t chunk = 1; chunk < key_chunks(s); ++chunk) {
    const float* part = workspace.dq(p.workspace, chunk, index, block);
#pragma omp simd
    for (int64_t i = 0; i < workspace.block_floats; ++i) total[i] += part[i];
  }
  float scale[kQueries];
  std::fill_n(scale, kQueries, s.scale);
  unpack<X>(total, kQueries, std::min(kQueries, s.seq_q - row), s.head_dim, scale,
            static_cast<T*>(p.dq) + head.q_offset(row), s.q_stride());
}

template <class T, CpuIsa kIsa>
void backward(const FlashAttentionBackward& p) {
  using X = Tile<kIsa>;
  const FlashAttentionShape& s = p.shape;
  const int64_t depth = padded<X>(s.head_dim), query_blocks = blocks(s.seq_q, kQueries);
  const int64_t chunks = key_chunks(s), key_heads = s.batch * s.heads_k;
  const int64_t blocks_of_key_head = s.heads_q / s.heads_k * query_blocks;
  const int threads = num_threads();
  ThreadScratch<Scratch> scratch(threads, {{&Scratch::k, depth * kKeys},
                                           {&Scratch::k_transposed, depth * kKeys},
                                           {&Scratch::v_transposed, depth * kKeys},
                                           {&Scratch::dk, depth * kKeys},
                                           {&Scratch::dv, depth * kKeys},
                                           {&Scratch::q, query_slots(s) * depth * kQueries},
                                           {&Scratch::dout, query_slots(s) * depth * kQueries},
                                           {&Scratch::lse, query_slots(s) * kQueries},
                                           {&Scratch::delta, query_slots(s) * kQueries},
                                           {&Scratch::p, kKeys * kQueries},
                                           {&Scratch::ds, kKeys * kQueries}});
  const std::vector<Range> ranges = task_ranges(key_heads, chunks, 1, threads);
  std::vector<std::atomic<int64_t>> done(key_heads);  // chunks
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (size_t taken = 0; taken < ranges.size(); ++taken) {
    for (int64_t task = ranges[taken].begin; task < ranges[taken].end; ++task) {
      const int64_t index = task / chunks;
      backward_chunk<T, kIsa>(p, index / s.heads_k, index % s.heads_k, task % chunks,
                              scratch.mine());
      if (done[index].fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) continue;
      for (int64_t block = 0; block < blocks_of_key_head; ++block) {
        const int64_t row = index * blocks_of_key_head + block, head = row / query_blocks;
        CpuVersion<kIsa, write_query_gradient<T, X>>::run(
            p, Head{s, head / s.heads_q, head % s.heads_q}, row % query_blocks);
      }
    }
  }
}

}  // namespace

void flash_attention_backward_cpu(const FlashAttentionBackward& params) {
  dispatch_attention(params.shape, [&](auto t, auto isa) { backward<decltype(t), isa()>(params); });
}

int64_t flash_attention_backward_workspace_cpu(const FlashAttentionShape& shape) {
  return Workspace(shape).floats(key_chunks(shape));
}

}  // namespace pypkg
