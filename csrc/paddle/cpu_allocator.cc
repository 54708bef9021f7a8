// Memory of Paddle's CPU tensors. With PADDLE_WITH_CUDA the headers would need those of cuBLAS and
// more; as in tensor_memory.cc, nothing used here depends on the macro.
#undef PADDLE_WITH_CUDA

#include <cstdint>
#include <cstdlib>
#include <string>

#include "paddle/phi/backends/context_pool.h"
#include "paddle/phi/core/memory/allocation/allocator.h"

// Declared in paddle/phi/core/memory/stats.h, which needs a header of glog that no wheel has.
namespace paddle::memory {
void HostMemoryStatUpdate(const std::string& stat_type, int dev_id, int64_t increment);
}

namespace pypkg {
namespace {

namespace allocation = paddle::memory::allocation;

// Takes tensors from malloc, and counts them in Paddle's statistics of host memory as Paddle does.
//
// Paddle's own allocator calls posix_memalign with an alignment of 4096 bytes. glibc then searches
// a free block that is 4096 bytes larger than the tensor. So the hole that a freed tensor leaves is
// often too small for the next tensor of its size, and the heap grows.
class MallocAllocator : public allocation::Allocator {
 public:
  bool IsAllocThreadSafe() const override { return true; }

 protected:
  phi::Allocation* AllocateImpl(size_t size) override {
    void* block = size > SIZE_MAX - kAlignment ? nullptr : std::malloc(size + kAlignment - 1);
    if (block == nullptr) {
      PADDLE_THROW_BAD_ALLOC(common::errors::ResourceExhausted(
          "a CPU tensor of %llu bytes does not fit into the memory of this process.", size));
    }
    const auto address = reinterpret_cast<uintptr_t>(block);
    const uintptr_t begin = (address + kAlignment - 1) / kAlignment * kAlignment;
    count(static_cast<int64_t>(size));
    return new allocation::Allocation(reinterpret_cast<void*>(begin), block, size, phi::CPUPlace());
  }

  void FreeImpl(phi::Allocation* freed) override {
    count(-static_cast<int64_t>(freed->size()));
    std::free(static_cast<allocation::Allocation*>(freed)->base_ptr());
    delete freed;
  }

 private:
  static void count(int64_t bytes) {
    static const std::string allocated = "Allocated";
    paddle::memory::HostMemoryStatUpdate(allocated, 0, bytes);
  }

  static constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
};

}  // namespace
}  // namespace pypkg

// Makes Paddle's operators take the memory of CPU tensors from malloc. Tensors that exist keep
// theirs.
extern "C" void pypkg_use_malloc() {
  // Never destroyed: tensors may be freed after the destructors of this library ran.
  static auto* const allocator = new pypkg::MallocAllocator;
  phi::DeviceContextPool::Instance().Get(phi::CPUPlace())->SetAllocator(allocator);
}
