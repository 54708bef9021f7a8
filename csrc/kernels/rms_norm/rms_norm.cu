#include "common/cuda_ptx.cuh"
#include "common/cuda_vector.cuh"
#include "rms_norm/rms_norm.h"

namespace pypkg {
namespace {

// A row is held in the registers of `threads` threads, in `vectors` 16-byte vectors each, and is
// read once. vectors == 0 means the scalar version, which reads rows twice, for rows that are
// misaligned or too long.
struct RowLayout {
  int threads;
  int rows_per_block;
  int vectors;
};

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMaxVectors = 4;

RowLayout row_layout(int64_t cols, int vector_size, bool aligned) {
  const int64_t vectors = cols / vector_size;
  if (!aligned || cols % vector_size != 0 || vectors > kMaxThreads * kMaxVectors) {
    return {256, 1, 0};
  }
  const int per_thread = vectors <= 256 ? 1 : vectors <= 512 ? 2 : 4;
  const int threads = ceil_div<int>(ceil_div<int>(vectors, per_thread), kWarpSize) * kWarpSize;
  // Rows of one warp share a block; they need no block-wide barrier.
  return {threads, threads == kWarpSize ? 4 : 1, per_thread};
}

template <typename F>
void dispatch_vectors(int vectors, F&& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 4>{});
  }
}

// Calls f(TypeTag<T>, TypeTag<W>) for the dtype of the rows and that of the weight.
template <typename F>
void dispatch_row_and_weight(DType dtype, DType weight_dtype, F&& f) {
  if (weight_dtype != dtype && weight_dtype != DType::kFloat32) {
    throw std::invalid_argument(std::string("rms_norm: weight must be float32 or ") +
                                dtype_name(dtype) + ", not " + dtype_name(weight_dtype));
  }
  dispatch_dtype(dtype, [&](auto row_tag) {
    if (weight_dtype == dtype) {
      f(row_tag, row_tag);
    } else {
      f(row_tag, TypeTag<float>{});
    }
  });
}

// Two sets of warp sums, used in turn: a thread that is one set of rows ahead cannot overwrite sums
// still being read.
template <int kRows>
struct RowSums {
  float of_warp[2][kRows][kMaxWarps];
};

// Replaces values by their sums over the threads of a row, for kRows rows with one barrier. In a
// block with more than one warp per row, all threads work on the same rows.
template <int kRows>
__device__ __forceinline__ void sum_over_row(float (&values)[kRows], RowSums<kRows>& sums,
                                             int turn) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) values[r] = warp_sum(values[r]);
  if (blockDim.x == kWarpSize) return;
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (lane == 0) sums.of_warp[turn][r][warp] = values[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    values[r] = warp_sum(lane < blockDim.x / kWarpSize ? sums.of_warp[turn][r][lane] : 0.0f);
  }
}

__device__ float row_sum(float value, RowSums<1>& sums, int turn) {
  float values[1] = {value};
  sum_over_row(values, sums, turn);
  return values[0];
}

template <typename T, typename W, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(RmsNormForward p) {
  constexpr int kSize = kVectorSize<T>;
  RowSums<1>& sums = dynamic_shared<RowSums<1>>();
  int turn = 0;
  for (int64_t row = blockIdx.x * int64_t(blockDim.y) + threadIdx.y; row < p.rows;
       row += gridDim.x * int64_t(blockDim.y), turn ^= 1) {
    const int64_t start = row * p.cols;
    Pack<T, kSize> h[kVectors];
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = (threadIdx.x + v * blockDim.x) * kSize;
      if (col >= p.cols) continue;
      h[v] = Pack<T, kSize>::load(static_cast<const T*>(p.x) + start + col);
      if (p.residual) {
        const auto r = Pack<T, kSize>::load(static_cast<const T*>(p.residual) + start + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) h[v].set(i, h[v][i] + r[i]);
        h[v].store(static_cast<T*>(p.residual_out) + start + col);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += h[v][i] * h[v][i];
    }
    const float rstd = rsqrtf(row_sum(sum, sums, turn) / p.cols + p.epsilon);
    if (threadIdx.x == 0) p.rstd[row] = rstd;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = (threadIdx.x + v * blockDim.x) * kSize;
      if (col >= p.cols) continue;
      const auto weight = Pack<W, kSize>::load(static_cast<const W*>(p.weight) + col);
#pragma unroll
      for (int i = 0; i < kSize; ++i) h[v].set(i, h[v][i] * rstd * weight[i]);
      h[v].store(static_cast<T*>(p.y) + start + col);
    }
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads) forward_scalar_kernel(RmsNormForward p) {
  RowSums<1>& sums = dynamic_shared<RowSums<1>>();
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x, turn ^= 1) {
    const T* h = static_cast<const T*>(p.x) + row * p.cols;
    float sum = 0;
    if (p.residual) {
      const T* residual = static_cast<const T*>(p.residual) + row * p.cols;
      T* residual_out = static_cast<T*>(p.residual_out) + row * p.cols;
      for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
        residual_out[col] = from_float<T>(to_float(h[col]) + to_float(residual[col]));
      }
      h = residual_out;  // each thread reads back only what it wrote
    }
    for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
      sum += to_float(h[col]) * to_float(h[col]);
    }
    const float rstd = rsqrtf(row_sum(sum, sums, turn) / p.cols + p.epsilon);
    if (threadIdx.x == 0) p.rstd[row] = rstd;
    const W* weight = static_cast<const W*>(p.weight);
    T* y = static_cast<T*>(p.y) + row * p.cols;
    for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
      y[col] = from_float<T>(to_float(h[col]) * rstd * to_float(weight[col]));
    }
  }
}

constexpr int kBackwardRegisters = 128;  // maximum per thread
constexpr int kResidentThreads = 65536 / kBackwardRegisters;

// Rows of dweight's partial sums: as many as can be resident on the device at a time, so that the
// rows are spread evenly. The number depends only on the shape and the device, so sums have the
// same order in every call.
int64_t partial_rows(int64_t rows, int64_t cols) {
  const RowLayout layout = row_layout(cols, kVectorBytes / 2, true);  // of a 16-bit type
  const int64_t per_multiprocessor =
      layout.vectors ? std::max(kResidentThreads / layout.threads, 1)
                     : std::clamp<int64_t>(8192 / std::max<int64_t>(cols, 1), 4, 32);
  return std::min(rows, per_multiprocessor * multiprocessor_count());
}

// Rows that a thread sums together, with one barrier. The loads of the next rows are in flight
// during the computation.
template <int kVectors>
constexpr int kRowsTogether = kVectors == 4 ? 1 : 2;

template <int kVectors>
constexpr int kBackwardThreads = kVectors == 4 ? kMaxThreads : 256;

template <typename T, int kVectors>
struct BackwardRows {
  static constexpr int kRows = kRowsTogether<kVectors>;
  using Vector = Pack<T, kVectorSize<T>>;
  Vector dy[kRows][kVectors], h[kRows][kVectors];
  float rstd[kRows];

  // Loads the rows first, first + step, ... that are below p.rows; the others are not changed.
  __device__ __forceinline__ void load(const RmsNormBackward& p, int64_t first, int64_t step) {
    const int thread = opaque(threadIdx.x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * step;
      if (row >= p.rows) continue;
      rstd[r] = p.rstd[row];
      const T* dy_row = static_cast<const T*>(p.dy) + row * p.cols;
      const T* h_row = static_cast<const T*>(p.h) + row * p.cols;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int col = (thread + v * blockDim.x) * kVectorSize<T>;
        if (col >= p.cols) continue;
        dy[r][v] = Vector::load(dy_row + col);
        h[r][v] = Vector::load(h_row + col);
      }
    }
  }

  // Prevents conversions before this call. Otherwise the compiler converts bfloat16 right after the
  // load, and floats take twice as many registers.
  __device__ __forceinline__ void stay_packed() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        make_opaque(dy[r][v]);
        make_opaque(h[r][v]);
      }
    }
  }

 private:
  __device__ __forceinline__ static void make_opaque(Vector& vector) {
    int* words = reinterpret_cast<int*>(vector.values);
#pragma unroll
    for (int w = 0; w < int(sizeof(Vector) / sizeof(int)); ++w) words[w] = opaque(words[w]);
  }
};

// Writes a row of y. The row of h is read again, from a cache, so that it holds no registers.
template <typename T, typename W, int kVectors>
__device__ __forceinline__ void store_normed(const RmsNormBackward& p, int64_t row, float rstd) {
  constexpr int kSize = kVectorSize<T>;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int col = (opaque(threadIdx.x) + v * blockDim.x) * kSize;
    if (col >= p.cols) continue;
    auto y = Pack<T, kSize>::load(static_cast<const T*>(p.h) + row * p.cols + col);
    const auto weight = Pack<W, kSize>::load(static_cast<const W*>(p.weight) + col);
#pragma unroll
    for (int i = 0; i < kSize; ++i) y.set(i, y[i] * rstd * weight[i]);
    y.store(static_cast<T*>(p.y) + row * p.cols + col);
  }
}

// Each row slot of the grid walks over rows slot, slot + slots, ... and writes its own row of
// partial sums of dweight into the workspace.
template <typename T, typename W, int kVectors, bool kWithY>
__global__ void __launch_bounds__(kBackwardThreads<kVectors>,
                                  kResidentThreads / kBackwardThreads<kVectors>)
    backward_kernel(RmsNormBackward p, int64_t slots) {
  constexpr int kSize = kVectorSize<T>;
  constexpr int kRows = kRowsTogether<kVectors>;
  using Vector = Pack<T, kSize>;
  auto& sums = dynamic_shared<RowSums<kRows>>();
  const int64_t slot = blockIdx.x * int64_t(blockDim.y) + threadIdx.y;
  if (slot >= slots) return;
  const W* weights = static_cast<const W*>(p.weight);
  float dweight[kVectors][kSize] = {};
  BackwardRows<T, kVectors> rows, next;
  next.load(p, slot, slots);
  int turn = 0;
  for (int64_t first = slot; first < p.rows; first += kRows * slots, turn ^= 1) {
    rows = next;
    rows.stay_packed();
    next.load(p, first + kRows * slots, slots);
    float projection[kRows] = {};
    const int thread = opaque(threadIdx.x);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int col = (thread + v * blockDim.x) * kSize;
      if (col >= p.cols) continue;
      const auto weight = Pack<W, kSize>::load(weights + col);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r * slots >= p.rows) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float product = rows.dy[r][v][i] * rows.h[r][v][i];
          projection[r] += product * weight[i];
          dweight[v][i] += product * rows.rstd[r];
        }
      }
    }
    sum_over_row(projection, sums, turn);
    rows.stay_packed();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * slots;
      if (row >= p.rows) continue;
      const float rstd = rows.rstd[r], shift = projection[r] / p.cols * rstd * rstd;
      const int64_t start = row * p.cols;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int col = (thread + v * blockDim.x) * kSize;
        if (col >= p.cols) continue;
        const auto weight = Pack<W, kSize>::load(weights + col);
        Vector dx = {};
        if (p.dh) dx = Vector::load(static_cast<const T*>(p.dh) + start + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          dx.set(i, dx[i] + rstd * (rows.dy[r][v][i] * weight[i] - rows.h[r][v][i] * shift));
        }
        dx.store(static_cast<T*>(p.dx) + start + col);
        if (p.dresidual) dx.store(static_cast<T*>(p.dresidual) + start + col);
      }
      if constexpr (kWithY) store_normed<T, W, kVectors>(p, row, rstd);
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int col = (threadIdx.x + v * blockDim.x) * kSize;
    if (col >= p.cols) continue;
    Pack<float, kSize> sum;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum.values[i] = dweight[v][i];
    sum.store(p.workspace + slot * p.cols + col);
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kMaxThreads)
    backward_scalar_kernel(RmsNormBackward p, int64_t slots) {
  RowSums<1>& sums = dynamic_shared<RowSums<1>>();
  const W* weight = static_cast<const W*>(p.weight);
  float* partial = p.workspace + blockIdx.x * p.cols;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += slots, turn ^= 1) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.cols;
    const T* h = static_cast<const T*>(p.h) + row * p.cols;
    const T* dh = p.dh ? static_cast<const T*>(p.dh) + row * p.cols : nullptr;
    T* dx = static_cast<T*>(p.dx) + row * p.cols;
    const float rstd = p.rstd[row];
    float sum = 0;
    for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
      sum += to_float(dy[col]) * to_float(weight[col]) * to_float(h[col]);
    }
    const float projection = row_sum(sum, sums, turn) / p.cols * rstd * rstd;
    for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
      const float g = to_float(dy[col]), x = to_float(h[col]);
      const float before = row < slots ? 0.0f : partial[col];  // the first row of this slot
      partial[col] = before + g * x * rstd;
      const float dx_norm = rstd * (g * to_float(weight[col]) - x * projection);
      dx[col] = from_float<T>((dh ? to_float(dh[col]) : 0.0f) + dx_norm);
      if (p.dresidual) static_cast<T*>(p.dresidual)[row * p.cols + col] = dx[col];
      if (p.y) {
        static_cast<T*>(p.y)[row * p.cols + col] = from_float<T>(x * rstd * to_float(weight[col]));
      }
    }
  }
}

constexpr int kReduceCols = 32;
constexpr int kReduceRows = 8;

// dweight = sum over the partial rows, in a fixed order.
template <typename W>
__global__ void reduce_dweight_kernel(RmsNormBackward p, int64_t slots) {
  float* sums = dynamic_shared<float[kReduceRows * kReduceCols]>();
  const int64_t col = blockIdx.x * int64_t(kReduceCols) + threadIdx.x;
  float sum = 0;
  if (col < p.cols) {
    for (int64_t slot = threadIdx.y; slot < slots; slot += kReduceRows) {
      sum += p.workspace[slot * p.cols + col];
    }
  }
  sums[threadIdx.y * kReduceCols + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= p.cols) return;
  for (int y = 1; y < kReduceRows; ++y) sum += sums[y * kReduceCols + threadIdx.x];
  static_cast<W*>(p.dweight)[col] = from_float<W>(sum);
}

}  // namespace

void rms_norm_forward_cuda(const RmsNormForward& p, Stream stream) {
  if (p.rows == 0 || p.cols == 0) return;
  const LaunchSite site{"rms_norm_forward", {p.rows, p.cols}};
  const bool aligned = all_aligned({p.x, p.residual, p.weight, p.y, p.residual_out});
  dispatch_row_and_weight(p.dtype, p.weight_dtype, [&](auto row_tag, auto weight_tag) {
    using T = typename decltype(row_tag)::type;
    using W = typename decltype(weight_tag)::type;
    const RowLayout layout = row_layout(p.cols, kVectorSize<T>, aligned);
    const dim3 block(layout.threads, layout.rows_per_block);
    const dim3 grid(
        std::min<int64_t>(ceil_div<int64_t>(p.rows, layout.rows_per_block), kMaxGridBlocks));
    if (layout.vectors == 0) {
      launch(site, forward_scalar_kernel<T, W>, grid, block, sizeof(RowSums<1>), stream, p);
      return;
    }
    dispatch_vectors(layout.vectors, [&](auto vectors) {
      launch(site, forward_kernel<T, W, decltype(vectors)::value>, grid, block, sizeof(RowSums<1>),
             stream, p);
    });
  });
}

int64_t rms_norm_backward_workspace_cuda(int64_t rows, int64_t cols) {
  return partial_rows(rows, cols) * cols;
}

void rms_norm_backward_cuda(const RmsNormBackward& p, Stream stream) {
  if (p.cols == 0) return;
  const LaunchSite site{"rms_norm_backward", {p.rows, p.cols}};
  const bool aligned =
      all_aligned({p.dy, p.dh, p.h, p.weight, p.dx, p.dresidual, p.y, p.workspace});
  const int64_t slots = partial_rows(p.rows, p.cols);
  dispatch_row_and_weight(p.dtype, p.weight_dtype, [&](auto row_tag, auto weight_tag) {
    using T = typename decltype(row_tag)::type;
    using W = typename decltype(weight_tag)::type;
    const RowLayout layout = row_layout(p.cols, kVectorSize<T>, aligned);
    const dim3 block(layout.threads, layout.rows_per_block);
    const dim3 grid(ceil_div<int64_t>(slots, layout.rows_per_block));
    if (slots > 0 && layout.vectors == 0) {
      launch(site, backward_scalar_kernel<T, W>, grid, block, sizeof(RowSums<1>), stream, p, slots);
    } else if (slots > 0) {
      dispatch_vectors(layout.vectors, [&](auto vectors) {
        constexpr int kVectors = decltype(vectors)::value;
        const auto kernel =
            p.y ? backward_kernel<T, W, kVectors, true> : backward_kernel<T, W, kVectors, false>;
        launch(site, kernel, grid, block, sizeof(RowSums<kRowsTogether<kVectors>>), stream, p,
               slots);
      });
    }
    launch(site, reduce_dweight_kernel<W>, dim3(ceil_div<int64_t>(p.cols, kReduceCols)),
           dim3(kReduceCols, kReduceRows), kReduceRows * kReduceCols * sizeof(float), stream, p,
           slots);
  });
}

}  // namespace pypkg
