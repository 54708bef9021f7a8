// A step of generation through all layers of a decoder: on a CPU, in float32, without a gradient.
// Keys and values are inputs that are written to.
#include "decoder_step/decoder_step.h"
#include "tensors.h"

namespace pypkg {
namespace {

using paddle::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = paddle::optional<Tensors>;

// The values of a tensor of the given shape.
float* checked(const char* name, const Tensor& tensor, const Shape& shape) {
  const std::string full = std::string("decoder_step: ") + name;
  check_shape(full.c_str(), tensor, shape);
  check_dtype(full.c_str(), tensor, paddle::DataType::FLOAT32);
  if (!tensor.is_cpu()) reject(full, " must be on the CPU, got ", tensor.place());
  return const_cast<float*>(tensor.data<float>());
}

// The same of layer i, null where the layers have none.
float* checked(const char* name, const OptionalTensors& tensors, size_t i, const Shape& shape) {
  if (!tensors) return nullptr;
  if (i >= tensors->size()) reject("decoder_step: ", name, " must be given for all layers");
  return checked(name, (*tensors)[i], shape);
}

const int64_t* checked_rows(const char* name, const Tensor& tensor, int64_t rows) {
  const std::string full = std::string("decoder_step: ") + name;
  if (tensor.numel() != rows) reject(full, " must hold ", rows, " numbers, got ", tensor.numel());
  check_dtype(full.c_str(), tensor, paddle::DataType::INT64);
  if (!tensor.is_cpu()) reject(full, " must be on the CPU, got ", tensor.place());
  return tensor.data<int64_t>();
}

// Sizes of the model, from the tensors of the first layer.
void set_sizes(DecoderStep& p, const Tensor& x, const Tensor& gate_up, const Tensor& o_weight,
               const Tensor& keys, const Tensor& head) {
  check_rank("decoder_step: keys", keys, 4);
  for (const Tensor* each : {&gate_up, &o_weight, &head}) {
    check_rank("decoder_step: weights", *each, 2);
  }
  const Shape kept = keys.shape();
  p.attention.batch = kept[0];
  p.attention.heads_k = kept[1];
  p.attention.capacity = kept[2];
  p.attention.head_dim = kept[3];
  p.attention.heads_q = kept[3] > 0 ? o_weight.shape()[0] / kept[3] : 0;
  p.hidden = x.shape().back();
  p.intermediate = gate_up.shape()[1] / 2;
  p.vocab = head.shape()[0];
  const CachedAttention& a = p.attention;
  if (a.heads_q < 1 || a.heads_k < 1 || a.heads_q % a.heads_k != 0 || a.position < 0 ||
      a.position >= a.capacity) {
    reject("decoder_step: ", a.heads_q, " query heads and position ", a.position,
           " do not fit keys of shape ", to_string(kept));
  }
}

void set_rotation(DecoderStep& p, const OptionalTensor& cos, const OptionalTensor& sin,
                  const OptionalTensor& position_ids, bool interleaved) {
  if (!cos) return;
  if (!sin || !position_ids) reject("decoder_step: cos is given without sin or position_ids");
  check_rank("decoder_step: cos", *cos, 2);
  const Shape shape = cos->shape();
  p.rotary.cos = checked("cos", *cos, shape);
  p.rotary.sin = checked("sin", *sin, shape);
  p.rotary.position_ids = checked_rows("position_ids", *position_ids, p.attention.batch);
  p.rotary.num_positions = shape[0];
  p.rotary.rotary_dim = 2 * shape[1];
  p.rotary.interleaved = interleaved;
  if (p.rotary.rotary_dim > p.attention.head_dim) {
    reject("decoder_step: ", p.rotary.rotary_dim, " dimensions are to be rotated, but head_dim is ",
           p.attention.head_dim);
  }
}

// The tensors of the layers, of each kind one for every layer.
struct LayerTensors {
  const Tensors& attention_norms;
  const Tensors& qkv_weights;
  const OptionalTensors& qkv_biases;
  const OptionalTensors& q_norms;
  const OptionalTensors& k_norms;
  const Tensors& o_weights;
  const Tensors& mlp_norms;
  const Tensors& gate_up_weights;
  const Tensors& down_weights;
  const Tensors& keys;
  const Tensors& values;
  const std::vector<int64_t>& windows;

  void check_count() const {
    for (const Tensors* each : {&attention_norms, &qkv_weights, &o_weights, &mlp_norms,
                                &gate_up_weights, &down_weights, &keys, &values}) {
      if (each->empty() || each->size() != windows.size()) {
        reject("decoder_step: ", each->size(), " tensors for ", windows.size(), " layers");
      }
    }
  }

  DecoderStepLayer layer(size_t i, const DecoderStep& p) const {
    const CachedAttention& sizes = p.attention;
    const int64_t hidden = p.hidden, attended = sizes.heads_q * sizes.head_dim;
    const int64_t width = (sizes.heads_q + 2 * sizes.heads_k) * sizes.head_dim;
    DecoderStepLayer layer;
    layer.attention_norm = checked("norm", attention_norms[i], {hidden});
    layer.qkv_weight = checked("qkv_weight", qkv_weights[i], {hidden, width});
    layer.qkv_bias = checked("qkv_bias", qkv_biases, i, {width});
    layer.q_norm = checked("q_norm", q_norms, i, {sizes.head_dim});
    layer.k_norm = checked("k_norm", k_norms, i, {sizes.head_dim});
    layer.o_weight = checked("o_weight", o_weights[i], {attended, hidden});
    layer.mlp_norm = checked("norm", mlp_norms[i], {hidden});
    const Shape gate_up = {hidden, 2 * p.intermediate};
    layer.gate_up_weight = checked("gate_up_weight", gate_up_weights[i], gate_up);
    layer.down_weight = checked("down_weight", down_weights[i], {p.intermediate, hidden});
    layer.keys = checked("keys", keys[i], keys[0].shape());
    layer.values = checked("values", values[i], keys[0].shape());
    layer.window = windows[i];
    return layer;
  }
};

std::vector<Tensor> step(const Tensor& x, const Tensors& attention_norms,
                         const Tensors& qkv_weights, const OptionalTensors& qkv_biases,
                         const OptionalTensors& q_norms, const OptionalTensors& k_norms,
                         const Tensors& o_weights, const Tensors& mlp_norms,
                         const Tensors& gate_up_weights, const Tensors& down_weights,
                         const Tensors& keys, const Tensors& values, const Tensor& final_norm,
                         const Tensor& head, const OptionalTensor& cos, const OptionalTensor& sin,
                         const OptionalTensor& position_ids, const OptionalTensor& first_keys,
                         const OptionalTensor& alibi_slopes, const std::vector<int64_t>& windows,
                         int64_t position, bool interleaved, float scale, float softcap,
                         float epsilon, int64_t activation) {
  const LayerTensors tensors{attention_norms, qkv_weights, qkv_biases, q_norms,
                             k_norms,         o_weights,   mlp_norms,  gate_up_weights,
                             down_weights,    keys,        values,     windows};
  tensors.check_count();
  if (activation < 0 || activation > 2) {
    reject("decoder_step: activation must be from 0 to 2, got ", activation);
  }
  DecoderStep p;
  p.attention.position = position;
  p.attention.scale = scale;
  p.attention.softcap = softcap;
  p.epsilon = epsilon;
  p.activation = static_cast<Activation>(activation);
  set_sizes(p, x, gate_up_weights[0], o_weights[0], keys[0], head);
  set_rotation(p, cos, sin, position_ids, interleaved);
  for (size_t i = 0; i < windows.size(); ++i) p.layers.push_back(tensors.layer(i, p));
  const int64_t batch = p.attention.batch;
  p.x = checked("x", x, {batch, 1, p.hidden});
  p.final_norm = checked("norm", final_norm, {p.hidden});
  p.head = checked("head", head, {p.vocab, p.hidden});
  if (first_keys) p.attention.first_keys = checked_rows("first_keys", *first_keys, batch);
  if (alibi_slopes) {
    p.attention.alibi_slopes = checked("alibi_slopes", *alibi_slopes, {p.attention.heads_q});
  }
  Tensor logits = empty({batch, p.vocab}, paddle::DataType::FLOAT32, x);
  p.logits = logits.data<float>();
  launch(x, decoder_step_cpu, nullptr, p);
  return {logits};
}

}  // namespace
}  // namespace pypkg

PD_BUILD_OP(pypkg_decoder_step)
    .Inputs({"X", paddle::Vec("AttentionNorms"), paddle::Vec("QkvWeights"),
             paddle::Optional(paddle::Vec("QkvBiases")), paddle::Optional(paddle::Vec("QNorms")),
             paddle::Optional(paddle::Vec("KNorms")), paddle::Vec("OWeights"),
             paddle::Vec("MlpNorms"), paddle::Vec("GateUpWeights"), paddle::Vec("DownWeights"),
             paddle::Vec("Keys"), paddle::Vec("Values"), "FinalNorm", "Head",
             paddle::Optional("Cos"), paddle::Optional("Sin"), paddle::Optional("PositionIds"),
             paddle::Optional("FirstKeys"), paddle::Optional("AlibiSlopes")})
    .Outputs({"Logits"})
    .Attrs({"windows: std::vector<int64_t>", "position: int64_t", "interleaved: bool",
            "scale: float", "softcap: float", "epsilon: float", "activation: int64_t"})
    .SetKernelFn(PD_KERNEL(pypkg::step));
