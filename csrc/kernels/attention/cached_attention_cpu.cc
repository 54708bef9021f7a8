#include <omp.h>

#include <algorithm>
#include <vector>

#include "attention/cached_attention.h"
#include "common/cpu_simd.h"

namespace pypkg {
namespace {

// One query head of one row: the keys [first, position] of its key head, and as many values.
struct Query {
  const float* q;
  const float* keys;
  const float* values;
  float* out;
  int64_t count;
  float slope;
};

// `scores` has room for all keys.
PYPKG_INLINE void attend(const CachedAttention& p, const Query& query, float* scores) {
  const int64_t dim = p.head_dim;
  float highest = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < query.count; ++j) {
    const float* key = query.keys + j * dim;
    float score = 0.0f;
#pragma omp simd reduction(+ : score)
    for (int64_t d = 0; d < dim; ++d) score += query.q[d] * key[d];
    score *= p.scale;
    if (p.softcap > 0) score = p.softcap * fast_tanh(score / p.softcap);
    score += query.slope * static_cast<float>(j + 1 - query.count);
    scores[j] = score;
    highest = std::max(highest, score);
  }
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < query.count; ++j) {
    scores[j] = fast_exp<float, false>(scores[j] - highest);
    total += scores[j];
  }
  std::fill_n(query.out, dim, 0.0f);
  for (int64_t j = 0; j < query.count; ++j) {
    const float weight = scores[j] / total;
    const float* value = query.values + j * dim;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) query.out[d] += weight * value[d];
  }
}

// Key head h of row b, and the query heads that it serves.
PYPKG_INLINE void head(const CachedAttention& p, int64_t b, int64_t h, float* scores) {
  const int64_t dim = p.head_dim, group = p.heads_q / p.heads_k;
  float* keys = p.keys + (b * p.heads_k + h) * p.capacity * dim;
  float* values = p.values + (b * p.heads_k + h) * p.capacity * dim;
  std::copy_n(p.k + b * p.k_stride + h * dim, dim, keys + p.position * dim);
  std::copy_n(p.v + b * p.k_stride + h * dim, dim, values + p.position * dim);
  int64_t first = p.first_keys ? p.first_keys[b] : 0;
  if (p.window > 0) first = std::max(first, p.position + 1 - p.window);
  for (int64_t each = h * group; each < (h + 1) * group; ++each) {
    attend(p,
           {p.q + b * p.q_stride + each * dim, keys + first * dim, values + first * dim,
            p.out + (b * p.heads_q + each) * dim, p.position + 1 - first,
            p.alibi_slopes ? p.alibi_slopes[each] : 0.0f},
           scores);
  }
}

}  // namespace

void cached_attention_cpu(const CachedAttention& p) {
  const auto of_head = cpu_version<head>();
  const int64_t tasks = p.batch * p.heads_k;
  const int threads = threads_for(p.batch * p.heads_q * p.position * p.head_dim);
  std::vector<float> scores(static_cast<size_t>(threads * (p.position + 1)));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    float* mine = scores.data() + omp_get_thread_num() * (p.position + 1);
    of_head(p, task / p.heads_k, task % p.heads_k, mine);
  }
}

}  // namespace pypkg
