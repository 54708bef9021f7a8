// Matrix tiles for attention, in shared memory and distributed over the registers of a warp.
//
// A warp's accumulator is [kRowTiles][n / 8][4] floats per lane: row tile m and column tile n hold
// a [16, 8] block in the layout of mma_m16n8k16. Element c of lane l is
//   row 16 m + l / 4 + 8 (c / 2),  column 8 n + 2 (l % 4) + c % 2.
// Two products cover most of attention. Both exist for tensor cores (16-bit types) and for plain
// float32 arithmetic, in the same layout:
//   multiply_transposed   scores += A B^T    A, B in shared memory
//   multiply              out    += P B      P an accumulator of the warp, B in shared memory
#pragma once

#include "common/cuda_ptx.cuh"
#include "common/cuda_vector.cuh"

namespace pypkg {

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarpSize; }
__device__ __forceinline__ int row_in_tile(int m, int c) {
  return 16 * m + lane_id() / 4 + 8 * (c / 2);
}
__device__ __forceinline__ int col_in_tile(int n, int c) {
  return 8 * n + 2 * (lane_id() % 4) + c % 2;
}

// One value for each row of an accumulator that a lane holds: of[m][i] belongs to
// row_in_tile(m, 2 * i).
template <int kRowTiles>
struct RowValues {
  float of[kRowTiles][2];

  __device__ static RowValues all(float value) {
    RowValues values;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) values.of[m][0] = values.of[m][1] = value;
    return values;
  }
};

// kRows rows of kDim elements, in 16-byte chunks. Chunks are permuted inside a row, so that the
// same chunk of 8 neighbouring rows lies in 8 different groups of banks.
template <typename T, int kRows_, int kDim_>
struct SharedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kDim = kDim_;
  static constexpr int kChunkSize = kVectorSize<T>;
  static constexpr int kChunks = kDim / kChunkSize;
  static_assert(kChunks % 4 == 0);

  alignas(128) T data[kRows * kDim];

  __device__ __forceinline__ T* chunk(int row, int index) {
    const int permuted = kChunks % 8 == 0 ? index ^ (row & 7) : index ^ ((row >> 1) & 3);
    return data + row * kDim + permuted * kChunkSize;
  }
  __device__ __forceinline__ const T* chunk(int row, int index) const {
    return const_cast<SharedTile*>(this)->chunk(row, index);
  }

  // Rows [first, first + kCount); `first` is a multiple of 8.
  template <int kCount>
  __device__ __forceinline__ const SharedTile<T, kCount, kDim>& part(int first) const {
    return *reinterpret_cast<const SharedTile<T, kCount, kDim>*>(data + first * kDim);
  }
};

// The rows of one batch and head in a [batch, sequence, heads, head_dim] tensor. Tokens are
// `token_stride` elements apart.
template <typename T>
struct HeadRows {
  T* data;         // row 0, dimension 0
  int64_t stride;  // elements from row to row
  int head_dim;

  __device__ HeadRows(T* tensor, int64_t b, int64_t sequence, int64_t head, int64_t token_stride,
                      int64_t head_dim_)
      : data(tensor + b * sequence * token_stride + head * head_dim_),
        stride(token_stride),
        head_dim(head_dim_) {}
};

// Starts to copy rows [first, first + kRows) into a tile; all threads of the block take part. Rows
// from `end` on and dimensions from head_dim on are not read; the tile gets zeros there.
template <int kThreads, typename T, int kRows, int kDim>
__device__ __forceinline__ void load_tile(SharedTile<T, kRows, kDim>& tile,
                                          const HeadRows<const T>& rows, int64_t first,
                                          int64_t end) {
  using Tile = SharedTile<T, kRows, kDim>;
  static_assert(kRows * Tile::kChunks % kThreads == 0);
  constexpr int kCopies = kRows * Tile::kChunks / kThreads;
  const int thread = opaque(threadIdx.x);
  if constexpr (kThreads % Tile::kChunks == 0) {  // a thread has one chunk of every kStep-th row
    constexpr int kStep = kThreads / Tile::kChunks;
    const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const int dim = chunk * Tile::kChunkSize;
    const int left = dim < rows.head_dim ? static_cast<int>(end - first) - row : 0;  // rows
    const T* source = rows.data + (first + row) * rows.stride + dim;
#pragma unroll(kDim > 128 ? 2 : kCopies)
    for (int i = 0; i < kCopies; ++i) {
      copy_async_16(tile.chunk(row + i * kStep, chunk), source, i * kStep < left);
      source += kStep * rows.stride;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int id = i * kThreads + thread;
      const int row = id / Tile::kChunks, chunk = id % Tile::kChunks;
      const int dim = chunk * Tile::kChunkSize;
      const bool valid = first + row < end && dim < rows.head_dim;
      const T* source = rows.data + (valid ? (first + row) * rows.stride + dim : 0);
      copy_async_16(tile.chunk(row, chunk), source, valid);
    }
  }
}

// Writes this warp's accumulator times `factor` to rows [first, end) of a tensor. It goes through
// the warp's own rows of a tile, so that stores are 16 bytes wide; nobody else may use the tile
// since the last barrier.
template <typename T, int kRows, int kDim, int kRowTiles>
__device__ __forceinline__ void store_rows(const float (&acc)[kRowTiles][kDim / 8][4],
                                           const RowValues<kRowTiles>& factor,
                                           SharedTile<T, kRows, kDim>& tile,
                                           const HeadRows<T>& rows, int64_t first, int64_t end) {
  using Tile = SharedTile<T, kRows, kDim>;
  constexpr int kWarpRows = 16 * kRowTiles;
  const int warp_row = warp_id() * kWarpRows;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int col = col_in_tile(n, c);
        T* chunk = tile.chunk(warp_row + row_in_tile(m, c), col / Tile::kChunkSize);
        chunk[col % Tile::kChunkSize] = from_float<T>(acc[m][n][c] * factor.of[m][c / 2]);
      }
    }
  }
  __syncwarp();
  for (int id = lane_id(); id < kWarpRows * Tile::kChunks; id += kWarpSize) {
    const int row = warp_row + id / Tile::kChunks, chunk = id % Tile::kChunks;
    const int dim = chunk * Tile::kChunkSize;
    if (first + row < end && dim < rows.head_dim) {
      Pack<T, Tile::kChunkSize>::load(tile.chunk(row, chunk))
          .store(rows.data + (first + row) * rows.stride + dim);
    }
  }
}

// --- tensor cores -------------------------------------------------------------------------------

// The addresses of operands are computed again for each product. If the loops over tiles kept them,
// they would take registers that the results need.

// scores[kRowTiles][kCols / 8] += A[a_row ..] B^T, over kDim.
template <typename T, int kRowTiles, int kARows, int kCols, int kDim>
__device__ __forceinline__ void multiply_transposed(float (&scores)[kRowTiles][kCols / 8][4],
                                                    const SharedTile<T, kARows, kDim>& a, int a_row,
                                                    const SharedTile<T, kCols, kDim>& b) {
  const int lane = opaque(lane_id());
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a_parts[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(a_parts[m], a.chunk(a_row + 16 * m + lane % 16, 2 * k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      uint32_t b_parts[4];
      load_matrices(b_parts, b.chunk(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<T>(scores[m][2 * n], a_parts[m], b_parts[0], b_parts[1]);
        mma_m16n8k16<T>(scores[m][2 * n + 1], a_parts[m], b_parts[2], b_parts[3]);
      }
    }
  }
}

// Two column tiles of an accumulator, rounded to T, make exactly one operand of the next product.
template <typename T>
__device__ __forceinline__ void pack_operand(uint32_t (&operand)[4], const float (&left)[4],
                                             const float (&right)[4]) {
  operand[0] = pack_pair<T>(left[0], left[1]);
  operand[1] = pack_pair<T>(left[2], left[3]);
  operand[2] = pack_pair<T>(right[0], right[1]);
  operand[3] = pack_pair<T>(right[2], right[3]);
}

// out[kRowTiles][kDim / 8] += P[kRowTiles][kInner / 8] B, over the kInner rows of B. P is rounded
// to T.
template <typename T, int kRowTiles, int kInner, int kDim>
__device__ __forceinline__ void multiply(float (&out)[kRowTiles][kDim / 8][4],
                                         const float (&p)[kRowTiles][kInner / 8][4],
                                         const SharedTile<T, kInner, kDim>& b) {
  const int lane = opaque(lane_id());
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    uint32_t p_parts[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      pack_operand<T>(p_parts[m], p[m][2 * k], p[m][2 * k + 1]);
    }
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b_parts[4];
      load_matrices_transposed(b_parts, b.chunk(16 * k + lane % 16, 2 * d + lane / 16));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<T>(out[m][2 * d], p_parts[m], b_parts[0], b_parts[1]);
        mma_m16n8k16<T>(out[m][2 * d + 1], p_parts[m], b_parts[2], b_parts[3]);
      }
    }
  }
}

// Writes this warp's accumulator, rounded to T, into a tile from first_row and first_col on.
template <typename T, int kRows, int kDim, int kRowTiles, int kColTiles>
__device__ __forceinline__ void store_operand(SharedTile<T, kRows, kDim>& tile, int first_row,
                                              int first_col,
                                              const float (&acc)[kRowTiles][kColTiles][4]) {
  const int lane = opaque(lane_id());
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        T* chunk = tile.chunk(first_row + 16 * m + 8 * i + lane / 4, first_col / 8 + n);
        const uint32_t pair = pack_pair<T>(acc[m][n][2 * i], acc[m][n][2 * i + 1]);
        *reinterpret_cast<uint32_t*>(chunk + 2 * (lane % 4)) = pair;
      }
    }
  }
}

// out[kRowTiles][kCols / 8] += A^T[a_col ..] B[.., b_col ..], over the kInner rows of A and B.
template <typename T, int kRowTiles, int kColTiles, int kInner, int kACols, int kBCols>
__device__ __forceinline__ void multiply_left_transposed(float (&out)[kRowTiles][kColTiles][4],
                                                         const SharedTile<T, kInner, kACols>& a,
                                                         int a_col,
                                                         const SharedTile<T, kInner, kBCols>& b,
                                                         int b_col) {
  const int lane = opaque(lane_id());
#pragma unroll
  for (int k = 0; k < kInner / 16; ++k) {
    uint32_t a_parts[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices_transposed(
          a_parts[m], a.chunk(16 * k + lane / 16 * 8 + lane % 8, a_col / 8 + 2 * m + lane / 8 % 2));
    }
#pragma unroll
    for (int n = 0; n < kColTiles / 2; ++n) {
      uint32_t b_parts[4];
      load_matrices_transposed(b_parts, b.chunk(16 * k + lane % 16, b_col / 8 + 2 * n + lane / 16));
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        mma_m16n8k16<T>(out[m][2 * n], a_parts[m], b_parts[0], b_parts[1]);
        mma_m16n8k16<T>(out[m][2 * n + 1], a_parts[m], b_parts[2], b_parts[3]);
      }
    }
  }
}

// --- float32 ------------------------------------------------------------------------------------

template <int kRowTiles, int kARows, int kCols, int kDim>
__device__ __forceinline__ void multiply_transposed(float (&scores)[kRowTiles][kCols / 8][4],
                                                    const SharedTile<float, kARows, kDim>& a,
                                                    int a_row,
                                                    const SharedTile<float, kCols, kDim>& b) {
  using Chunk = Pack<float, 4>;
#pragma unroll 2
  for (int k = 0; k < kDim / 4; ++k) {
    Chunk a_parts[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a_parts[m][i] = Chunk::load(a.chunk(a_row + row_in_tile(m, 2 * i), k));
      }
    }
#pragma unroll
    for (int n = 0; n < kCols / 8; ++n) {
      const Chunk b_parts[2] = {Chunk::load(b.chunk(col_in_tile(n, 0), k)),
                                Chunk::load(b.chunk(col_in_tile(n, 1), k))};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scores[m][n][c] += a_parts[m][c / 2][i] * b_parts[c % 2][i];
          }
        }
      }
    }
  }
}

template <int kRowTiles, int kInner, int kDim>
__device__ __forceinline__ void multiply(float (&out)[kRowTiles][kDim / 8][4],
                                         const float (&p)[kRowTiles][kInner / 8][4],
                                         const SharedTile<float, kInner, kDim>& b) {
#pragma unroll
  for (int k = 0; k < kInner; ++k) {
    // The lane of this lane's group of four that holds column k of P.
    const int holder = lane_id() / 4 * 4 + k % 8 / 2;
    float p_parts[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p_parts[m][i] = __shfl_sync(kFullWarp, p[m][k / 8][2 * i + k % 2], holder);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int col = col_in_tile(n, 0);
      const float* pair = b.chunk(k, col / 4) + col % 4;
      const float b_parts[2] = {pair[0], pair[1]};
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) out[m][n][c] += p_parts[m][c / 2] * b_parts[c % 2];
      }
    }
  }
}

}  // namespace pypkg
