// Small matrix products in cache, for the CPU attention.
//
// A matrix of `rows` rows is stored in panels of kWidth columns: element (r, c) is at
// (c / kWidth) * rows * kWidth + r * kWidth + c % kWidth. A panel can be the right-hand operand of
// a product. Its elements can also be broadcast as the left-hand operand, by row, or transposed by
// column. The same packing therefore serves every product.
#pragma once

#include <algorithm>

#include "common/cpu_simd.h"

namespace pypkg {

// The tile of a product that is summed in registers: kRows rows of kVectors vectors. A step of the
// sum loads kVectors vectors and broadcasts kRows elements, for kRows * kVectors multiplications.
template <int kLaneCount, int kVectorCount, int kRowCount>
struct TileShape {
  static constexpr int kLanes = kLaneCount;
  static constexpr int kVectors = kVectorCount;
  static constexpr int kRows = kRowCount;
  static constexpr int kWidth = kLanes * kVectors;
  // A typedef: in an alias declaration GCC drops an attribute that depends on a parameter.
  typedef float Vec __attribute__((vector_size(kLaneCount * sizeof(float))));
  typedef int32_t IntVec __attribute__((vector_size(kLaneCount * sizeof(float))));
  static_assert(sizeof(Vec) == kLanes * sizeof(float));
};

// The tiles that fit into the 32 registers of AVX-512, and into the 16 of AVX2 and SSE.
template <CpuIsa kIsa>
struct Tile;
template <>
struct Tile<CpuIsa::kV4> : TileShape<16, 2, 8> {};
template <>
struct Tile<CpuIsa::kV3> : TileShape<8, 2, 6> {};
template <>
struct Tile<CpuIsa::kBaseline> : TileShape<4, 2, 4> {};

template <class X>
PYPKG_INLINE int64_t padded(int64_t columns) {
  return (columns + X::kWidth - 1) / X::kWidth * X::kWidth;
}

template <class Vector, class Element>
PYPKG_INLINE Vector load(const Element* p) {
  static_assert(sizeof(Vector) % sizeof(Element) == 0);
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class Vector>
PYPKG_INLINE void store(float* p, const Vector& v) {
  std::memcpy(p, &v, sizeof(v));
}

// The sums of a tile. Its rows are kWidth apart in a panel, and have any stride in another matrix.
// GCC keeps `at` in registers only if every index is a constant, so each loop over it is unrolled.
template <class X>
struct Sums {
  typename X::Vec at[X::kRows][X::kVectors] = {};

  PYPKG_INLINE void fill(float value) {
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < X::kVectors; ++v) at[r][v] = typename X::Vec{} + value;
  }
  PYPKG_INLINE void load_from(const float* panel) {
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < X::kVectors; ++v)
        at[r][v] = load<typename X::Vec>(panel + r * X::kWidth + v * X::kLanes);
  }
  PYPKG_INLINE void store_to(float* matrix, int64_t stride = X::kWidth) const {
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < X::kVectors; ++v) store(matrix + r * stride + v * X::kLanes, at[r][v]);
  }
};

// sums[r] += sum_k a[r * kRowStride + k * kDepthStride] * b[k, :] for k < depth. kAsksNext: asks
// for the kRows rows of the panel below these, which the next tile takes from the second-level
// cache.
template <class X, int64_t kRowStride, int64_t kDepthStride, bool kAsksNext = false>
PYPKG_INLINE void multiply_add(Sums<X>& sums, const float* a, const float* b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (kAsksNext) __builtin_prefetch(a + X::kRows * (X::kWidth + k));
    typename X::Vec right[X::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < X::kVectors; ++v)
      right[v] = load<typename X::Vec>(b + k * X::kWidth + v * X::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < X::kRows; ++r) {
      const float left = a[r * kRowStride + k * kDepthStride];
#pragma GCC unroll 4
      for (int v = 0; v < X::kVectors; ++v) sums.at[r][v] += left * right[v];
    }
  }
}

// sums += A B, A being rows from `first` on of panels with `rows` rows and `depth` columns, B one
// panel of `depth` rows.
template <class X>
PYPKG_INLINE void multiply_rows(Sums<X>& sums, const float* a, int64_t rows, int64_t first,
                                const float* b, int64_t depth) {
  for (int64_t k = 0; k < depth; k += X::kWidth) {
    const int64_t count = depth - k < X::kWidth ? depth - k : X::kWidth;
    multiply_add<X, X::kWidth, 1, true>(sums, a + k * rows + first * X::kWidth, b + k * X::kWidth,
                                        count);
  }
}

// sums += A^T B, A being columns from `first` on of a matrix of kStride columns, over its rows
// [begin, end), B one panel.
template <class X, int64_t kStride>
PYPKG_INLINE void multiply_columns(Sums<X>& sums, const float* a, int64_t first,
                                   const float* b_panel, int64_t begin, int64_t end) {
  multiply_add<X, 1, kStride>(sums, a + begin * kStride + first, b_panel + begin * X::kWidth,
                              end - begin);
}

// Rows of a head are on different pages, across which processors do not prefetch. Each row is
// therefore prefetched kRowsAhead rows in advance.
constexpr int64_t kRowsAhead = 8;

template <bool kToWrite, class T>
PYPKG_INLINE void prefetch_row(const T* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + c, kToWrite);
}

// Packs factor * source[0:count, 0:columns] into panels of `rows` rows; the rest is zero.
template <class X, class T>
PYPKG_INLINE void pack(const T* source, int64_t stride, int64_t count, int64_t columns,
                       float factor, float* panels, int64_t rows) {
  for (int64_t r = 0; r < count; ++r) {
    if (r + kRowsAhead < count) prefetch_row<false>(source + (r + kRowsAhead) * stride, columns);
    for (int64_t c = 0; c < columns; c += X::kWidth) {
      const T* from = source + r * stride + c;
      float* to = panels + c * rows + r * X::kWidth;
      const int64_t width = columns - c < X::kWidth ? columns - c : X::kWidth;
      if (width == X::kWidth) {
#pragma omp simd
        for (int64_t l = 0; l < X::kWidth; ++l) to[l] = factor * to_float(from[l]);
      } else {
        for (int64_t l = 0; l < X::kWidth; ++l)
          to[l] = l < width ? factor * to_float(from[l]) : 0.0f;
      }
    }
  }
  for (int64_t c = 0; c < columns; c += X::kWidth) {
    std::memset(panels + c * rows + count * X::kWidth, 0,
                (rows - count) * X::kWidth * sizeof(float));
  }
}

// Transposes a 4 x 4 block. `to` has rows of kStride floats.
template <int64_t kStride, class T>
PYPKG_INLINE void transpose_four(const T* from, int64_t stride, float factor, float* to) {
  typedef float Quad __attribute__((vector_size(4 * sizeof(float))));
  Quad row[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const T* at = from + r * stride;
    row[r] = factor * Quad{to_float(at[0]), to_float(at[1]), to_float(at[2]), to_float(at[3])};
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c)
    store(to + c * kStride, Quad{row[0][c], row[1][c], row[2][c], row[3][c]});
}

// Packs the transpose, factor * source[0:count, 0:columns]^T, into panels of padded(columns) rows
// that hold kWidth source rows each; the rest, up to `rows` source rows, is zero. columns is a
// multiple of four.
template <class X, class T>
PYPKG_INLINE void pack_transposed(const T* source, int64_t stride, int64_t count, int64_t columns,
                                  float factor, float* panels, int64_t rows) {
  static_assert(X::kWidth % 4 == 0);
  const int64_t depth = padded<X>(columns);
  if (count < rows || columns < depth) std::memset(panels, 0, rows * depth * sizeof(float));
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    for (int64_t ahead = r + kRowsAhead; ahead < std::min(r + kRowsAhead + 4, count); ++ahead)
      prefetch_row<false>(source + ahead * stride, columns);
    float* to = panels + (r - r % X::kWidth) * depth + r % X::kWidth;
    for (int64_t c = 0; c < columns; c += 4)
      transpose_four<X::kWidth>(source + r * stride + c, stride, factor, to + c * X::kWidth);
  }
  for (; r < count; ++r) {
    float* to = panels + (r - r % X::kWidth) * depth + r % X::kWidth;
    for (int64_t c = 0; c < columns; ++c)
      to[c * X::kWidth] = factor * to_float(source[r * stride + c]);
  }
}

// target[0:count, 0:columns] = the rows of a panel matrix, each times its factor.
template <class X, class T>
PYPKG_INLINE void unpack(const float* panels, int64_t rows, int64_t count, int64_t columns,
                         const float* factor, T* target, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    if (r + kRowsAhead < count) prefetch_row<true>(target + (r + kRowsAhead) * stride, columns);
    for (int64_t c = 0; c < columns; c += X::kWidth) {
      const int64_t width = columns - c < X::kWidth ? columns - c : X::kWidth;
      const float* from = panels + c * rows + r * X::kWidth;
      T* to = target + r * stride + c;
#pragma omp simd
      for (int64_t l = 0; l < width; ++l) to[l] = from_float<T>(from[l] * factor[r]);
    }
  }
}

}  // namespace pypkg
