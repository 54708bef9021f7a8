#include <algorithm>

#include "common/cpu_simd.h"
#include "rotary_embedding/rotary_embedding.h"

namespace pypkg {
namespace {

// One head of one token. sign is -1 to rotate backwards.
template <class T>
PYPKG_INLINE void rotate_halves(const T* in, T* out, const float* cos, const float* sin,
                                int64_t half, float sign) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = to_float(in[i]), second = to_float(in[half + i]);
    const float c = cos[i], s = sign * sin[i];
    out[i] = from_float<T>(first * c - second * s);
    out[half + i] = from_float<T>(second * c + first * s);
  }
}

template <class T>
PYPKG_INLINE void rotate_interleaved(const T* in, T* out, const float* cos, const float* sin,
                                     int64_t half, float sign) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float first = to_float(in[2 * i]), second = to_float(in[2 * i + 1]);
    const float c = cos[i], s = sign * sin[i];
    out[2 * i] = from_float<T>(first * c - second * s);
    out[2 * i + 1] = from_float<T>(second * c + first * s);
  }
}

template <class T>
PYPKG_INLINE void rotate_heads(const RotaryEmbedding& p, const void* input, void* output,
                               int64_t token, int64_t heads, int64_t stride, const float* cos,
                               const float* sin) {
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t offset = token * stride + head * p.head_dim;
    const T* in = static_cast<const T*>(input) + offset;
    T* out = static_cast<T*>(output) + offset;
    if (in != out) {
      const int64_t end = p.rotary_offset + p.rotary_dim;
      std::copy(in, in + p.rotary_offset, out);
      std::copy(in + end, in + p.head_dim, out + end);
    }
    const T* from = in + p.rotary_offset;
    T* to = out + p.rotary_offset;
    if (p.interleaved) {
      rotate_interleaved(from, to, cos, sin, p.rotary_dim / 2, sign);
    } else {
      rotate_halves(from, to, cos, sin, p.rotary_dim / 2, sign);
    }
  }
}

int64_t position_of(const RotaryEmbedding& p, int64_t token) {
  return p.position_ids ? p.position_ids[token] : token % p.sequence;
}

void check_positions(const RotaryEmbedding& p) {
  for (int64_t token = 0; token < p.batch * p.sequence; ++token) {
    const int64_t position = position_of(p, token);
    if (position < 0 || position >= p.num_positions) {
      throw std::out_of_range("rotary_embedding: position " + std::to_string(position) +
                              " of token " + std::to_string(token % p.sequence) + " in sequence " +
                              std::to_string(token / p.sequence) +
                              " is outside the cos and sin tables of " +
                              std::to_string(p.num_positions) + " positions");
    }
  }
}

}  // namespace

void rotary_embedding_cpu(const RotaryEmbedding& params) {
  check_positions(params);
  dispatch_dtype(params.dtype, "rotary_embedding", [&](auto t) {
    const int64_t q_heads = params.q_heads, k_heads = params.k_heads;
    const int64_t k_stride = k_heads * params.head_dim;
    const int64_t q_stride = params.q_stride ? params.q_stride : q_heads * params.head_dim;
    const auto rotate = cpu_version<rotate_heads<decltype(t)>>();
    const int64_t tokens = params.batch * params.sequence;
#pragma omp parallel for num_threads(threads_for(tokens* q_stride)) schedule(static)
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t row = position_of(params, token) * (params.rotary_dim / 2);
      const float* cos = params.cos + row;
      const float* sin = params.sin + row;
      rotate(params, params.q, params.q_out, token, q_heads, q_stride, cos, sin);
      if (params.k) rotate(params, params.k, params.k_out, token, k_heads, k_stride, cos, sin);
    }
  });
}

}  // namespace pypkg
