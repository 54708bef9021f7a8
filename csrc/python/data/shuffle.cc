#include "data/shuffle.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "array_checks.h"
#include "data/mt19937.h"

namespace py = pybind11;

namespace pypkg {
namespace {

// The partners of a Fisher-Yates shuffle: for i = largest, largest - 1, ... a number from 0 to i.
// They are drawn as in NumPy's random_interval: as many bits of the generator as i has, until the
// number is at most i.
class Partners {
 public:
  Partners(Mt19937* random, int64_t largest) : random_(random), i_(largest) {}

  // The next `count` of them; i must not go below 1.
  void draw(int64_t count, int64_t* out) {
    int64_t drawn = 0;
    for (; drawn < count && i_ > kLargest32; --i_) out[drawn++] = draw64();
    while (drawn < count) drawn += draw_some(count - drawn, out + drawn);
  }

 private:
  static constexpr int64_t kLargest32 = 0xffffffff;

  int64_t draw64() {
    const uint64_t mask = ~uint64_t{0} >> __builtin_clzll(static_cast<uint64_t>(i_));
    while (true) {
      const uint64_t high = random_->next();
      const uint64_t value = (high << 32 | random_->next()) & mask;
      if (value <= static_cast<uint64_t>(i_)) return static_cast<int64_t>(value);
    }
  }

  // Draws at most `count` partners: as many as the block of the generator has, and as have the same
  // number of bits as i_. A rejected output is overwritten by the next one, because a branch would
  // be mispredicted one time in four.
  int64_t draw_some(int64_t count, int64_t* out) {
    uint32_t largest = static_cast<uint32_t>(i_);
    const uint32_t mask = ~uint32_t{0} >> __builtin_clz(largest);
    const int64_t of_these_bits = i_ - (mask >> 1);
    const uint32_t* outputs = random_->begin();
    const int64_t steps = std::min({count, of_these_bits, random_->end() - outputs});
    int64_t drawn = 0;
    for (int64_t k = 0; k < steps; ++k) {
      const uint32_t value = outputs[k] & mask;
      const bool accepted = value <= largest;
      out[drawn] = value;
      drawn += accepted;
      largest -= accepted;
    }
    random_->take(steps);
    i_ -= drawn;
    return drawn;
  }

  Mt19937* random_;
  int64_t i_;
};

// Most of the time is spent waiting for items[partner], a random access. Partners are drawn a block
// in advance, so that the items can be prefetched.
template <typename Item>
void shuffle(Item* items, int64_t count, Mt19937* random) {
  constexpr int64_t kBlock = 2048, kAhead = 64;
  int64_t partners[kBlock + kAhead] = {};  // prefetches of entries not drawn yet are harmless
  Partners source(random, count - 1);
  int64_t last = count - 1;
  int64_t to_draw = count - 1;
  int64_t waiting = 0;  // drawn and not swapped yet
  while (last > 0) {
    const int64_t fresh = std::min(to_draw, kBlock - waiting);
    source.draw(fresh, partners + waiting);
    to_draw -= fresh;
    waiting += fresh;
    const int64_t swaps = to_draw > 0 ? waiting - kAhead : waiting;
    for (int64_t k = 0; k < swaps; ++k, --last) {
      __builtin_prefetch(items + partners[k + kAhead], 1, 3);
      std::swap(items[last], items[partners[k]]);
    }
    waiting -= swaps;
    std::copy_n(partners + swaps, waiting, partners);
  }
}

using Key = py::array_t<uint32_t, py::array::c_style>;

Mt19937 generator(Key& key, int position) {
  check(key.ndim() == 1 && key.size() == Mt19937::kWords, "key must be [624]");
  check(position >= 0 && position <= Mt19937::kWords, "position must be 0 to 624");
  return Mt19937(key.mutable_data(), position);
}

int shuffle_array(py::array& array, Key& key, int position) {
  check(array.ndim() == 1 && (array.flags() & py::array::c_style), "array must be contiguous, [n]");
  check(array.itemsize() == 4 || array.itemsize() == 8, "array must have items of 4 or 8 bytes");
  Mt19937 random = generator(key, position);
  void* items = array.mutable_data();
  const bool small = array.itemsize() == 4;
  const int64_t count = array.size();
  py::gil_scoped_release release;
  small ? shuffle(static_cast<uint32_t*>(items), count, &random)
        : shuffle(static_cast<uint64_t*>(items), count, &random);
  return random.position();
}

py::tuple shuffle_partners(int64_t largest, int64_t count, Key& key, int position) {
  check(count >= 0 && count <= largest, "count must be 0 to largest");
  Mt19937 random = generator(key, position);
  py::array_t<int64_t> partners(count);
  Partners(&random, largest).draw(count, partners.mutable_data());
  return py::make_tuple(partners, random.position());
}

}  // namespace

void bind_shuffle(py::module_& module) {
  module.def(
      "shuffle", &shuffle_array, py::arg("array").noconvert(), py::arg("key").noconvert(),
      py::arg("position"),
      R"doc(Shuffles as numpy.random.RandomState.shuffle does from the same state, bit for bit.

Args:
    array: [n] of items of 4 or 8 bytes, shuffled in place.
    key: uint32 [624], the state's key, which moves on.
    position: the state's.

Returns:
    The position afterwards.)doc");
  module.def("shuffle_partners", &shuffle_partners, py::arg("largest"), py::arg("count"),
             py::arg("key").noconvert(), py::arg("position"),
             R"doc(What a shuffle of largest + 1 items swaps with: its first draws, not applied.

Args:
    largest: number of the last item, which is swapped first.
    count: how many draws.
    key, position: as for shuffle.

Returns:
    int64 [count], of which draw k is 0 to largest - k, and the position afterwards.)doc");
}

}  // namespace pypkg
