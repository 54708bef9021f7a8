// Entry points of attention on CUDA: argument checks, the row sums for the backward pass, and the
// choice of an implementation.
#include <cmath>
#include <cstdlib>

#include "attention/cuda/flash_attention_cuda.h"
#include "attention/flash_attention.h"
#include "common/cuda_vector.cuh"

namespace pypkg {
namespace {

#if defined(PYPKG_CUDA_EMULATION) || defined(PYPKG_WITH_SM90A)
constexpr bool kHasHopperCode = true;
#else
constexpr bool kHasHopperCode = false;
#endif

void check_shape(const FlashAttentionShape& shape, std::initializer_list<const void*> tensors) {
  const auto require = [&](bool condition, const std::string& message) {
    if (!condition) {
      throw std::invalid_argument(attention_site("flash_attention", shape).text() + ": " + message);
    }
  };
  require(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= kMaxHeadDim,
          "head_dim must be a multiple of 8, at most " + std::to_string(kMaxHeadDim));
  require(shape.token_stride % 8 == 0, "token_stride must be a multiple of 8");
  require(shape.softcap >= 0 && std::isfinite(shape.softcap),
          "softcap must be 0 (none) or a positive number");
  require(shape.heads_k > 0 && shape.heads_q % shape.heads_k == 0,
          "heads_q must be a multiple of heads_k");
  constexpr int64_t kMaxSequence = 1 << 24;  // positions are exact in float32
  const int64_t q_end = shape.query_offset + shape.seq_q, k_end = shape.key_offset + shape.seq_k;
  require(shape.seq_q <= kMaxSequence && shape.seq_k <= kMaxSequence && q_end <= kMaxSequence &&
              k_end <= kMaxSequence,
          "sequences must not be longer than 2^24");
  require(!shape.mask.document_starts ||
              (shape.query_offset >= 0 && std::max(q_end, k_end) <= shape.mask.tokens),
          "document_starts must hold the positions of all queries and keys");
  require(all_aligned(tensors), "tensors must start at a multiple of 16 bytes");
}

// Whether PYPKG_FLASH_ATTENTION (auto, ampere or hopper) chooses the Hopper kernels. auto means
// ampere until a GPU has checked the Hopper kernels: they have run in the emulation only.
bool hopper_is_asked_for() {
  const char* value = std::getenv("PYPKG_FLASH_ATTENTION");
  const std::string choice = value ? value : "auto";
  if (choice == "auto" || choice == "ampere") return false;
  if (choice != "hopper") {
    throw std::invalid_argument("PYPKG_FLASH_ATTENTION must be auto, ampere or hopper, not \"" +
                                choice + "\"");
  }
  if (!kHasHopperCode) {
    throw std::invalid_argument(
        "PYPKG_FLASH_ATTENTION is hopper, but this library was built without code for sm_90a: "
        "build it with PYPKG_CUDA_ARCHITECTURES=90a-real or set auto");
  }
  if (compute_capability() != 90) {
    throw std::invalid_argument(
        "PYPKG_FLASH_ATTENTION is hopper, which needs a GPU of compute capability 9.0, not " +
        std::to_string(compute_capability() / 10) + "." +
        std::to_string(compute_capability() % 10) + "; set auto");
  }
  return true;
}

bool runs_on_hopper(const FlashAttentionShape& shape) {
  // The Hopper kernels have no float32, and a tensor map cannot describe a tensor without elements.
  const bool suits = shape.dtype != DType::kFloat32 && shape.head_dim <= kMaxHopperHeadDim &&
                     shape.seq_q > 0 && shape.seq_k > 0;
  return hopper_is_asked_for() && suits;
}

DqSumSizes dq_sum_sizes(const FlashAttentionShape& shape) {
  return runs_on_hopper(shape) ? dq_sum_sizes_sm90(shape) : dq_sum_sizes_sm80(shape);
}

constexpr int kDeltaThreads = 256;

// delta[b, h, i] = sum over d of dout[b, i, h, d] * out[b, i, h, d]; one warp per sum.
// Also clears the state of the sums of dq for the kernels that follow.
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    delta_kernel(FlashAttentionBackward p, BackwardWorkspace workspace) {
  constexpr int kSize = kVectorSize<T>;
  const FlashAttentionShape& shape = p.shape;
  const int64_t rows = shape.batch * shape.seq_q * shape.heads_q;
  const int warps = kDeltaThreads / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const OrderedSums& sums = workspace.dq_sums;
  for (int64_t i = blockIdx.x * int64_t(kDeltaThreads) + threadIdx.x;
       i < OrderedSums::num_states(sums.count); i += gridDim.x * int64_t(kDeltaThreads)) {
    sums.state[i] = 0;
  }
  for (int64_t row = blockIdx.x * int64_t(warps) + threadIdx.x / kWarpSize; row < rows;
       row += gridDim.x * int64_t(warps)) {
    float sum = 0;
#pragma unroll 1
    for (int dim = lane * kSize; dim < shape.head_dim; dim += kWarpSize * kSize) {
      const int64_t at = row * shape.head_dim + dim;
      const auto dout = Pack<T, kSize>::load(static_cast<const T*>(p.dout) + at);
      const auto out = Pack<T, kSize>::load(static_cast<const T*>(p.out) + at);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += dout[i] * out[i];
    }
    sum = warp_sum(sum);
    const int64_t head = row % shape.heads_q, token = row / shape.heads_q;
    const int64_t b = token / shape.seq_q, i = token % shape.seq_q;
    if (lane == 0) workspace.delta[(b * shape.heads_q + head) * shape.seq_q + i] = sum;
  }
}

}  // namespace

void flash_attention_forward_cuda(const FlashAttentionForward& p, Stream stream) {
  check_shape(p.shape, {p.q, p.k, p.v, p.out});
  if (p.shape.batch * p.shape.heads_q * p.shape.seq_q == 0) return;
  if (runs_on_hopper(p.shape)) return flash_attention_forward_sm90(p, stream);
  flash_attention_forward_sm80(p, stream);
}

int64_t flash_attention_backward_workspace_cuda(const FlashAttentionShape& shape) {
  return BackwardWorkspace::num_floats(shape, dq_sum_sizes(shape));
}

void flash_attention_backward_cuda(const FlashAttentionBackward& p, Stream stream) {
  const FlashAttentionShape& shape = p.shape;
  check_shape(shape, {p.dout, p.q, p.k, p.v, p.out, p.dq, p.dk, p.dv});
  const BackwardWorkspace workspace(shape, dq_sum_sizes(shape), p.workspace);
  const int64_t rows = BackwardWorkspace::num_deltas(shape);
  if (rows > 0) {
    const int64_t blocks = ceil_div<int64_t>(rows, kDeltaThreads / kWarpSize);
    dispatch_dtype(shape.dtype, [&](auto tag) {
      launch(attention_site("flash_attention_backward (delta)", shape),
             delta_kernel<typename decltype(tag)::type>,
             dim3(std::min<int64_t>(blocks, kMaxGridBlocks)), dim3(kDeltaThreads), 0, stream, p,
             workspace);
    });
  }
  if (shape.batch * shape.heads_q == 0) return;
  if (runs_on_hopper(shape)) return flash_attention_backward_sm90(p, workspace, stream);
  flash_attention_backward_sm80(p, workspace, stream);
}

}  // namespace pypkg
