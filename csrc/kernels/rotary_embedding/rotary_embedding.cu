#include "common/cuda_vector.cuh"
#include "rotary_embedding/rotary_embedding.h"

namespace pypkg {
namespace {

// A head is cut into units that one thread handles: `rotated` units of kSize pairs (two vectors of
// kSize elements), then `copied` units of one vector for the dimensions outside the rotary ones.
struct Units {
  int rotated;
  int copied;
};

// Both vectors are read before either is written, so outputs may alias inputs.
template <typename T, int kSize>
__device__ void rotate(const T* source, T* target, int first, int second, bool interleaved,
                       const float (&cos)[kSize], const float (&sin)[kSize]) {
  auto a = Pack<T, kSize>::load(source + first);
  auto b = Pack<T, kSize>::load(source + second);
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
  a.store(target + first);
  b.store(target + second);
}

// threadIdx.x is the unit inside a head, threadIdx.y walks over heads, blocks walk over tokens;
// so cosines and sines are read once for all heads of a token.
template <typename T, int kSize, bool kInterleaved>
__global__ void __launch_bounds__(512, 2) rotary_kernel(RotaryEmbedding p, Units units) {
  const int unit = threadIdx.x;
  const int offset = p.rotary_offset, half = p.rotary_dim / 2;
  const int64_t tokens = p.batch * p.sequence;
  const int heads = p.q_heads + (p.k ? p.k_heads : 0);
  const int64_t q_stride = p.q_stride ? p.q_stride : p.q_heads * p.head_dim;
  for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    float cos[kSize] = {}, sin[kSize] = {};
    if (unit < units.rotated) {
      const int64_t position = p.position_ids ? p.position_ids[token] : token % p.sequence;
      const bool valid = position >= 0 && position < p.num_positions;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int64_t at = position * half + unit * kSize + i;
        cos[i] = valid ? p.cos[at] : NAN;
        sin[i] = valid ? (p.inverse ? -p.sin[at] : p.sin[at]) : NAN;
      }
    }
    for (int head = threadIdx.y; head < heads; head += blockDim.y) {
      const bool is_q = head < p.q_heads;
      const int64_t start = is_q ? token * q_stride + head * p.head_dim
                                 : (token * p.k_heads + head - p.q_heads) * p.head_dim;
      const T* source = static_cast<const T*>(is_q ? p.q : p.k) + start;
      T* target = static_cast<T*>(is_q ? p.q_out : p.k_out) + start;
      if (unit < units.rotated) {
        const int first = offset + unit * kSize * (kInterleaved ? 2 : 1);
        const int second = first + (kInterleaved ? kSize : half);
        rotate<T, kSize>(source, target, first, second, kInterleaved, cos, sin);
      } else if (unit < units.rotated + units.copied && source != target) {
        int dim = (unit - units.rotated) * kSize;
        if (dim >= offset) dim += p.rotary_dim;
        Pack<T, kSize>::load(source + dim).store(target + dim);
      }
    }
  }
}

template <typename T, int kSize, bool kInterleaved>
void launch_rotary(const RotaryEmbedding& p, Stream stream) {
  const Units units{static_cast<int>(p.rotary_dim / 2 / kSize),
                    static_cast<int>((p.head_dim - p.rotary_dim) / kSize)};
  const int64_t heads = p.q_heads + (p.k ? p.k_heads : 0);
  const LaunchSite site{"rotary_embedding", {p.batch, p.sequence, heads, p.head_dim}};
  constexpr int kWantedThreads = 256, kMaxThreads = 512;
  const int units_per_head = units.rotated + units.copied;
  if (units_per_head > kMaxThreads) {
    throw std::invalid_argument(site.text() + ": head_dim is too large");
  }
  // The heads are spread evenly over the passes that a block makes.
  const int64_t passes = ceil_div<int64_t>(heads * units_per_head, kWantedThreads);
  const dim3 block(units_per_head, std::min<int64_t>(ceil_div<int64_t>(heads, passes),
                                                     kMaxThreads / units_per_head));
  const dim3 grid(std::min<int64_t>(p.batch * p.sequence, kMaxGridBlocks));
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
    if (all_aligned({p.q, p.k, p.q_out, p.k_out}) && divides(p, kSize)) {
      p.interleaved ? launch_rotary<T, kSize, true>(p, stream)
                    : launch_rotary<T, kSize, false>(p, stream);
    } else {
      p.interleaved ? launch_rotary<T, 1, true>(p, stream) : launch_rotary<T, 1, false>(p, stream);
    }
  });
}

}  // namespace pypkg
