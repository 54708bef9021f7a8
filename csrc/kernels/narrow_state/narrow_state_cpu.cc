#include <algorithm>
#include <limits>
#include <vector>

#include "common/cpu_simd.h"
#include "narrow_state/narrow_state_values.h"

namespace pypkg {
namespace {

constexpr int64_t kChunk = 8192;  // elements that a thread takes at a time, at least
constexpr int kTile = 256;        // elements between two loops of a block

// The code of a quotient without a search: its sign, exponent and highest 7 bits of the mantissa
// name a bin, in which at most one middle lies.
class Bins {
 public:
  explicit Bins(const float* table) : lowest_code_(2 * kBins + 1) {
    for (int i = 0; i + 1 < kCodes; ++i) middles_[i] = middle_of(table[i], table[i + 1]);
    middles_[kCodes - 1] = std::numeric_limits<float>::infinity();
    int code = 0;
    for (int bin = 0; bin <= 2 * kBins; ++bin) {
      const int before = code;
      while (code < kCodes - 1 && middles_[code] < lowest_value(bin)) ++code;
      if (code > before + 1) {
        throw std::invalid_argument("quantize_blockwise: values of the table lie too close");
      }
      lowest_code_[bin] = static_cast<uint8_t>(code);
    }
  }

  PYPKG_INLINE static int32_t bin_of(float quotient) {
    const uint32_t magnitude = magnitude_of(quotient);
    const int32_t near = static_cast<int32_t>(magnitude >> kShift);
    const int32_t place = std::min(std::max(near, kLowest), kHighest) - kLowest;
    const int32_t is_negative = static_cast<int32_t>(bits_of(quotient)) >> 31;
    return magnitude >= kInfinityBits ? 2 * kBins : (place ^ is_negative) + kBins;
  }

  PYPKG_INLINE int code_in(int32_t bin, float quotient) const {
    const int code = lowest_code_[bin];
    return code + (middles_[code] < quotient);
  }

 private:
  static constexpr int kShift = 16;
  // Of magnitudes below 2^-23 and from 1 on.
  static constexpr int32_t kLowest = 0x34000000 >> kShift, kHighest = 0x3f800000 >> kShift;
  static constexpr int32_t kBins = kHighest - kLowest + 1;  // of a sign

  static float lowest_value(int bin) {
    if (bin >= kBins) {
      return bin == kBins ? 0.0f : float_of(uint32_t(bin - kBins + kLowest) << kShift);
    }
    if (bin == 0) return -std::numeric_limits<float>::infinity();
    return -float_of((uint32_t(kBins - bin + kLowest) << kShift) - 1);
  }

  std::vector<uint8_t>
      lowest_code_;  // by bin, ascending in value; the last is of what is not finite
  float middles_[kCodes];
};

PYPKG_INLINE void quantize_block(const BlockwiseState& p, const Bins& bins, int64_t block) {
  const int64_t begin = block * p.block_size, end = std::min(begin + p.block_size, p.numel);
  const float* const values = p.values;
  uint32_t magnitude = 0;
#pragma omp simd reduction(max : magnitude)
  for (int64_t i = begin; i < end; ++i) magnitude = std::max(magnitude, magnitude_of(values[i]));
  const float largest = float_of(magnitude), divisor = divisor_of(largest);
  p.largest[block] = largest;
  float quotients[kTile];
  int32_t found[kTile];
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - tile));
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      quotients[i] = values[tile + i] / divisor;
      found[i] = Bins::bin_of(quotients[i]);
    }
    for (int i = 0; i < count; ++i) {
      const int code = bins.code_in(found[i], quotients[i]);
      const int least = !p.is_signed && quotients[i] > 0.0f;
      p.codes[tile + i] = flipped(std::max(code, least), p.is_signed);
    }
  }
}

PYPKG_INLINE void dequantize_block(const BlockwiseState& p, int64_t block) {
  const int64_t begin = block * p.block_size, end = std::min(begin + p.block_size, p.numel);
  const float largest = p.largest[block];
  for (int64_t i = begin; i < end; ++i) {
    p.values[i] = p.table[flipped(p.codes[i], p.is_signed)] * largest;
  }
}

PYPKG_INLINE void round_chunk(const StochasticBFloat16& p, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    p.out[i] = stochastic_bfloat16(p.values[i], static_cast<uint32_t>(i), p.key);
  }
}

template <class Run>
void for_each_block(const BlockwiseState& p, const Run& run) {
  const int64_t blocks = (p.numel + p.block_size - 1) / p.block_size;
  const int64_t at_a_time = std::max<int64_t>(1, kChunk / p.block_size);
#pragma omp parallel for num_threads(threads_for(p.numel)) schedule(static, at_a_time)
  for (int64_t block = 0; block < blocks; ++block) run(block);
}

}  // namespace

void quantize_blockwise_cpu(const BlockwiseState& params) {
  const Bins bins(params.table);
  const auto run = cpu_version<quantize_block>();
  for_each_block(params, [&](int64_t block) { run(params, bins, block); });
}

void dequantize_blockwise_cpu(const BlockwiseState& params) {
  const auto run = cpu_version<dequantize_block>();
  for_each_block(params, [&](int64_t block) { run(params, block); });
}

void stochastic_bfloat16_cpu(const StochasticBFloat16& params) {
  const auto run = cpu_version<round_chunk>();
#pragma omp parallel for num_threads(threads_for(params.numel)) schedule(static)
  for (int64_t begin = 0; begin < params.numel; begin += kChunk) {
    run(params, begin, std::min(begin + kChunk, params.numel));
  }
}

}  // namespace pypkg
