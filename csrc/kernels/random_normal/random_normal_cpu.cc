// This file is compiled with -ffp-contract=off (CMakeLists.txt), see random_normal_values.h.
#include <algorithm>

#include "common/cpu_simd.h"
#include "random_normal/random_normal_values.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 256 * kBlockElements;  // elements that a thread takes at a time

struct Float16 {
  uint16_t bits;
};

template <class T>
PYPKG_INLINE T rounded(float x) {
  return from_float<T>(x);
}
// Rounded to nearest even, branch-free. Below 2^-14 results are multiples of 2^-24, and so is a sum
// with 0.5.
template <>
PYPKG_INLINE Float16 rounded<Float16>(float x) {
  const uint32_t sign = bits_of(x) & 0x80000000u, magnitude = bits_of(x) ^ sign;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t usual = ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = magnitude < 0x38800000u ? small : usual;    // 2^-14
  const uint32_t half = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // 65520
  return {static_cast<uint16_t>((sign >> 16) | half)};
}

// Vectors of 64-bit lanes, of which Philox uses the lower halves.
template <int kLaneCount>
struct Lanes {
  static constexpr int kLanes = kLaneCount;
  typedef uint64_t Vec __attribute__((vector_size(kLaneCount * sizeof(uint64_t))));
};
template <CpuIsa kIsa>
struct VectorOf;
template <>
struct VectorOf<CpuIsa::kV4> : Lanes<8> {};
template <>
struct VectorOf<CpuIsa::kV3> : Lanes<4> {};
template <>
struct VectorOf<CpuIsa::kBaseline> : Lanes<2> {};

// The products of the lower halves of lanes. GCC would multiply all 64 bits, which takes three
// times as long, and intrinsics cannot be called from a template for several instruction sets.
template <class Vec>
PYPKG_INLINE Vec low_products(const Vec& a, const Vec& b) {
#if PYPKG_CPU_VERSIONS
  Vec result = a;
  if constexpr (sizeof(Vec) == 16) {
    asm("pmuludq %1, %0" : "+x"(result) : "x"(b));
  } else {
    asm("vpmuludq %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
  }
  return result;
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The words of the counters of a block, [kWords][kCountersOfBlock]. Even and odd counters are in
// separate vectors until their words are interleaved.
template <class X>
PYPKG_INLINE void philox_block(uint64_t block, uint64_t stream, uint64_t key, uint32_t* words) {
  using Vec = typename X::Vec;
  constexpr uint64_t kLow = 0xffffffffu;
  const Vec multiplier0 = Vec{} + kPhiloxMultiplier0, multiplier1 = Vec{} + kPhiloxMultiplier1;
#pragma GCC unroll 4
  for (int at = 0; at < kCountersOfBlock; at += 2 * X::kLanes) {
    Vec parity[2][kWords];
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      Vec counter;
#pragma GCC unroll 8
      for (int lane = 0; lane < X::kLanes; ++lane) counter[lane] = at + 2 * lane + odd;
      counter += block * kCountersOfBlock;
      Vec c0 = counter, c1 = counter >> 32, c2 = Vec{} + stream, c3 = Vec{} + (stream >> 32);
      uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
      for (int round = 0; round < kPhiloxRounds; ++round) {
        const Vec product0 = low_products(c0, multiplier0);
        const Vec product1 = low_products(c2, multiplier1);
        c0 = (product1 >> 32) ^ c1 ^ k0;
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ k1;
        c3 = product0;
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
      }
      parity[odd][0] = c0;
      parity[odd][1] = c1;
      parity[odd][2] = c2;
      parity[odd][3] = c3;
    }
#pragma GCC unroll 4
    for (int word = 0; word < kWords; ++word) {
      const Vec both = (parity[0][word] & kLow) | (parity[1][word] << 32);
      std::memcpy(words + word * kCountersOfBlock + at, &both, sizeof(both));
    }
  }
}

// Elements [begin, end) of a row.
template <CpuIsa kIsa, class T>
PYPKG_INLINE void fill(const RandomNormal& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t first = p.first + row * p.index_stride;
  T* const out = static_cast<T*>(p.out) + row * p.out_stride;
  const float deviation = p.deviation;
  alignas(64) uint32_t words[kBlockElements];
  alignas(64) float values[kBlockElements];
  const int64_t last_block = (first + end - 1) / kBlockElements;
  for (int64_t block = (first + begin) / kBlockElements; block <= last_block; ++block) {
    philox_block<VectorOf<kIsa>>(block, p.stream, p.key, words);
#pragma GCC unroll 2
    for (int half = 0; half < kBlockElements; half += kBlockElements / 2) {
#pragma omp simd
      for (int i = half; i < half + kCountersOfBlock; ++i) {
        const NormalPair pair = normal_pair(words[i], words[i + kCountersOfBlock]);
        values[i] = pair.first * deviation;
        values[i + kCountersOfBlock] = pair.second * deviation;
      }
    }
    const int64_t at = block * kBlockElements - first;  // of the row
    if (at >= begin && at + kBlockElements <= end) {
#pragma omp simd
      for (int i = 0; i < kBlockElements; ++i) out[at + i] = rounded<T>(values[i]);
    } else {
      const int64_t low = std::max<int64_t>(begin - at, 0);
      const int64_t high = std::min<int64_t>(end - at, kBlockElements);
      for (int64_t i = low; i < high; ++i) out[at + i] = rounded<T>(values[i]);
    }
  }
}

template <class T>
void run(const RandomNormal& p) {
  const auto fill_part =
      dispatch_cpu_isa([](auto isa) { return &CpuVersion<isa(), fill<isa(), T>>::run; });
  const int64_t chunks = (p.cols + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(num_threads()) schedule(static)
  for (int64_t task = 0; task < p.rows * chunks; ++task) {
    const int64_t begin = task % chunks * kChunk;
    fill_part(p, task / chunks, begin, std::min(begin + kChunk, p.cols));
  }
}

}  // namespace

void random_normal_cpu(const RandomNormal& params) {
  const RandomNormal p = with_long_rows(params);
  switch (p.dtype) {
    case DType::kFloat32: return run<float>(p);
    case DType::kFloat16: return run<Float16>(p);
    case DType::kBFloat16: return run<BFloat16>(p);
  }
}

}  // namespace pypkg
