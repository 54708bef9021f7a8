#include <algorithm>
#include <vector>

#include "adamw/adamw_update.h"
#include "common/cpu_simd.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 8192;  // elements that a thread takes at a time

struct Slice {
  const AdamWTensor* tensor;
  int64_t begin;
  int64_t end;
};

template <class P, class G, bool kHasMaster>
PYPKG_INLINE void update(const AdamW& p, const Slice& s) {
  const AdamWTensor& t = *s.tensor;
  const AdamWRates rates = adamw_rates(p, t);
  const float beta1 = p.beta1, beta2 = p.beta2, scale = p.grad_scale ? *p.grad_scale : 1.0f;
  P* const param = static_cast<P*>(t.param);
  const G* const grad = static_cast<const G*>(t.grad);
  float *const moment1 = t.moment1, *const moment2 = t.moment2, *const master = t.master;
#pragma omp simd
  for (int64_t i = s.begin; i < s.end; ++i) {
    const float weight = kHasMaster ? master[i] : to_float(param[i]);
    const AdamWElement next = adamw_update({weight, moment1[i], moment2[i]},
                                           to_float(grad[i]) * scale, beta1, beta2, rates);
    moment1[i] = next.moment1;
    moment2[i] = next.moment2;
    if constexpr (kHasMaster) master[i] = next.weight;
    param[i] = from_float<P>(next.weight);
  }
}

std::vector<Slice> slices(const AdamW& p) {
  std::vector<Slice> all;
  for (int64_t i = 0; i < p.count; ++i) {
    for (int64_t begin = 0; begin < p.tensors[i].numel; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, p.tensors[i].numel);
      all.push_back({&p.tensors[i], begin, end});
    }
  }
  return all;
}

}  // namespace

void adamw_cpu(const AdamW& params) {
  check_adamw(params);
  if (params.count == 0 || (params.grad_scale && !is_step(*params.grad_scale))) return;
  const std::vector<Slice> all = slices(params);
  const int64_t count = static_cast<int64_t>(all.size());
  dispatch_dtype(params.dtype, "adamw", [&](auto param) {
    dispatch_dtype(params.grad_dtype, "adamw", [&](auto grad) {
      dispatch_masters(params, [&](auto has_master) {
        const auto run = cpu_version<update<decltype(param), decltype(grad), has_master()>>();
#pragma omp parallel for num_threads(num_threads()) schedule(static)
        for (int64_t i = 0; i < count; ++i) run(params, all[i]);
      });
    });
  });
}

}  // namespace pypkg
