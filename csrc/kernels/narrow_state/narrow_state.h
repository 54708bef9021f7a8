// Optimizer state in fewer bits: 8-bit blocks with a factor each, and bfloat16 rounded at random.
//
// In 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022) an element is
//
//   table[code] * largest[block],   block = index / block_size
//
// A block's factor is its largest magnitude, and the code of an element the number of middles
// between neighbours of the table that lie below its quotient: the nearest value, the lower of two
// that are as near. The quotient is exactly rounded, so every device, instruction set and number of
// threads gives the same bits. A NaN makes the factor NaN; what is then not finite has code 255.
#pragma once

#include "common/common.h"

namespace pypkg {

constexpr int kCodes = 256;

struct BlockwiseState {
  uint8_t* codes = nullptr;  // [numel]; signed ones are 128 below the place in the table
  float* largest = nullptr;  // [ceil(numel / block_size)]
  float* values = nullptr;   // [numel]
  const float* table =
      nullptr;  // [kCodes], ascending, in host memory; read before the call returns
  int64_t numel = 0;
  int64_t block_size = 0;
  bool is_signed = false;  // if not, positive values never get the code 0
};

// Overwrites values. It reads codes and largest.
void dequantize_blockwise_cpu(const BlockwiseState& params);
void dequantize_blockwise_cuda(const BlockwiseState& params, Stream stream);
// Overwrites codes and largest. It reads values. Throws std::invalid_argument for a table with two
// middles that differ by less than a 2^-7th.
void quantize_blockwise_cpu(const BlockwiseState& params);
void quantize_blockwise_cuda(const BlockwiseState& params, Stream stream);

// Rounds float32 up or down to bfloat16, at random, so that the expected value is unchanged. The
// random bits of element i are the finalizer of MurmurHash3 (Appleby, 2011) of i * 0x9E3779B1 +
// key.
struct StochasticBFloat16 {
  const float* values = nullptr;  // [numel]; NaN gives the NaN 0x7fff
  uint16_t* out = nullptr;        // [numel]; overwritten
  int64_t numel = 0;
  uint32_t key = 0;
};

void stochastic_bfloat16_cpu(const StochasticBFloat16& params);
void stochastic_bfloat16_cuda(const StochasticBFloat16& params, Stream stream);

}  // namespace pypkg
