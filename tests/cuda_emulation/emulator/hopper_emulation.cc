#include <limits>
#include <map>
#include <vector>

#include "cuda_hopper_emulation.h"

namespace cuda_emulation {
namespace {

struct MbarrierState {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void complete_if_due(const void* channel) {
    if (pending != 0 || bytes != 0) return;
    pending = count;
    ++phase;
    notify(channel);
  }
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  unsigned generation = 0;
};

struct PendingProduct {
  WgmmaOperation operation;
  std::vector<float> initial;  // of d; empty where an operation before it wrote d
};

struct WgmmaThread {
  int thread = 0;
  bool fenced = false;
  std::vector<std::vector<PendingProduct>> groups{1};  // the last one is not committed yet
  size_t finishing = 0;
};

// Stores to shared memory that no fence.proxy.async of their thread has followed.
struct UnfencedStores {
  std::map<uint32_t, int> threads;  // by offset of 16 bytes

  void add(uint32_t offset, int thread) { threads[offset / 16] = thread; }
  void fence(int thread) {
    for (auto store = threads.begin(); store != threads.end();) {
      store = store->second == thread ? threads.erase(store) : std::next(store);
    }
  }
  bool has(uint32_t offset) const { return threads.count(offset / 16) > 0; }
};

struct HopperBlock {
  UnfencedStores unfenced;
  std::map<const void*, MbarrierState> mbarriers;
  NamedBarrier named[16];
  std::map<int, WgmmaThread> wgmma;  // by thread
};

HopperBlock& block() {
  std::any& state = block_extension();
  if (!state.has_value()) state = HopperBlock();
  return *std::any_cast<HopperBlock>(&state);
}

MbarrierState& known(void* barrier) {
  auto found = block().mbarriers.find(barrier);
  if (found == block().mbarriers.end()) fail("an mbarrier is used that was not initialised");
  return found->second;
}

unsigned char* shared_at(uint32_t offset) {
  return static_cast<unsigned char*>(shared_memory()) + offset;
}

// A 128-byte swizzle permutes the 16-byte pieces of every 128 bytes, by the three address bits
// above: the pattern repeats after 1024 bytes.
uint32_t swizzle_128(uint32_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

// The matrix that a descriptor describes, 16-bit elements: `inner` is the index of neighbours in
// memory and `outer` the other.
class SharedMatrix {
 public:
  explicit SharedMatrix(uint64_t descriptor)
      : start_((descriptor & 0x3fff) << 4),
        leading_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("a wgmma descriptor without 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0 || (start_ >> 7 & 7) != 0) {
      fail("an operand of wgmma that does not start with the swizzle's pattern");
    }
  }

  // Rows of 128 bytes in groups of eight, `stride` bytes from group to group. Beyond 64 neighbours
  // `leading` bytes further, for transposed operands; others stay within their 128 bytes.
  uint16_t at(int inner, int outer, bool transposed) const {
    const uint32_t in_row = start_ % 128 + 2 * (inner % 64);
    if (in_row >= 128 || (inner >= 64 && !transposed)) fail("wgmma reads past a row of 128 bytes");
    const uint32_t linear =
        start_ / 128 * 128 + inner / 64 * leading_ + outer / 8 * stride_ + outer % 8 * 128 + in_row;
    const uint32_t offset = swizzle_128(linear);
    if (block().unfenced.has(offset)) fail("wgmma reads a store without fence.proxy.async");
    uint16_t bits;
    std::memcpy(&bits, shared_at(offset), sizeof(bits));
    return bits;
  }

 private:
  const uint32_t start_, leading_, stride_;
};

// Element c of a lane: rows lane / 4 and eight further, pairs of columns.
int row_of(int lane, int c) { return lane / 4 + c / 2 * 8; }
int column_of(int lane, int c) { return lane % 4 * 2 + c % 2; }

// One warp's 16 rows of a product.
void multiply(const WgmmaOperation* (&lanes)[kLanes], int warp_in_group) {
  const WgmmaOperation& any = *lanes[0];
  std::vector<float> a(16 * 16), b(16 * any.columns);
  for (int lane = 0; lane < kLanes && any.a_registers; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) {
        const uint16_t bits = lanes[lane]->a_registers[r] >> 16 * i;
        a[(lane / 4 + r % 2 * 8) * 16 + lane % 4 * 2 + r / 2 * 8 + i] = any.to_float(bits);
      }
    }
  }
  if (!any.a_registers) {
    const SharedMatrix matrix(any.a);
    for (int i = 0; i < 16 * 16; ++i) {
      const int row = 16 * warp_in_group + i / 16, column = i % 16;
      a[i] = any.to_float(any.a_transposed ? matrix.at(row, column, true)
                                           : matrix.at(column, row, false));
    }
  }
  const SharedMatrix matrix(any.b);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < any.columns; ++n) {
      const bool transposed = any.b_transposed;
      b[k * any.columns + n] =
          any.to_float(transposed ? matrix.at(n, k, true) : matrix.at(k, n, false));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < any.columns / 2; ++i) {
      const int row = row_of(lane, i % 4), column = i / 4 * 8 + column_of(lane, i % 4);
      float sum = any.accumulate ? lanes[lane]->d[i] : 0;
      for (int k = 0; k < 16; ++k) sum += a[row * 16 + k] * b[k * any.columns + column];
      lanes[lane]->d[i] = sum;
    }
  }
}

bool same(const WgmmaOperation& x, const WgmmaOperation& y) {
  return x.a == y.a && x.b == y.b && x.columns == y.columns && x.accumulate == y.accumulate &&
         x.a_transposed == y.a_transposed && x.b_transposed == y.b_transposed &&
         !x.a_registers == !y.a_registers;
}

// Computes what the lanes of a warp wait for.
void finish_wgmma(unsigned char (*slots)[kSlotBytes]) {
  WgmmaThread* threads[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) std::memcpy(&threads[lane], slots[lane], sizeof(void*));
  const WgmmaThread& first = *threads[0];
  for (size_t g = 0; g < first.finishing; ++g) {
    for (size_t i = 0; i < first.groups[g].size(); ++i) {
      const WgmmaOperation* lanes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        WgmmaThread& thread = *threads[lane];
        if (thread.finishing != first.finishing || thread.groups[g].size() <= i ||
            !same(thread.groups[g][i].operation, first.groups[g][i].operation)) {
          fail("lanes of one warp start different wgmma");
        }
        const PendingProduct& product = thread.groups[g][i];
        lanes[lane] = &product.operation;
        std::copy(product.initial.begin(), product.initial.end(), product.operation.d);
      }
      multiply(lanes, first.thread / kLanes % 4);
    }
  }
  for (WgmmaThread* thread : threads) {
    thread->groups.erase(thread->groups.begin(), thread->groups.begin() + thread->finishing);
  }
}

WgmmaThread& wgmma_thread() {
  WgmmaThread& thread = block().wgmma[thread_index()];
  thread.thread = thread_index();
  return thread;
}

}  // namespace

uint32_t shared_offset(const void* pointer) {
  const auto* base = static_cast<const unsigned char*>(shared_memory());
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - base);
}

void mbarrier_init(void* barrier, int count) {
  check_aligned(barrier, 8);
  MbarrierState state;
  state.count = state.pending = count;
  block().mbarriers[barrier] = state;
}

void mbarrier_arrive(void* barrier, int bytes_announced) {
  MbarrierState& state = known(barrier);
  state.bytes += bytes_announced;
  if (--state.pending < 0) fail("more arrivals at an mbarrier than its phase expects");
  state.complete_if_due(barrier);
}

void mbarrier_wait(void* barrier, uint32_t parity) {
  MbarrierState& state = known(barrier);
  while ((state.phase & 1) == parity) wait_on(barrier);
}

void named_barrier(int id, int threads, bool wait) {
  if (id < 1 || id > 15 || threads % kLanes != 0) fail("invalid named barrier");
  NamedBarrier& barrier = block().named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fail("a named barrier with two numbers of threads");
  }
  barrier.threads = threads;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    notify(&barrier);
  }
  while (wait && barrier.generation == generation) wait_on(&barrier);
}

namespace {

struct MatrixRows {
  unsigned char* row;
  uint32_t matrices[4];
};

// Lane l holds, of each matrix, elements 2 (l % 4) and + 1 of row l / 4.
void store_rows(unsigned char (*slots)[kSlotBytes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int m = 0; m < 4; ++m) {
      const auto& to = *reinterpret_cast<const MatrixRows*>(slots[8 * m + lane / 4]);
      const auto& from = *reinterpret_cast<const MatrixRows*>(slots[lane]);
      std::memcpy(to.row + lane % 4 * 4, &from.matrices[m], 4);
    }
  }
}

}  // namespace

void store_matrices(void* row, const uint32_t (&matrices)[4]) {
  check_aligned(row, 16);
  MatrixRows mine{static_cast<unsigned char*>(row), {}};
  std::memcpy(mine.matrices, matrices, sizeof(matrices));
  warp_collective("stmatrix", &mine, sizeof(mine), store_rows);
  block().unfenced.add(shared_offset(row), thread_index());
}

void fence_proxy_async() { block().unfenced.fence(thread_index()); }

void start_wgmma(const WgmmaOperation& operation) {
  WgmmaThread& thread = wgmma_thread();
  if (!thread.fenced) fail("wgmma.mma_async without wgmma.fence");
  bool written_before = false;
  for (const auto& group : thread.groups) {
    for (const PendingProduct& product : group) {
      written_before = written_before || product.operation.d == operation.d;
    }
  }
  PendingProduct product{operation, {}};
  const int count = operation.columns / 2;
  if (operation.accumulate && !written_before) {
    product.initial.assign(operation.d, operation.d + count);
  }
  thread.groups.back().push_back(std::move(product));
  std::fill_n(operation.d, count, std::numeric_limits<float>::quiet_NaN());
}

void fence_wgmma() { wgmma_thread().fenced = true; }

void commit_wgmma() { wgmma_thread().groups.emplace_back(); }

void wait_wgmma(int groups_in_flight) {
  WgmmaThread& thread = wgmma_thread();
  const int committed = static_cast<int>(thread.groups.size()) - 1;
  thread.finishing = std::max(0, committed - groups_in_flight);
  thread.fenced = false;
  WgmmaThread* self = &thread;
  warp_collective("wgmma.wait_group", &self, sizeof(self), finish_wgmma);
}

}  // namespace cuda_emulation

namespace pypkg {

TensorMap make_tensor_map(DType, const void* tensor, const uint64_t (&dims)[4],
                          const uint64_t (&strides)[3], const uint32_t (&box)[4]) {
  const auto require = [](bool condition, const char* what) {
    if (!condition) throw std::runtime_error(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  TensorMap map{static_cast<const unsigned char*>(tensor), {}, {2}, {}};
  require(reinterpret_cast<uintptr_t>(tensor) % 16 == 0 && tensor, "address");
  for (int i = 0; i < 4; ++i) {
    require(dims[i] > 0 && dims[i] <= (uint64_t{1} << 32), "dimension");
    require(box[i] > 0 && box[i] <= 256, "box");
    map.dims[i] = dims[i];
    map.box[i] = box[i];
    if (i == 3) break;
    require(strides[i] % 16 == 0 && strides[i] < (uint64_t{1} << 40), "stride");
    map.strides[i + 1] = strides[i];
  }
  require(box[0] * 2 <= 128, "a box wider than the swizzle");
  return map;
}

void copy_tensor_box(void* target, const TensorMap& map, Mbarrier& barrier, int c0, int c1, int c2,
                     int c3) {
  const uint32_t offset = shared_address(target);
  if (offset % 128 != 0 || map.box[0] != 64) cuda_emulation::fail("misaligned tensor copy");
  const int rows = map.box[1] * map.box[2] * map.box[3], bytes = 128 * rows;
  std::memset(target, 0xff, bytes);
  cuda_emulation::defer([=, map = map, &barrier] {
    const int64_t first[4] = {c0, c1, c2, c3};
    for (int row = 0; row < rows; ++row) {
      const int64_t in_box[4] = {0, row % map.box[1], row / map.box[1] % map.box[2],
                                 row / map.box[1] / map.box[2]};
      for (int i = 0; i < 64; ++i) {
        uint16_t bits = 0;
        bool inside = true;
        const unsigned char* source = map.tensor;
        for (int d = 0; d < 4; ++d) {
          const int64_t at = first[d] + (d == 0 ? i : in_box[d]);
          inside = inside && at >= 0 && at < static_cast<int64_t>(map.dims[d]);
          source += at * static_cast<int64_t>(map.strides[d]);
        }
        if (inside) std::memcpy(&bits, source, sizeof(bits));
        const uint32_t to = cuda_emulation::swizzle_128(offset + 128 * row + 2 * i);
        std::memcpy(cuda_emulation::shared_at(to), &bits, sizeof(bits));
      }
    }
    auto& state = cuda_emulation::known(&barrier);
    state.bytes -= bytes;
    state.complete_if_due(&barrier);
  });
}

}  // namespace pypkg
