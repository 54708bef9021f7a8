#include "adamw/adamw_update.h"
#include "common/cuda_vector.cuh"

namespace pypkg {
namespace {

constexpr int kThreads = 256;
// Minimum per multiprocessor, which limits a thread to 64 registers. Without it ptxas spills in one
// variant.
constexpr int kResidentThreads = 1024;
constexpr int64_t kChunk = 4096;  // elements that a block takes at a time; whole vectors

// A tensor in the kernel's arguments.
struct Entry {
  void* param;
  const void* grad;
  float* moment1;
  float* moment2;
  float* master;
  int64_t numel;
  AdamWRates rates;
  int first_chunk;  // counted over all tensors of the launch
};

// Kernel arguments hold 4 KiB.
constexpr int kMaxEntries = 62;

struct Batch {
  Entry entries[kMaxEntries];
  const float* grad_scale;
  float beta1;
  float beta2;
  int count;
  int chunks;
};
static_assert(sizeof(Batch) <= 4096);

// Updates kSize consecutive elements from `at` on. Moments are processed four at a time: eight
// would need more registers than are available with 1024 threads.
template <typename P, typename G, bool kHasMaster, int kSize>
__device__ __forceinline__ void update_run(const Batch& batch, const Entry& entry, float scale,
                                           int64_t at) {
  constexpr int kPart = kSize < 4 ? kSize : 4;
  using Part = Pack<float, kPart>;
  P* const param = static_cast<P*>(entry.param) + at;
  const auto grad = Pack<G, kSize>::load(static_cast<const G*>(entry.grad) + at);
  Pack<P, kSize> weights;
  if constexpr (!kHasMaster) weights = Pack<P, kSize>::load(param);
#pragma unroll
  for (int part = 0; part < kSize; part += kPart) {
    auto moment1 = Part::load(entry.moment1 + at + part);
    auto moment2 = Part::load(entry.moment2 + at + part);
    Part master;
    if constexpr (kHasMaster) master = Part::load(entry.master + at + part);
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      const int i = part + j;
      const float weight = kHasMaster ? master[j] : weights[i];
      const AdamWElement next = adamw_update({weight, moment1[j], moment2[j]}, grad[i] * scale,
                                             batch.beta1, batch.beta2, entry.rates);
      moment1.set(j, next.moment1);
      moment2.set(j, next.moment2);
      if constexpr (kHasMaster) master.set(j, next.weight);
      weights.set(i, next.weight);
    }
    moment1.store(entry.moment1 + at + part);
    moment2.store(entry.moment2 + at + part);
    if constexpr (kHasMaster) master.store(entry.master + at + part);
  }
  weights.store(param);
}

__device__ __forceinline__ int entry_of(const Batch& batch, int chunk) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (batch.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

inline __device__ bool is_aligned(const Entry& entry) {
  const auto bits =
      reinterpret_cast<uintptr_t>(entry.param) | reinterpret_cast<uintptr_t>(entry.grad) |
      reinterpret_cast<uintptr_t>(entry.moment1) | reinterpret_cast<uintptr_t>(entry.moment2) |
      reinterpret_cast<uintptr_t>(entry.master);
  return bits % kVectorBytes == 0;
}

template <typename P, typename G, bool kHasMaster>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    adamw_kernel(const __grid_constant__ Batch batch) {
  constexpr int kSize = kVectorSize<P>;
  const float scale = batch.grad_scale ? *batch.grad_scale : 1.0f;
  if (!is_step(scale)) return;
  for (int chunk = blockIdx.x; chunk < batch.chunks; chunk += gridDim.x) {
    const Entry& entry = batch.entries[entry_of(batch, chunk)];
    const int64_t begin = (chunk - entry.first_chunk) * kChunk;
    const int64_t end = begin + kChunk < entry.numel ? begin + kChunk : entry.numel;
    const int64_t vectors_end = is_aligned(entry) ? end - end % kSize : begin;
    for (int64_t at = begin + threadIdx.x * kSize; at < vectors_end; at += kThreads * kSize) {
      update_run<P, G, kHasMaster, kSize>(batch, entry, scale, at);
    }
    for (int64_t at = vectors_end + threadIdx.x; at < end; at += kThreads) {
      update_run<P, G, kHasMaster, 1>(batch, entry, scale, at);
    }
  }
}

// Calls f(TypeTag<P>, TypeTag<G>, has_master) for the combinations that check_adamw allows.
template <typename F>
void dispatch(const AdamW& p, F&& f) {
  dispatch_dtype(p.dtype, [&](auto param) {
    dispatch_masters(p, [&](auto has_master) {
      using P = typename decltype(param)::type;
      if constexpr (!decltype(has_master)::value || !std::is_same_v<P, float>) {
        if (p.grad_dtype == DType::kFloat32) {
          f(param, TypeTag<float>{}, has_master);
        } else {
          f(param, param, has_master);
        }
      }
    });
  });
}

void launch_batch(const AdamW& p, const Batch& batch, Stream stream) {
  const LaunchSite site{"adamw", {batch.count, batch.chunks}};
  const dim3 grid(std::min<int64_t>(batch.chunks, kMaxGridBlocks));
  dispatch(p, [&](auto param, auto grad, auto has_master) {
    const auto kernel = adamw_kernel<typename decltype(param)::type, typename decltype(grad)::type,
                                     decltype(has_master)::value>;
    launch(site, kernel, grid, dim3(kThreads), 0, stream, batch);
  });
}

}  // namespace

void adamw_cuda(const AdamW& p, Stream stream) {
  check_adamw(p);
  Batch batch{};
  batch.grad_scale = p.grad_scale;
  batch.beta1 = p.beta1;
  batch.beta2 = p.beta2;
  for (int64_t first = 0; first < p.count; first += kMaxEntries) {
    batch.count = static_cast<int>(std::min<int64_t>(kMaxEntries, p.count - first));
    batch.chunks = 0;
    for (int i = 0; i < batch.count; ++i) {
      const AdamWTensor& t = p.tensors[first + i];
      batch.entries[i] = {t.param,  t.grad,  t.moment1,         t.moment2,
                          t.master, t.numel, adamw_rates(p, t), batch.chunks};
      batch.chunks += static_cast<int>(ceil_div(t.numel, kChunk));
    }
    if (batch.chunks > 0) launch_batch(p, batch, stream);
  }
}

}  // namespace pypkg
