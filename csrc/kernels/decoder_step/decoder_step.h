// A step of generation through all layers of a decoder, on a CPU, in float32: from the embedding of
// one new token of each row to its logits.
//
//   h += attention(rms_norm(h)), h += down(activation(gate) * up) of rms_norm(h), for each layer
//   logits = rms_norm(h) head^T
#pragma once

#include <vector>

#include "attention/cached_attention.h"
#include "gated_activation/gated_activation.h"
#include "rotary_embedding/rotary_embedding.h"

namespace pypkg {

struct DecoderStepLayer {
  const float* attention_norm = nullptr;  // [hidden]
  const float* qkv_weight = nullptr;      // [hidden, (heads_q + 2 * heads_k) * head_dim]
  const float* qkv_bias = nullptr;        // [(heads_q + 2 * heads_k) * head_dim] or null
  const float* q_norm = nullptr;          // [head_dim], rms_norm of each head; or null
  const float* k_norm = nullptr;          // [head_dim] or null
  const float* o_weight = nullptr;        // [heads_q * head_dim, hidden]
  const float* mlp_norm = nullptr;        // [hidden]
  const float* gate_up_weight = nullptr;  // [hidden, 2 * intermediate], columns gate | up
  const float* down_weight = nullptr;     // [intermediate, hidden]
  float* keys = nullptr;                  // as of CachedAttention
  float* values = nullptr;
  int64_t window = 0;
};

struct DecoderStep {
  std::vector<DecoderStepLayer> layers;
  // Sizes, position, padding and scores of every layer; the pointers to tokens are set by the step.
  CachedAttention attention;
  // Tables, position_ids [batch] and the dimensions of a head to rotate; without tables none.
  RotaryEmbedding rotary;
  const float* x = nullptr;           // [batch, hidden]
  const float* final_norm = nullptr;  // [hidden]
  const float* head = nullptr;        // [vocab, hidden]
  float* logits = nullptr;            // [batch, vocab], overwritten
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t vocab = 0;
  float epsilon = 1e-6f;
  Activation activation = Activation::kSilu;
};

// Throws std::out_of_range on a position outside the tables, before anything is written.
void decoder_step_cpu(const DecoderStep& params);

}  // namespace pypkg
