#include <algorithm>
#include <vector>

#include "adamw_update.h"
#include "cpu_simd.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 8192;  // elements that a thread takes at a time

struct Slice {
  const AdamWTensor* tensor;
  uint32_t number;  // of the tensor
  int64_t begin;
  int64_t end;
};

// Elements [begin, end) with the noise of each in `noise` where it is needed.
template <class P, class G, AdamWWeights kWeights>
PYPKG_INLINE void update_run(const AdamW& p, const AdamWTensor& t, int64_t begin, int64_t end,
                             const uint32_t* noise) {
  const AdamWRates rates = adamw_rates(p, t);
  const float beta1 = p.beta1, beta2 = p.beta2, scale = p.grad_scale ? *p.grad_scale : 1.0f;
  P* const param = static_cast<P*>(t.param);
  const G* const grad = static_cast<const G*>(t.grad);
  float *const moment1 = t.moment1, *const moment2 = t.moment2, *const master = t.master;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float weight = kWeights == AdamWWeights::kMaster ? master[i] : to_float(param[i]);
    const AdamWElement next = adamw_update({weight, moment1[i], moment2[i]},
                                           to_float(grad[i]) * scale, beta1, beta2, rates);
    moment1[i] = next.moment1;
    moment2[i] = next.moment2;
    if constexpr (kWeights == AdamWWeights::kMaster) master[i] = next.weight;
    if constexpr (kWeights == AdamWWeights::kStochastic) {
      param[i] = {round_stochastically(next.weight, noise[i - begin])};
    } else {
      param[i] = from_float<P>(next.weight);
    }
  }
}

template <class P, class G, AdamWWeights kWeights>
PYPKG_INLINE void update(const AdamW& p, const Slice& s) {
  if constexpr (kWeights != AdamWWeights::kStochastic) {
    update_run<P, G, kWeights>(p, *s.tensor, s.begin, s.end, nullptr);
  } else if constexpr (std::is_same_v<P, BFloat16>) {
    uint32_t noise[kChunk];
    for (int64_t i = s.begin; i < s.end; i += AdamWNoise::kGroup) {
      const AdamWNoise group = adamw_noise(p.seed, p.offset, s.number, i / AdamWNoise::kGroup);
      for (int j = 0; j < AdamWNoise::kGroup; ++j) noise[i - s.begin + j] = group[j];
    }
    update_run<P, G, kWeights>(p, *s.tensor, s.begin, s.end, noise);
  }
}

std::vector<Slice> slices(const AdamW& p) {
  std::vector<Slice> all;
  for (int64_t i = 0; i < p.count; ++i) {
    for (int64_t begin = 0; begin < p.tensors[i].numel; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, p.tensors[i].numel);
      all.push_back({&p.tensors[i], static_cast<uint32_t>(i), begin, end});
    }
  }
  return all;
}

}  // namespace

void adamw_cpu(const AdamW& params) {
  check_adamw(params);
  if (params.count == 0) return;
  const std::vector<Slice> all = slices(params);
  const int64_t count = static_cast<int64_t>(all.size());
  dispatch_dtype(params.dtype, "adamw", [&](auto param) {
    dispatch_dtype(params.grad_dtype, "adamw", [&](auto grad) {
      dispatch_adamw_weights(params, [&](auto weights) {
        const auto run = cpu_version<update<decltype(param), decltype(grad), weights()>>();
#pragma omp parallel for num_threads(num_threads()) schedule(static)
        for (int64_t i = 0; i < count; ++i) run(params, all[i]);
      });
    });
  });
}

}  // namespace pypkg
