#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <csetjmp>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace cuda_emulation {

ThreadContext* current_thread = nullptr;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedBytesOfHopper = 227 * 1024;  // for what uses an extension
constexpr int kMaxResident = 3;                      // blocks that run at a time

// Memory that ends at an inaccessible page, so that an access past the end is a crash.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : bytes_((bytes + 15) / 16 * 16) {
    const size_t page = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes_ + page - 1) / page * page + page;
    base_ = static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(base_ + mapped_ - page, page, PROT_NONE) != 0) throw std::bad_alloc();
    begin_ = base_ + mapped_ - page - bytes_;
  }
  ~GuardedMemory() { munmap(base_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* begin() { return begin_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, mapped_;
  unsigned char *base_, *begin_;
};

struct AsyncCopy {
  void* target;
  const void* source;
  int bytes, valid_bytes;
};

struct Fiber {
  ThreadContext context;
  int index = 0;
  bool done = false;
  std::vector<std::vector<AsyncCopy>> groups;  // the last one is not committed yet
  std::jmp_buf state;
  ucontext_t start;
  bool started = false;
};

struct Warp {
  std::vector<int> runnable;  // fiber indices
  const char* kind = nullptr;
  int arrived = 0;
  int turn = 0;
  alignas(16) unsigned char slots[2][kLanes][kSlotBytes];
};

class Block {
 public:
  Block(const std::string& what, const std::function<void()>& body) : what_(what), body_(body) {}

  // A slot is that of one running block; step returns whether the block goes on.
  void start(int slot, dim3 grid, dim3 block, dim3 index, size_t shared_bytes,
             std::mt19937& random);
  bool step(std::mt19937& random);
  void let_other_blocks_run();
  bool is_stalled() const { return is_stalled_; }
  void barrier();
  unsigned char (*collective(const char* kind, const void* mine, size_t bytes,
                             Finish finish))[kSlotBytes];
  void wait_on(const void* channel);
  void notify(const void* channel);
  void defer(std::function<void()> event) { deferred_.push_back(std::move(event)); }
  std::any& extension() { return extension_; }
  Fiber& fiber() { return *fibers_[running_]; }
  void* shared() { return shared_->begin(); }
  const std::string& what() const { return what_; }

 private:
  static void enter();
  void resume(int index);
  void suspend();
  int pick(std::mt19937& random);
  bool run_deferred(std::mt19937& random);

  const std::string what_;
  const std::function<void()>& body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::unique_ptr<GuardedMemory> shared_;
  std::map<const void*, std::vector<int>> waiting_;  // fiber indices
  std::vector<std::function<void()>> deferred_;
  std::any extension_;
  std::jmp_buf scheduler_;
  std::exception_ptr error_;
  int running_ = -1;
  int at_barrier_ = 0;
  int done_ = 0;
  int warp_ = -1;          // that runs now
  unsigned patience_ = 0;  // a warp is left after one in so many fibers, and when it must wait
  unsigned lateness_ = 0;  // of deferred events: one before so many fibers
  size_t slot_ = 0, shared_bytes_ = 0;
  bool is_stalled_ = false;  // the last step ended in a wait for another block
};

Block* current_block = nullptr;
size_t shared_limit = 163 * 1024;

unsigned char* fiber_stack(int index) {
  static std::vector<std::unique_ptr<GuardedMemory>> stacks(kMaxResident * kMaxThreads);
  if (!stacks[index]) stacks[index] = std::make_unique<GuardedMemory>(kStackBytes);
  return stacks[index]->begin();
}

void Block::enter() {
  Block& block = *current_block;
  Fiber& self = block.fiber();
  try {
    block.body_();
    if (self.groups.size() > 1 || !self.groups.back().empty()) {
      copy_async_wait(0);  // copies left in flight land some time after
    }
  } catch (...) {
    block.error_ = std::current_exception();
  }
  self.done = true;
  ++block.done_;
  std::longjmp(block.scheduler_, 1);
}

// setjmp and longjmp switch fibers without the system call that swapcontext makes.
void Block::resume(int index) {
  running_ = index;
  Fiber& next = *fibers_[index];
  current_thread = &next.context;
  if (_setjmp(scheduler_) != 0) return;
  if (next.started) std::longjmp(next.state, 1);
  next.started = true;
  getcontext(&next.start);
  next.start.uc_stack.ss_sp = fiber_stack(slot_ * kMaxThreads + index);
  next.start.uc_stack.ss_size = kStackBytes;
  next.start.uc_link = nullptr;
  makecontext(&next.start, &Block::enter, 0);
  setcontext(&next.start);
}

void Block::suspend() {
  if (_setjmp(fiber().state) == 0) std::longjmp(scheduler_, 1);
}

int Block::pick(std::mt19937& random) {
  std::vector<int> candidates;
  for (size_t w = 0; w < warps_.size(); ++w) {
    if (!warps_[w].runnable.empty()) candidates.push_back(w);
  }
  if (candidates.empty()) return -1;
  if (warp_ < 0 || warps_[warp_].runnable.empty() || random() % patience_ == 0) {
    warp_ = candidates[random() % candidates.size()];
  }
  std::vector<int>& lanes = warps_[warp_].runnable;
  std::swap(lanes[random() % lanes.size()], lanes.back());
  const int index = lanes.back();
  lanes.pop_back();
  return index;
}

void Block::start(int slot, dim3 grid, dim3 block, dim3 index, size_t shared_bytes,
                  std::mt19937& random) {
  const int threads = block.x * block.y * block.z;
  slot_ = slot;
  shared_bytes_ = shared_bytes;
  shared_ = std::make_unique<GuardedMemory>(shared_bytes);
  std::memset(shared_->begin(), 0xff, shared_->bytes());
  // Warps abreast, in bursts, or one far ahead of the others.
  constexpr unsigned kPatience[] = {1, 50, 1u << 31};
  patience_ = kPatience[random() % 3];
  // Events happen soon, some time later, or when nothing else can.
  constexpr unsigned kLateness[] = {8, 500, 1u << 31};
  lateness_ = kLateness[random() % 3];
  warps_.resize((threads + kLanes - 1) / kLanes);
  for (int i = 0; i < threads; ++i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->index = i;
    fiber->groups.resize(1);
    fiber->context = {dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y)), index,
                      block, grid};
    fibers_.push_back(std::move(fiber));
    warps_[i / kLanes].runnable.push_back(i);
  }
}

bool Block::step(std::mt19937& random) {
  current_block = this;
  is_stalled_ = false;
  if (random() % lateness_ == 0) run_deferred(random);
  const int next = pick(random);
  if (next >= 0) {
    resume(next);
    if (error_) std::rethrow_exception(error_);
  } else if (!run_deferred(random)) {
    throw std::runtime_error("deadlock in " + what_ + ": " + std::to_string(at_barrier_) +
                             " threads wait at __syncthreads, " + std::to_string(done_) +
                             " have returned");
  }
  if (done_ < static_cast<int>(fibers_.size())) return true;
  if (!deferred_.empty()) throw std::runtime_error(what_ + " ends with copies under way");
  if (shared_bytes_ > shared_limit && !extension_.has_value()) {
    throw std::runtime_error(what_ + ": more shared memory than a block may have");
  }
  return false;
}

void Block::let_other_blocks_run() {
  is_stalled_ = true, warp_ = -1;
  warps_[running_ / kLanes].runnable.push_back(running_);
  suspend();
}

void Block::wait_on(const void* channel) {
  waiting_[channel].push_back(running_);
  suspend();
}

void Block::notify(const void* channel) {
  for (int index : waiting_[channel]) warps_[index / kLanes].runnable.push_back(index);
  waiting_.erase(channel);
}

bool Block::run_deferred(std::mt19937& random) {
  if (deferred_.empty()) return false;
  std::swap(deferred_[random() % deferred_.size()], deferred_.back());
  const std::function<void()> event = std::move(deferred_.back());
  deferred_.pop_back();
  event();
  return true;
}

void Block::barrier() {
  if (++at_barrier_ < static_cast<int>(fibers_.size())) {
    suspend();
    return;
  }
  at_barrier_ = 0;
  for (int i = 0; i < static_cast<int>(fibers_.size()); ++i) {
    if (i != running_) warps_[i / kLanes].runnable.push_back(i);
  }
  warps_[running_ / kLanes].runnable.push_back(running_);
  suspend();
}

unsigned char (*Block::collective(const char* kind, const void* mine, size_t bytes, Finish finish))
    [kSlotBytes] {
      Warp& warp = warps_[running_ / kLanes];
      unsigned char (*slots)[kSlotBytes] = warp.slots[warp.turn];
      if (warp.arrived == 0) warp.kind = kind;
      if (std::strcmp(warp.kind, kind) != 0) {
        fail(std::string("lanes of one warp are at ") + warp.kind + " and at " + kind);
      }
      if (bytes > 0) std::memcpy(slots[running_ % kLanes], mine, bytes);
      if (++warp.arrived < kLanes) {
        suspend();
        return slots;
      }
      if (finish) finish(slots);
      warp.arrived = 0;
      warp.turn ^= 1;
      const int first = running_ / kLanes * kLanes;
      for (int i = first; i < first + kLanes; ++i) warp.runnable.push_back(i);
      suspend();
      return slots;
    }

std::mt19937& generator() {
  static std::mt19937 random(0);
  return random;
}

std::vector<std::string> launched;

}  // namespace

std::vector<std::string> take_launches() { return std::exchange(launched, {}); }

void seed(uint32_t value) { generator().seed(value); }

// Runs a block for each index, a few of them at a time, each for some steps before the next.
static void run_blocks(const std::vector<dim3>& order,
                       const std::function<std::unique_ptr<Block>(int slot, dim3 index)>& start) {
  constexpr unsigned kSteps[] = {5, 100, 3000};  // of a block before another one's, at most
  std::mt19937& random = generator();
  std::unique_ptr<Block> resident[kMaxResident];
  const int slots = 1 + random() % kMaxResident;
  const unsigned most_steps = kSteps[random() % 3];
  size_t begun = 0, ended = 0, stalls = 0;
  while (ended < order.size()) {
    const int slot = random() % slots;
    if (!resident[slot]) {
      if (begun == order.size()) continue;
      resident[slot] = start(slot, order[begun++]);
    }
    for (unsigned steps = 1 + random() % most_steps; steps > 0; --steps) {
      if (!resident[slot]->step(random)) {
        resident[slot].reset(), ++ended;
        break;
      }
      stalls = resident[slot]->is_stalled() ? stalls + 1 : 0;
      if (stalls == 10000) fail("waits for another block in vain");
      if (stalls > 0) break;
    }
  }
}

void launch_blocks(const std::string& what, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& thread_body) {
  launched.push_back(what);
  const int threads = block.x * block.y * block.z;
  if (threads <= 0 || threads > kMaxThreads) {
    throw std::runtime_error(what + ": blocks of " + std::to_string(threads) + " threads");
  }
  if (shared_bytes > kSharedBytesOfHopper) {
    throw std::runtime_error(what + ": more shared memory than compute capability 9.0 has");
  }
  if (grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error(what + ": invalid grid");
  }
  std::vector<dim3> order;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) order.emplace_back(x, y, z);
    }
  }
  std::shuffle(order.begin(), order.end(), generator());
  run_blocks(order, [&](int slot, dim3 index) {
    auto started = std::make_unique<Block>(what, thread_body);
    started->start(slot, grid, block, index, shared_bytes, generator());
    return started;
  });
}

void block_barrier() { current_block->barrier(); }
void* shared_memory() { return current_block->shared(); }
int thread_index() { return current_block->fiber().index; }
void wait_on(const void* channel) { current_block->wait_on(channel); }
void notify(const void* channel) { current_block->notify(channel); }
void defer(std::function<void()> event) { current_block->defer(std::move(event)); }
std::any& block_extension() { return current_block->extension(); }
void let_other_blocks_run() { current_block->let_other_blocks_run(); }
void set_shared_memory_limit(size_t bytes) { shared_limit = bytes; }
size_t shared_memory_limit() { return shared_limit; }
int lane_index() { return current_block->fiber().index % kLanes; }

void fail(const std::string& message) {
  throw std::runtime_error(current_block->what() + ": " + message);
}

void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned access");
}

unsigned char (*warp_collective(const char* kind, const void* mine, size_t bytes, Finish finish))
    [kSlotBytes] { return current_block->collective(kind, mine, bytes, finish); }

void copy_async(void* target, const void* source, int bytes, int valid_bytes) {
  check_aligned(target, bytes);
  check_aligned(source, bytes);
  std::memset(target, 0xff, bytes);
  current_block->fiber().groups.back().push_back({target, source, bytes, valid_bytes});
}

void copy_async_commit() { current_block->fiber().groups.emplace_back(); }

void copy_async_wait(int groups_in_flight) {
  auto& groups = current_block->fiber().groups;
  while (static_cast<int>(groups.size()) - 1 > groups_in_flight) {
    for (const AsyncCopy& copy : groups.front()) {
      std::memset(copy.target, 0, copy.bytes);
      std::memcpy(copy.target, copy.source, copy.valid_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_emulation
