// A small kernel of the instructions of sm_90a, right and wrong, that shows what their emulation
// notices.
#include <pybind11/pybind11.h>

#include <cmath>
#include <vector>

#include "attention/cuda/cuda_attention_tile.cuh"
#include "common/cuda_hopper_ptx.cuh"

namespace pypkg {
namespace {

constexpr int kRows = 64, kCols = 128, kInner = 64, kThreads = 128;

struct Storage {
  alignas(1024) __half a[kRows * kInner];
  alignas(1024) __half b[kCols * kInner];
  Mbarrier full;
};

enum class Fault {
  kNone,
  kNoWaitForCopies,
  kWrongParity,
  kTooManyBytes,
  kNoFence,
  kNoWaitForProducts,
  kMisplacedOperand,
  kThreadsMissing,
  kNoProxyFence,
};

// A small integer.
float element(int row, int column, int factor) { return (row * 64 + column) * factor % 13 - 6; }

// out [64, 128] = a [64, 64] b^T, b [128, 64]
__global__ void product_kernel(const __grid_constant__ TensorMap a,
                               const __grid_constant__ TensorMap b, float* out, Fault fault) {
  auto& shared = dynamic_shared<Storage>();
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int bytes = sizeof(shared.a) + sizeof(shared.b);
    mbarrier_arrive_expect(shared.full, bytes + (fault == Fault::kTooManyBytes ? 128 : 0));
    copy_tensor_box(shared.a, a, shared.full, 0, 0, 0, 0);
    copy_tensor_box(shared.b, b, shared.full, 0, 0, 0, 0);
  }
  if (fault != Fault::kNoWaitForCopies) {
    mbarrier_wait(shared.full, fault == Fault::kWrongParity ? 1 : 0);
  }
  named_barrier_sync(1, kThreads + (fault == Fault::kThreadsMissing ? kWarpSize : 0));
  float products[kCols / 8][4];
  if (fault != Fault::kNoFence) wgmma_fence();
  for (int k = 0; k < kInner; k += 16) {
    const __half* start = shared.a + k + (fault == Fault::kMisplacedOperand ? kInner : 0);
    wgmma_transposed<__half>(products, wgmma_descriptor(start, 0),
                             wgmma_descriptor(shared.b + k, 0), k > 0);
  }
  wgmma_commit();
  float early[kCols / 8][4];
  std::memcpy(early, products, sizeof(products));
  wgmma_wait<0>();
  wgmma_finished(products);
  const auto& results = fault == Fault::kNoWaitForProducts ? early : products;
  for (int n = 0; n < kCols / 8; ++n) {
    for (int c = 0; c < 4; ++c) {
      out[(warp_id() * 16 + row_in_tile(0, c)) * kCols + col_in_tile(n, c)] = results[n][c];
    }
  }
}

struct SumStorage {
  alignas(1024) __half a[kInner * kRows], b[kInner * kBoxRowBytes / sizeof(__half)];
};

// out [64, 64] += a^T b, a and b [64, 64], swizzled: written by the threads themselves, and
// summed in device memory.
__global__ void sum_of_transposed_kernel(float* out, Fault fault) {
  auto& shared = dynamic_shared<SumStorage>();
  const int row = warp_id() * 16 + lane_id() % 16;
  for (int i = 0; i < kInner / 16; ++i) {
    uint32_t a[4], b[4];
    for (int r = 0; r < 4; ++r) {
      const int k = warp_id() * 16 + lane_id() / 4 + r % 2 * 8, column = 16 * i + r / 2 * 8;
      const int left = column + 2 * (lane_id() % 4);
      a[r] = pack_pair<__half>(element(k, left, 7), element(k, left + 1, 7));
      b[r] = pack_pair<__half>(element(k, left, 5), element(k, left + 1, 5));
    }
    const int piece = (2 * i + lane_id() / 16) ^ (lane_id() & 7);
    store_matrices(shared.a + row * kRows + 8 * piece, a);
    store_matrices(shared.b + row * kRows + 8 * piece, b);
  }
  if (fault != Fault::kNoProxyFence) fence_proxy_async();
  named_barrier_sync(1, kThreads);
  float products[8][4];
  wgmma_fence();
  for (int k = 0; k < kInner; k += 16) {
    wgmma_left_transposed<__half>(products, wgmma_descriptor(shared.a + k * kRows, 0),
                                  wgmma_descriptor(shared.b + k * kRows, 0), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_finished(products);
  for (int n = 0; n < 8; ++n) add_to_memory(out + (n * kThreads + threadIdx.x) * 4, products[n]);
}

bool sum_of_transposed_is_right(Fault fault) {
  std::vector<uint4> storage(kRows * kRows / 4);
  auto* out = reinterpret_cast<float*>(storage.data());
  std::fill_n(out, kRows * kRows, 1.0f);
  launch(LaunchSite("hopper_faults", {kRows, kRows}), sum_of_transposed_kernel, dim3(1),
         dim3(kThreads), sizeof(SumStorage), nullptr, out, fault);
  for (int n = 0; n < 8; ++n) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int c = 0; c < 4; ++c) {
        const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4 + c / 2 * 8;
        const int column = 8 * n + thread % 4 * 2 + c % 2;
        float sum = 1;
        for (int k = 0; k < kInner; ++k) sum += element(k, row, 7) * element(k, column, 5);
        if (out[(n * kThreads + thread) * 4 + c] != sum) return false;
      }
    }
  }
  return true;
}

bool product_is_right(Fault fault) {
  constexpr int kRealInner = 40;  // the rest is outside the tensors
  std::vector<uint4> storage[2] = {std::vector<uint4>(kRows * kRealInner / 8),
                                   std::vector<uint4>(kCols * kRealInner / 8)};
  auto* a = reinterpret_cast<__half*>(storage[0].data());
  auto* b = reinterpret_cast<__half*>(storage[1].data());
  for (int i = 0; i < kRows * kRealInner; ++i) a[i] = __float2half_rn(i * 7 % 13 - 6);
  for (int i = 0; i < kCols * kRealInner; ++i) b[i] = __float2half_rn(i * 5 % 11 - 5);
  const auto map = [](const __half* tensor, uint32_t rows) {
    constexpr uint64_t kRowBytes = kRealInner * sizeof(__half);
    return make_tensor_map(DType::kFloat16, tensor, {kRealInner, rows, 1, 1},
                           {kRowBytes, kRowBytes * rows, kRowBytes * rows}, {kInner, rows, 1, 1});
  };
  std::vector<float> out(kRows * kCols, NAN);
  launch(LaunchSite("hopper_faults", {kRows, kCols}), product_kernel, dim3(1), dim3(kThreads),
         sizeof(Storage), nullptr, map(a, kRows), map(b, kCols), out.data(), fault);
  for (int i = 0; i < kRows * kCols; ++i) {
    float sum = 0;  // of small integers: exact
    for (int k = 0; k < kRealInner; ++k) {
      sum +=
          __half2float(a[i / kCols * kRealInner + k]) * __half2float(b[i % kCols * kRealInner + k]);
    }
    if (out[i] != sum) return false;
  }
  return true;
}

}  // namespace

void bind_hopper_faults(pybind11::module_& m) {
  pybind11::enum_<Fault>(m, "HopperFault")
      .value("none", Fault::kNone)
      .value("no_wait_for_copies", Fault::kNoWaitForCopies)
      .value("wrong_parity", Fault::kWrongParity)
      .value("too_many_bytes", Fault::kTooManyBytes)
      .value("no_fence", Fault::kNoFence)
      .value("no_wait_for_products", Fault::kNoWaitForProducts)
      .value("misplaced_operand", Fault::kMisplacedOperand)
      .value("threads_missing", Fault::kThreadsMissing)
      .value("no_proxy_fence", Fault::kNoProxyFence);
  m.def("hopper_product_is_right", &product_is_right);
  m.def("hopper_sum_of_transposed_is_right", &sum_of_transposed_is_right);
}

}  // namespace pypkg
