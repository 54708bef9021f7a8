// The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), a block of outputs at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cpu_isa.h"

namespace pypkg {

// Produces the same outputs as NumPy's MT19937 for the same key and position.
class Mt19937 {
 public:
  static constexpr int kWords = 624;

  // key: kWords words, owned by the caller and updated with every block. position: number of
  // outputs of the current block that were taken before, 0 to kWords.
  Mt19937(uint32_t* key, int position)
      : key_(key),
        position_(position),
        twist_(cpu_version<twist>()),
        temper_(cpu_version<temper>()) {
    temper_(key_, block_);
  }

  int position() const { return position_; }

  // The next outputs, from begin() to end(): at least one.
  const uint32_t* begin() {
    if (position_ == kWords) {
      twist_(key_);
      temper_(key_, block_);
      position_ = 0;
    }
    return block_ + position_;
  }
  const uint32_t* end() const { return block_ + kWords; }

  // Consumes the first `count` outputs from begin() on.
  void take(int64_t count) { position_ += static_cast<int>(count); }

  uint32_t next() {
    const uint32_t value = *begin();
    take(1);
    return value;
  }

 private:
  static constexpr int kShift = 397;

  static PYPKG_INLINE uint32_t twisted(uint32_t upper, uint32_t lower, uint32_t other) {
    const uint32_t mixed = (upper & 0x80000000u) | (lower & 0x7fffffffu);
    return other ^ (mixed >> 1) ^ ((0u - (lower & 1u)) & 0x9908b0dfu);
  }

  // Three loops, none of which reads a value that it has written, so that they vectorise.
  static PYPKG_INLINE void twist(uint32_t* key) {
    constexpr int kAfter = kWords - kShift;
    for (int i = 0; i < kAfter; ++i) key[i] = twisted(key[i], key[i + 1], key[i + kShift]);
    for (int i = kAfter; i < 2 * kAfter; ++i) {
      key[i] = twisted(key[i], key[i + 1], key[i - kAfter]);
    }
    for (int i = 2 * kAfter; i < kWords - 1; ++i) {
      key[i] = twisted(key[i], key[i + 1], key[i - kAfter]);
    }
    key[kWords - 1] = twisted(key[kWords - 1], key[0], key[kShift - 1]);
  }

  static PYPKG_INLINE void temper(const uint32_t* key, uint32_t* out) {
    for (int i = 0; i < kWords; ++i) {
      uint32_t y = key[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      out[i] = y ^ (y >> 18);
    }
  }

  uint32_t* key_;
  int position_;
  void (*twist_)(uint32_t*);
  void (*temper_)(const uint32_t*, uint32_t*);
  uint32_t block_[kWords];
};

}  // namespace pypkg
