// Small matrix products in cache, for the CPU attention.
//
// A matrix of `rows` rows lives in panels of kLanes columns: element (r, c) is at
// (c / kLanes) * rows * kLanes + r * kLanes + c % kLanes. A panel is the right-hand operand of a
// product as it stands, and its elements can be broadcast as the left-hand operand by row or,
// transposed, by column, so one packing serves every product.
#pragma once

#include "cpu_simd.h"

namespace pypkg {

PYPKG_INLINE int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

PYPKG_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

PYPKG_INLINE void store(float* p, const Vec& v) { std::memcpy(p, &v, sizeof(v)); }

// acc[r] += sum_k a[r * kRowStride + k * kDepthStride] * b[k, :] for k < depth.
template <int kRows, int kRowStride, int kDepthStride>
PYPKG_INLINE void multiply_add(Vec (&acc)[kRows], const float* a, const float* b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    const Vec row = load(b + k * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] += a[r * kRowStride + k * kDepthStride] * row;
  }
}

// acc += A B, A being rows [first, first + kRows) of panels with `rows` rows and `depth` columns (a
// multiple of kLanes), B one panel of `depth` rows.
template <int kRows>
PYPKG_INLINE void multiply_rows(Vec (&acc)[kRows], const float* a, int64_t rows, int64_t first,
                                const float* b, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    multiply_add<kRows, kLanes, 1>(acc, a + k * rows + first * kLanes, b + k * kLanes, kLanes);
  }
}

// acc += A^T B, A being columns [first, first + kRows) of one panel, over its rows [begin, end).
template <int kRows>
PYPKG_INLINE void multiply_columns(Vec (&acc)[kRows], const float* a_panel, int64_t first,
                                   const float* b_panel, int64_t begin, int64_t end) {
  multiply_add<kRows, 1, kLanes>(acc, a_panel + begin * kLanes + first, b_panel + begin * kLanes,
                                 end - begin);
}

// Packs factor * source[0:count, 0:columns] into panels of `rows` rows; the rest is zero.
template <class T>
PYPKG_INLINE void pack(const T* source, int64_t stride, int64_t count, int64_t columns,
                       float factor, float* panels, int64_t rows) {
  for (int64_t c = 0; c < padded(columns); c += kLanes) {
    float* panel = panels + c * rows;
    const int64_t width = columns - c < kLanes ? columns - c : kLanes;
    for (int64_t r = 0; r < count; ++r) {
      const T* from = source + r * stride + c;
      float* to = panel + r * kLanes;
      if (width == kLanes) {
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) to[l] = factor * to_float(from[l]);
      } else {
        for (int64_t l = 0; l < kLanes; ++l) to[l] = l < width ? factor * to_float(from[l]) : 0.0f;
      }
    }
    std::memset(panel + count * kLanes, 0, (rows - count) * kLanes * sizeof(float));
  }
}

// Packs the transpose, factor * source[0:count, 0:columns]^T, into panels of padded(columns) rows
// that hold kLanes source rows each; the rest, up to `rows` source rows, is zero.
template <class T>
PYPKG_INLINE void pack_transposed(const T* source, int64_t stride, int64_t count, int64_t columns,
                                  float factor, float* panels, int64_t rows) {
  const int64_t depth = padded(columns);
  std::memset(panels, 0, rows * depth * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    float* panel = panels + (r - r % kLanes) * depth + r % kLanes;
    for (int64_t c = 0; c < columns; ++c)
      panel[c * kLanes] = factor * to_float(source[r * stride + c]);
  }
}

// target[0:count, 0:columns] = the rows of a panel matrix, each times its factor.
template <class T>
PYPKG_INLINE void unpack(const float* panels, int64_t rows, int64_t count, int64_t columns,
                         const float* factor, T* target, int64_t stride) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t width = columns - c < kLanes ? columns - c : kLanes;
    for (int64_t r = 0; r < count; ++r) {
      const float* from = panels + c * rows + r * kLanes;
      T* to = target + r * stride + c;
#pragma omp simd
      for (int64_t l = 0; l < width; ++l) to[l] = from_float<T>(from[l] * factor[r]);
    }
  }
}

}  // namespace pypkg
