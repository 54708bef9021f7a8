// Under the emulation device memory is host memory, and the CPU names run the CUDA kernels: the
// Python module links against this file in place of the CPU kernels.
#include "adamw/adamw.h"
#include "attention/flash_attention.h"
#include "cross_entropy/cross_entropy.h"
#include "gated_activation/gated_activation.h"
#include "narrow_state/narrow_state.h"
#include "random_normal/random_normal.h"
#include "rms_norm/rms_norm.h"
#include "rotary_embedding/rotary_embedding.h"

namespace pypkg {

void set_num_threads(int) {}
int num_threads() { return 1; }

void adamw_cpu(const AdamW& p) { adamw_cuda(p, nullptr); }
void rms_norm_forward_cpu(const RmsNormForward& p) { rms_norm_forward_cuda(p, nullptr); }
void rms_norm_backward_cpu(const RmsNormBackward& p) { rms_norm_backward_cuda(p, nullptr); }
void random_normal_cpu(const RandomNormal& p) { random_normal_cuda(p, nullptr); }
void quantize_blockwise_cpu(const BlockwiseState& p) { quantize_blockwise_cuda(p, nullptr); }
void dequantize_blockwise_cpu(const BlockwiseState& p) { dequantize_blockwise_cuda(p, nullptr); }
void stochastic_bfloat16_cpu(const StochasticBFloat16& p) { stochastic_bfloat16_cuda(p, nullptr); }
int64_t rms_norm_backward_workspace_cpu(int64_t rows, int64_t cols) {
  return rms_norm_backward_workspace_cuda(rows, cols);
}
void rotary_embedding_cpu(const RotaryEmbedding& p) { rotary_embedding_cuda(p, nullptr); }
void gated_activation_forward_cpu(const GatedActivationForward& p) {
  gated_activation_forward_cuda(p, nullptr);
}
void gated_activation_backward_cpu(const GatedActivationBackward& p) {
  gated_activation_backward_cuda(p, nullptr);
}
void cross_entropy_forward_cpu(const CrossEntropyForward& p) {
  cross_entropy_forward_cuda(p, nullptr);
}
void cross_entropy_backward_cpu(const CrossEntropyBackward& p) {
  cross_entropy_backward_cuda(p, nullptr);
}
void flash_attention_forward_cpu(const FlashAttentionForward& p) {
  flash_attention_forward_cuda(p, nullptr);
}
void flash_attention_backward_cpu(const FlashAttentionBackward& p) {
  flash_attention_backward_cuda(p, nullptr);
}
int64_t flash_attention_backward_workspace_cpu(const FlashAttentionShape& shape) {
  return flash_attention_backward_workspace_cuda(shape);
}

}  // namespace pypkg
