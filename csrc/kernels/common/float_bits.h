// The bits of a float32 as an integer, and back, on host and device.
#pragma once

#include <cstring>

#include "common/common.h"

namespace pypkg {

PYPKG_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PYPKG_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace pypkg
