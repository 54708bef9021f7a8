// The arithmetic of narrow_state, shared by host and device.
#pragma once

#include "common/float_bits.h"
#include "narrow_state/narrow_state.h"

namespace pypkg {

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

// Magnitudes are compared as integers, where NaN is above infinity.
PYPKG_HOST_DEVICE uint32_t magnitude_of(float x) { return bits_of(x) & kMagnitudeBits; }

// What the values of a block are divided by.
PYPKG_HOST_DEVICE float divisor_of(float largest) { return largest > 0.0f ? largest : 1.0f; }

// Turns the place in a table into the stored code, and back.
PYPKG_HOST_DEVICE uint8_t flipped(int code, bool is_signed) {
  return static_cast<uint8_t>(code ^ (is_signed ? 0x80 : 0));
}

// The value between two neighbours of a table above which the upper one is nearer.
PYPKG_HOST_DEVICE float middle_of(float low, float high) { return (low + high) / 2.0f; }

PYPKG_HOST_DEVICE uint16_t stochastic_bfloat16(float value, uint32_t index, uint32_t key) {
  uint32_t x = index * 0x9E3779B1u + key;
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  x ^= x >> 16;
  const uint32_t rounded = (bits_of(value) + (x & 0xffffu)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fffu);
}

}  // namespace pypkg
