#include "common/cuda_vector.cuh"
#include "rotary_embedding/rotary_embedding.h"

namespace pypkg {
namespace {

// A head is divided into units for one thread each: `rotated` units of kSize pairs (two vectors of
// kSize elements), then `copied` units of one vector for the dimensions that are not rotated.
struct Units {
  int rotated;
  int copied;
};

// Rotates the pairs of a unit, in two vectors.
template <typename T, int kSize>
__device__ __forceinline__ void rotate(Pack<T, kSize>& a, Pack<T, kSize>& b, bool interleaved,
                                       const Pack<float, kSize>& cos,
                                       const Pack<float, kSize>& sin) {
  float values[2 * kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    values[i] = a[i];
    values[kSize + i] = b[i];
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float& x = interleaved ? values[2 * i] : values[i];
    float& y = interleaved ? values[2 * i + 1] : values[kSize + i];
    const float rotated_x = x * cos[i] - y * sin[i];
    y = y * cos[i] + x * sin[i];
    x = rotated_x;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    a.set(i, values[i]);
    b.set(i, values[kSize + i]);
  }
}

// Cosines and sines of a unit, from the token's row of the tables.
template <int kSize>
struct Angles {
  Pack<float, kSize> cos, sin;

  __device__ __forceinline__ void load(const RotaryEmbedding& p, int64_t token, int unit) {
    const int64_t position = p.position_ids ? p.position_ids[token] : token % p.sequence;
    const bool valid = position >= 0 && position < p.num_positions;
    const int64_t at = position * (p.rotary_dim / 2) + unit * kSize;
    if (valid) cos = Pack<float, kSize>::load(p.cos + at);
    if (valid) sin = Pack<float, kSize>::load(p.sin + at);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (!valid) cos.values[i] = sin.values[i] = NAN;
      if (p.inverse) sin.values[i] = -sin.values[i];
    }
  }
};

constexpr int kMaxThreads = 512;
constexpr int kHeadsTogether = 2;  // that a thread reads before it writes them

// threadIdx is (unit in a head, first head, token in the block). A thread reads its cosines and
// sines once for all its heads. Both vectors of a unit are read before either is written, so
// outputs may alias inputs.
template <typename T, int kSize, bool kInterleaved>
__global__ void __launch_bounds__(kMaxThreads, 2) rotary_kernel(RotaryEmbedding p, Units units) {
  using Vector = Pack<T, kSize>;
  const int unit = threadIdx.x, offset = p.rotary_offset;
  const bool is_rotated = unit < units.rotated;
  int first = offset + unit * kSize * (kInterleaved ? 2 : 1);
  if (!is_rotated) {
    first = (unit - units.rotated) * kSize;
    if (first >= offset) first += p.rotary_dim;
  }
  const int second = first + (kInterleaved ? kSize : static_cast<int>(p.rotary_dim / 2));
  const int64_t tokens = p.batch * p.sequence;
  const int heads = p.q_heads + (p.k ? p.k_heads : 0), step = blockDim.y;
  const int64_t q_stride = p.q_stride ? p.q_stride : p.q_heads * p.head_dim;
  for (int64_t token = blockIdx.x * int64_t(blockDim.z) + threadIdx.z; token < tokens;
       token += gridDim.x * int64_t(blockDim.z)) {
    Angles<kSize> angles;
    if (is_rotated) angles.load(p, token, unit);
    for (int base = threadIdx.y; base < heads; base += kHeadsTogether * step) {
      Vector a[kHeadsTogether], b[kHeadsTogether];
      T* target[kHeadsTogether];
#pragma unroll
      for (int i = 0; i < kHeadsTogether; ++i) {
        const int head = base + i * step;
        if (head >= heads) continue;
        const bool is_q = head < p.q_heads;
        const int64_t start = is_q ? token * q_stride + head * p.head_dim
                                   : (token * p.k_heads + head - p.q_heads) * p.head_dim;
        const T* source = static_cast<const T*>(is_q ? p.q : p.k) + start;
        target[i] = static_cast<T*>(is_q ? p.q_out : p.k_out) + start;
        a[i] = Vector::load(source + first);
        if (is_rotated) b[i] = Vector::load(source + second);
      }
#pragma unroll
      for (int i = 0; i < kHeadsTogether; ++i) {
        if (base + i * step >= heads) continue;
        if (is_rotated) {
          rotate(a[i], b[i], kInterleaved, angles.cos, angles.sin);
          b[i].store(target[i] + second);
        }
        a[i].store(target[i] + first);
      }
    }
  }
}

template <typename T, int kSize, bool kInterleaved>
void launch_rotary(const RotaryEmbedding& p, Stream stream) {
  const int64_t heads = p.q_heads + (p.k ? p.k_heads : 0);
  const LaunchSite site{"rotary_embedding", {p.batch, p.sequence, heads, p.head_dim}};
  const bool copies = p.q_out != p.q || p.k_out != p.k;
  const Units units{static_cast<int>(p.rotary_dim / 2 / kSize),
                    copies ? static_cast<int>((p.head_dim - p.rotary_dim) / kSize) : 0};
  const int units_per_head = units.rotated + units.copied;
  if (units_per_head == 0) return;
  if (units_per_head > kMaxThreads) {
    throw std::invalid_argument(site.text() + ": head_dim is too large");
  }
  // Few threads per token, so that each uses its cosines and sines for several heads; the heads are
  // spread evenly over the threads. The rest of the block is filled with tokens.
  constexpr int kThreadsOfToken = 128;
  const int64_t passes = ceil_div<int64_t>(heads * units_per_head, kThreadsOfToken);
  const int at_once =
      std::min<int64_t>(ceil_div<int64_t>(heads, passes), kMaxThreads / units_per_head);
  const int tokens = std::clamp<int>(kMaxThreads / (at_once * units_per_head), 1, 64);
  const dim3 block(units_per_head, at_once, tokens);
  const dim3 grid(
      std::min<int64_t>(ceil_div<int64_t>(p.batch * p.sequence, tokens), kMaxGridBlocks));
  launch(site, rotary_kernel<T, kSize, kInterleaved>, grid, block, 0, stream, p, units);
}

// Whether every unit starts at a multiple of `size` elements and none straddles a boundary.
bool divides(const RotaryEmbedding& p, int size) {
  return p.head_dim % size == 0 && p.q_stride % size == 0 && p.rotary_offset % size == 0 &&
         p.rotary_dim / 2 % size == 0;
}

}  // namespace

void rotary_embedding_cuda(const RotaryEmbedding& p, Stream stream) {
  if (p.batch * p.sequence == 0 || p.q_heads + p.k_heads == 0 || p.head_dim == 0) return;
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kSize = kVectorSize<T>;
    if (all_aligned({p.q, p.k, p.q_out, p.k_out, p.cos, p.sin}) && divides(p, kSize)) {
      p.interleaved ? launch_rotary<T, kSize, true>(p, stream)
                    : launch_rotary<T, kSize, false>(p, stream);
    } else {
      p.interleaved ? launch_rotary<T, 1, true>(p, stream) : launch_rotary<T, 1, false>(p, stream);
    }
  });
}

}  // namespace pypkg
