// Blocks and micro-kernel as in Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008). Packing rounds to bfloat16 and interleaves two consecutive depths,
// because vdpbf16ps multiplies pairs and adds both products.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "common/cpu_isa.h"
#include "matmul/matmul.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PYPKG_MATMUL_BFLOAT16 1
#include <immintrin.h>
#endif

namespace pypkg {

#if PYPKG_MATMUL_BFLOAT16
#define PYPKG_BFLOAT16_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"), always_inline)) inline

namespace {

constexpr int64_t kUnit = 16;     // rows or columns packed at a time: the lanes of a vector
constexpr int64_t kRows = 8;      // of the micro-kernel
constexpr int64_t kColumns = 48;  // of the micro-kernel: three vectors
// Depth of a block. Each block of depths needs a pass over c, so the depth is chosen larger than a
// panel of b (48 KiB) in the L1 cache allows; b streams from the L2 cache, 8 bytes per cycle.
constexpr int64_t kDepth = 512;
constexpr int64_t kBlockRows = 128;               // of a: 128 KiB in the L2 cache
constexpr int64_t kBlockColumns = 32 * kColumns;  // of b: 1.5 MiB in the L3 cache
static_assert(kUnit == 2 * kRows && kColumns % kUnit == 0 && kDepth % (2 * kUnit) == 0);

using Pair = uint32_t;  // bfloat16 at depths 2 p (low half) and 2 p + 1

struct Free {
  void operator()(Pair* memory) const { std::free(memory); }
};
using Pairs = std::unique_ptr<Pair[], Free>;

Pairs allocate(int64_t count) {
  void* memory = std::aligned_alloc(64, static_cast<size_t>((count * sizeof(Pair) + 63) / 64 * 64));
  if (!memory) throw std::bad_alloc();
  return Pairs(static_cast<Pair*>(memory));
}

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

PYPKG_BFLOAT16_TARGET __mmask16 lanes(int64_t count) {
  return count >= kUnit ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Rows of a 16 x 16 matrix of 32-bit elements become its columns.
PYPKG_BFLOAT16_TARGET void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Stores one packed vector: the pairs of 16 rows of a, or of 16 columns of b, at one pair of
// depths. kWidth is the width of a panel, so a vector covers two panels of a, or a third of a panel
// of b.
template <int64_t kWidth>
PYPKG_BFLOAT16_TARGET void put(Pair* panels, int64_t pair, int64_t pairs, int64_t unit, __m512i v) {
  if constexpr (kWidth == kRows) {
    Pair* first = panels + unit * 2 * kRows * pairs + pair * kRows;
    _mm256_store_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(v));
    _mm256_store_si256(reinterpret_cast<__m256i*>(first + kRows * pairs),
                       _mm512_extracti64x4_epi64(v, 1));
  } else {
    constexpr int64_t kUnits = kWidth / kUnit;
    Pair* panel = panels + unit / kUnits * kWidth * pairs;
    _mm512_store_si512(panel + pair * kWidth + unit % kUnits * kUnit, v);
  }
}

// Packs one unit, of which `count` rows (columns of b) exist, to `depth` depths; the rest is zero.
// Element (width w, depth d) is at source[w * width_stride + d * depth_stride].
template <int64_t kWidth>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) void pack_unit(
    const float* source, int64_t width_stride, int64_t depth_stride, int64_t count, int64_t depth,
    Pair* panels, int64_t pairs, int64_t unit) {
  if (depth_stride == 1) {
    for (int64_t d = 0; d < 2 * pairs; d += 2 * kUnit) {
      const __mmask16 low = lanes(depth - d), high = lanes(depth - d - kUnit);
      __m512i rows[16];
#pragma GCC unroll 16
      for (int w = 0; w < kUnit; ++w) {
        const float* from = source + w * width_stride + d;
        const __m512 first = w < count ? _mm512_maskz_loadu_ps(low, from) : _mm512_setzero_ps();
        const __m512 second =
            w < count ? _mm512_maskz_loadu_ps(high, from + kUnit) : _mm512_setzero_ps();
        rows[w] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      }
      transpose(rows);
      const int64_t left = std::min<int64_t>(kUnit, pairs - d / 2);
      for (int64_t p = 0; p < left; ++p) put<kWidth>(panels, d / 2 + p, pairs, unit, rows[p]);
    }
    return;
  }
  const __mmask16 mask = lanes(count);
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i interleave = _mm512_load_si512(kInterleave);
  for (int64_t p = 0; p < pairs; ++p) {
    const float* from = source + 2 * p * depth_stride;
    const __m512 first = 2 * p < depth ? _mm512_maskz_loadu_ps(mask, from) : _mm512_setzero_ps();
    const __m512 second =
        2 * p + 1 < depth ? _mm512_maskz_loadu_ps(mask, from + depth_stride) : _mm512_setzero_ps();
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    put<kWidth>(panels, p, pairs, unit, _mm512_permutexvar_epi16(interleave, both));
  }
}

// c[0:rows, 0:columns] (+)= a panel of a times a panel of b.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) void multiply(
    const Pair* a, const Pair* b, int64_t pairs, float* c, int64_t stride, int64_t rows,
    int64_t columns, bool add) {
  constexpr int kVectors = kColumns / kUnit;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      right[v] = (__m512bh)_mm512_load_si512(b + p * kColumns + v * kUnit);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[p * kRows + r]));
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = lanes(columns - v * kUnit);
      float* to = c + r * stride + v * kUnit;
      __m512 sum = sums[r][v];
      if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, to));
      _mm512_mask_storeu_ps(to, mask, sum);
    }
  }
}

// Packs b[k0:, n0:] to `columns` x `depth`, in panels of kColumns; the threads of a team share it.
void pack_b(const MatmulBFloat16& p, int64_t k0, int64_t depth, int64_t n0, int64_t columns,
            Pair* panels, int64_t pairs) {
  const int64_t units = round_up(columns, kColumns) / kUnit;
#pragma omp for
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t column = n0 + unit * kUnit;
    pack_unit<kColumns>(p.b.data + k0 * p.b.row_stride + column * p.b.column_stride,
                        p.b.column_stride, p.b.row_stride, n0 + columns - column, depth, panels,
                        pairs, unit);
  }
}

void pack_a(const MatmulBFloat16& p, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
            Pair* panels, int64_t pairs) {
  for (int64_t unit = 0; unit * kUnit < rows; ++unit) {
    const int64_t row = m0 + unit * kUnit;
    pack_unit<kRows>(p.a.data + row * p.a.row_stride + k0 * p.a.column_stride, p.a.row_stride,
                     p.a.column_stride, m0 + rows - row, depth, panels, pairs, unit);
  }
}

// The block of c at rows m0 and columns n0 from a packed block of b.
void multiply_block(const MatmulBFloat16& p, int64_t m0, int64_t n0, int64_t columns, const Pair* a,
                    const Pair* b, int64_t pairs, bool add) {
  const int64_t rows = std::min(kBlockRows, p.m - m0);
  for (int64_t j = 0; j < columns; j += kColumns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      multiply(a + i * pairs, b + j * pairs, pairs, p.c + (m0 + i) * p.n + n0 + j, p.n, rows - i,
               columns - j, add);
    }
  }
}

}  // namespace

bool matmul_bfloat16_supported() {
  return cpu_isa() == CpuIsa::kV4 && __builtin_cpu_supports("avx512bf16");
}

void matmul_bfloat16_cpu(const MatmulBFloat16& p) {
  if (!matmul_bfloat16_supported()) {
    throw std::runtime_error("matmul_bfloat16: this processor has no AVX512_BF16");
  }
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) {
    std::fill(p.c, p.c + p.m * p.n, 0.0f);
    return;
  }
  const int64_t most_pairs = std::min(kDepth, round_up(p.k, 2)) / 2;
  const Pairs b = allocate(most_pairs * round_up(std::min(p.n, kBlockColumns), kColumns));
#pragma omp parallel num_threads(num_threads())
  {
    const Pairs a = allocate(most_pairs * kBlockRows);
    for (int64_t n0 = 0; n0 < p.n; n0 += kBlockColumns) {
      const int64_t columns = std::min(kBlockColumns, p.n - n0);
      for (int64_t k0 = 0; k0 < p.k; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, p.k - k0), pairs = (depth + 1) / 2;
        pack_b(p, k0, depth, n0, columns, b.get(), pairs);
#pragma omp for schedule(dynamic)
        for (int64_t m0 = 0; m0 < p.m; m0 += kBlockRows) {
          pack_a(p, m0, std::min(kBlockRows, p.m - m0), k0, depth, a.get(), pairs);
          multiply_block(p, m0, n0, columns, a.get(), b.get(), pairs, k0 > 0);
        }
      }
    }
  }
}

#else

bool matmul_bfloat16_supported() { return false; }

void matmul_bfloat16_cpu(const MatmulBFloat16&) {
  throw std::runtime_error("matmul_bfloat16: not compiled for this processor or compiler");
}

#endif

}  // namespace pypkg
