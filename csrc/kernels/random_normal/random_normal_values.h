// The arithmetic of random_normal, shared by host and device.
//
// All devices and instruction sets give the same bits: it uses only correctly rounded operations of
// IEEE 754, in a fixed order, and no fused multiply-add. Host sources are compiled with
// -ffp-contract=off; the device uses intrinsics that are not contracted.
#pragma once

#include <cmath>

#include "common/float_bits.h"
#include "random_normal/random_normal.h"

namespace pypkg {

// Element i is of counter i / 64 * 16 + i % 16 and made from its words (w0, w1) if i % 64 < 32,
// else from (w2, w3): neighbouring lanes of a vector have neighbouring counters and elements.
constexpr int kCountersOfBlock = 16;
constexpr int kWords = 4;
constexpr int kBlockElements = kCountersOfBlock * kWords;

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

PYPKG_HOST_DEVICE float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

PYPKG_HOST_DEVICE float sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// sqrt(-2 ln u), u = (word / 2 + 0.5) / 2^31 in [2^-32, 1], rounded to 24 bits. With |f| small and
// u = 2^n (1 + f), -2 ln(1 + f) = f (f (1 + f P(f)) - 2); P is a minimax fit, relative error of the
// whole 3e-8.
PYPKG_HOST_DEVICE float normal_radius(uint32_t word) {
  constexpr float kMinusTwoLn2 = -1.38629436f;
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const float scaled = sum(static_cast<float>(static_cast<int32_t>(word >> 1)), 0.5f);
  const int32_t n = static_cast<int32_t>(bits_of(scaled) - kSqrtHalf) >> 23;
  const float f = sum(float_of(bits_of(scaled) - (static_cast<uint32_t>(n) << 23)), -1.0f);
  float p = sum(product(f, -0.17400879f), 0.28534982f);
  p = sum(product(f, p), -0.29829538f);
  p = sum(product(f, p), 0.33155167f);
  p = sum(product(f, p), -0.39926127f);
  p = sum(product(f, p), 0.50002676f);
  p = sum(product(f, p), -0.66667819f);
  p = sum(product(f, sum(product(f, p), 1.0f)), -2.0f);
  const float whole = product(static_cast<float>(n - 31), kMinusTwoLn2);
  return sqrtf(sum(whole, product(f, p)));
}

struct NormalPair {
  float first;
  float second;
};

// Two independent normal numbers. The angle has 30 bits between -pi / 4 and pi / 4; two more bits
// change the sign of its cosine and swap it with the sine, which gives the whole circle. Minimax
// fits, errors 3e-9 and 3e-8.
PYPKG_HOST_DEVICE NormalPair normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const float radius = normal_radius(radius_word);
  const float t = product(static_cast<float>(static_cast<int32_t>(angle_word << 2)), 0x1p-31f);
  const float square = product(t, t);
  float s = sum(product(square, -3.5954508e-5f), 2.4900071e-3f);
  s = sum(product(square, s), -8.0745436e-2f);
  s = product(t, sum(product(square, s), 0.785398185f));
  float c = sum(product(square, -3.1888051e-4f), 1.5849914e-2f);
  c = sum(product(square, c), -0.30842426f);
  c = sum(product(square, c), 1.0f);
  c = float_of(bits_of(c) ^ (angle_word & 0x80000000u));
  const bool swapped = angle_word & 0x40000000u;
  return {product(radius, swapped ? s : c), product(radius, swapped ? c : s)};
}

// The four words of a counter. The upper half of the 128 bits that Philox counts is the stream.
PYPKG_HOST_DEVICE void philox(uint64_t counter, uint64_t stream, uint64_t key,
                              uint32_t (&words)[kWords]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * c0;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Merges rows that are consecutive in memory and in the stream into one row.
inline RandomNormal with_long_rows(RandomNormal p) {
  if (p.rows > 1 && p.out_stride == p.cols && p.index_stride == p.cols) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  return p;
}

}  // namespace pypkg
