// Four rows of b are streamed at a time. The processor prefetches within each of them, but not
// beyond the end of a page, so the next four rows are prefetched explicitly.
#include <algorithm>
#include <cstring>

#include "common/cpu_panels.h"
#include "matmul/few_rows.h"

namespace pypkg {
namespace {

constexpr int kStreams = 4;             // rows of b at a time
constexpr int64_t kTile = 4096;         // elements of c, 16 KiB, that stay in the L1 cache
constexpr int64_t kLeastColumns = 256;  // of a tile
constexpr int64_t kLine = 16;           // elements of a cache line

// Rows of a at a time: as many as fit into the registers together with kStreams rows of b.
template <CpuIsa kIsa>
constexpr int kRowsAtOnce = kIsa == CpuIsa::kV4 ? 4 : 2;

// c[0:kRows, 0:columns] += a[0:kRows, 0:kDepth] b[0:kDepth, 0:columns]; b and c have rows of n.
template <class X, int kRows, int kDepth>
PYPKG_INLINE void add_product(const float* a, const float* b, float* c, const MatmulFewRows& p,
                              int64_t columns) {
  typename X::Vec left[kRows][kDepth];  // read once: c may lie anywhere
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int d = 0; d < kDepth; ++d) left[r][d] = typename X::Vec{} + a[r * p.k + d];
  int64_t j = 0;
  for (; j + X::kLanes <= columns; j += X::kLanes) {
    typename X::Vec sums[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r] = load<typename X::Vec>(c + r * p.n + j);
#pragma GCC unroll 4
    for (int d = 0; d < kDepth; ++d) {
      __builtin_prefetch(b + (kDepth + d) * p.n + j);
      const auto right = load<typename X::Vec>(b + d * p.n + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r] += left[r][d] * right;
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) store(c + r * p.n + j, sums[r]);
  }
  for (; j < columns; ++j)
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kDepth; ++d) c[r * p.n + j] += a[r * p.k + d] * b[d * p.n + j];
}

// c[0:kRows, 0:kColumns] = a[0:kRows] b[0:kColumns]^T; a and b have rows of k, c of n.
template <class X, int kRows, int kColumns>
PYPKG_INLINE void set_dots(const float* a, const float* b, float* c, const MatmulFewRows& p) {
  typename X::Vec sums[kRows][kColumns] = {};
  int64_t d = 0;
  for (; d + X::kLanes <= p.k; d += X::kLanes) {
    typename X::Vec left[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) left[r] = load<typename X::Vec>(a + r * p.k + d);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      __builtin_prefetch(b + (kColumns + j) * p.k + d);
      const auto right = load<typename X::Vec>(b + j * p.k + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][j] += left[r] * right;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      float total = 0.0f;
      for (int l = 0; l < X::kLanes; ++l) total += sums[r][j][l];
      for (int64_t e = d; e < p.k; ++e) total += a[r * p.k + e] * b[j * p.k + e];
      c[r * p.n + j] = total;
    }
}

// Calls function(rows, r) for the rows of a, from r on: kRowsAtOnce while as many are left.
template <CpuIsa kIsa, class Function>
PYPKG_INLINE void for_rows(int64_t m, const Function& function) {
  constexpr int kRows = kRowsAtOnce<kIsa>;
  int64_t r = 0;
  for (; r + kRows <= m; r += kRows) function(std::integral_constant<int, kRows>{}, r);
  for (; r + 2 <= m; r += 2) function(std::integral_constant<int, 2>{}, r);
  for (; r < m; ++r) function(std::integral_constant<int, 1>{}, r);
}

// Columns [first, stop) of c.
template <CpuIsa kIsa>
PYPKG_INLINE void columns_straight(const MatmulFewRows& p, int64_t first, int64_t stop) {
  const int64_t tile = std::max(kLeastColumns, kTile / p.m);
  for (int64_t j = first; j < stop; j += tile) {
    const int64_t columns = std::min(tile, stop - j);
    for (int64_t r = 0; r < p.m; ++r)
      std::memset(p.c + r * p.n + j, 0, static_cast<size_t>(columns) * sizeof(float));
    const auto add = [&](auto depth, int64_t d) __attribute__((always_inline)) {
      for_rows<kIsa>(p.m, [&](auto rows, int64_t r) __attribute__((always_inline)) {
        add_product<Tile<kIsa>, rows(), depth()>(p.a + r * p.k + d, p.b + d * p.n + j,
                                                 p.c + r * p.n + j, p, columns);
      });
    };
    int64_t d = 0;
    for (; d + kStreams <= p.k; d += kStreams) add(std::integral_constant<int, kStreams>{}, d);
    for (; d < p.k; ++d) add(std::integral_constant<int, 1>{}, d);
  }
}

template <CpuIsa kIsa>
PYPKG_INLINE void columns_transposed(const MatmulFewRows& p, int64_t first, int64_t stop) {
  const auto set = [&](auto columns, int64_t j) __attribute__((always_inline)) {
    for_rows<kIsa>(p.m, [&](auto rows, int64_t r) __attribute__((always_inline)) {
      set_dots<Tile<kIsa>, rows(), columns()>(p.a + r * p.k, p.b + j * p.k, p.c + r * p.n + j, p);
    });
  };
  int64_t j = first;
  for (; j + kStreams <= stop; j += kStreams) set(std::integral_constant<int, kStreams>{}, j);
  for (; j < stop; ++j) set(std::integral_constant<int, 1>{}, j);
}

template <CpuIsa kIsa>
PYPKG_INLINE void columns_of(const MatmulFewRows& p, int64_t first, int64_t stop) {
  if (p.transpose_b) {
    columns_transposed<kIsa>(p, first, stop);
  } else {
    columns_straight<kIsa>(p, first, stop);
  }
}

auto columns_in_use() {
  return dispatch_cpu_isa([](auto isa) { return &CpuVersion<isa(), columns_of<isa()>>::run; });
}

}  // namespace

void matmul_few_rows_columns_cpu(const MatmulFewRows& p, int64_t first, int64_t stop) {
  columns_in_use()(p, first, stop);
}

void matmul_few_rows_cpu(const MatmulFewRows& p) {
  const auto columns = columns_in_use();
  const int threads = threads_for(p.batch * p.n * p.k);
  const int64_t parts = (threads + p.batch - 1) / p.batch;  // of the columns of c
  const int64_t width = (p.n + parts * kLine - 1) / (parts * kLine) * kLine;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < p.batch * parts; ++task) {
    const int64_t pair = task / parts, part = task % parts;
    MatmulFewRows one = p;
    one.a += pair * p.m * p.k;
    one.b += pair * p.k * p.n;
    one.c += pair * p.m * p.n;
    columns(one, std::min(part * width, p.n), std::min((part + 1) * width, p.n));
  }
}

}  // namespace pypkg
