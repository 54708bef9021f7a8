// The kernels as Python functions. They allocate nothing: outputs and workspaces are arguments.
#include "kernels.h"

#include <pybind11/stl.h>

#include <cmath>
#include <map>
#include <optional>

#include "arguments.h"
#include "attention/flash_attention.h"
#include "cross_entropy/cross_entropy.h"
#include "gated_activation/gated_activation.h"
#include "rms_norm/rms_norm.h"
#include "rotary_embedding/rotary_embedding.h"

namespace py = pybind11;
using py::arg;
using py::object;

namespace pypkg {
namespace {

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm_forward",
      [](object x, object weight, object y, object rstd, object residual, object residual_out,
         float epsilon, std::intptr_t stream) {
        Arguments args("rms_norm_forward", stream);
        RmsNormForward p;
        p.x = args.required("x", x, "T", {"rows", "cols"});
        p.weight = args.required("weight", weight, "W", {"cols"});
        p.y = args.required("y", y, "T", {"rows", "cols"});
        p.rstd = args.required("rstd", rstd, "float32", {"rows"});
        p.residual = args.optional("residual", residual, "T", {"rows", "cols"});
        p.residual_out = args.optional("residual_out", residual_out, "T", {"rows", "cols"});
        args.check(!p.residual == !p.residual_out, "residual and residual_out go together");
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.epsilon = epsilon;
        p.dtype = args.dtype("T");
        p.weight_dtype = args.dtype("W");
        args.run(p, PYPKG_KERNEL(rms_norm_forward));
      },
      "y = h * rstd * weight with h = x + residual, rstd = 1 / sqrt(mean(h^2) + epsilon). "
      "x, y, residual, residual_out (receives h): [rows, cols]; weight: [cols]; rstd: [rows].",
      arg("x"), arg("weight"), arg("y"), arg("rstd"), arg("residual") = py::none(),
      arg("residual_out") = py::none(), py::kw_only(), arg("epsilon") = 1e-6f, arg("stream") = 0);
  m.def(
      "rms_norm_backward_workspace",
      [](object h) {
        Arguments args("rms_norm_backward_workspace", 0);
        args.required("h", h, "T", {"rows", "cols"});
        return args.evaluate(PYPKG_KERNEL(rms_norm_backward_workspace), args["rows"], args["cols"]);
      },
      "Floats of workspace that rms_norm_backward needs for h: [rows, cols].", arg("h"));
  m.def(
      "rms_norm_backward",
      [](object dy, object h, object weight, object rstd, object dx, object dweight,
         object workspace, object dh, object dresidual, std::intptr_t stream) {
        Arguments args("rms_norm_backward", stream);
        RmsNormBackward p;
        p.dy = args.required("dy", dy, "T", {"rows", "cols"});
        p.h = args.required("h", h, "T", {"rows", "cols"});
        p.weight = args.required("weight", weight, "W", {"cols"});
        p.rstd = args.required("rstd", rstd, "float32", {"rows"});
        p.dx = args.required("dx", dx, "T", {"rows", "cols"});
        p.dweight = args.required("dweight", dweight, "W", {"cols"});
        p.dh = args.optional("dh", dh, "T", {"rows", "cols"});
        p.dresidual = args.optional("dresidual", dresidual, "T", {"rows", "cols"});
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.workspace = args.workspace(
            workspace, args.evaluate(PYPKG_KERNEL(rms_norm_backward_workspace), p.rows, p.cols));
        p.dtype = args.dtype("T");
        p.weight_dtype = args.dtype("W");
        args.run(p, PYPKG_KERNEL(rms_norm_backward));
      },
      "dx is the gradient of h (of x and residual alike), dh what arrives at residual_out. "
      "dresidual receives dx once more. dy, h, dx (may be dy or dh), dh, dresidual: [rows, cols]; "
      "weight, dweight: [cols]; rstd: [rows].",
      arg("dy"), arg("h"), arg("weight"), arg("rstd"), arg("dx"), arg("dweight"), arg("workspace"),
      arg("dh") = py::none(), arg("dresidual") = py::none(), py::kw_only(), arg("stream") = 0);
}

void bind_rotary_embedding(py::module_& m) {
  m.def(
      "rotary_embedding",
      [](object q, object k, object cos, object sin, object q_out, object k_out,
         object position_ids, int64_t rotary_offset, bool interleaved, bool inverse,
         int64_t q_stride, std::intptr_t stream) {
        Arguments args("rotary_embedding", stream);
        RotaryEmbedding p;
        p.q = args.required("q", q, "T", {"batch", "sequence", "q_heads", "head_dim"});
        p.k = args.optional("k", k, "T", {"batch", "sequence", "k_heads", "head_dim"});
        p.cos = args.required("cos", cos, "float32", {"num_positions", "rotary_dim / 2"});
        p.sin = args.required("sin", sin, "float32", {"num_positions", "rotary_dim / 2"});
        p.q_out = args.required("q_out", q_out, "T", {"batch", "sequence", "q_heads", "head_dim"});
        p.k_out = args.optional("k_out", k_out, "T", {"batch", "sequence", "k_heads", "head_dim"});
        args.check(!p.k == !p.k_out, "k and k_out go together");
        p.position_ids =
            args.optional("position_ids", position_ids, "int64", {"batch", "sequence"});
        p.batch = args["batch"];
        p.sequence = args["sequence"];
        p.q_heads = args["q_heads"];
        p.k_heads = p.k ? args["k_heads"] : 0;
        p.head_dim = args["head_dim"];
        p.num_positions = args["num_positions"];
        args.check(q_stride == 0 || q_stride >= p.q_heads * p.head_dim,
                   "q_stride " + std::to_string(q_stride) + " must be 0 or a token of q at least");
        p.q_stride = q_stride;
        p.rotary_dim = 2 * args["rotary_dim / 2"];
        p.rotary_offset = rotary_offset;
        args.check(rotary_offset >= 0 && rotary_offset + p.rotary_dim <= p.head_dim,
                   "rotary_offset " + std::to_string(rotary_offset) + " + rotary_dim " +
                       std::to_string(p.rotary_dim) + " must lie within head_dim " +
                       std::to_string(p.head_dim));
        p.interleaved = interleaved;
        p.inverse = inverse;
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(rotary_embedding));
      },
      "Rotates q and k (or None): [batch, sequence, heads, head_dim]. cos, sin: float32 "
      "[num_positions, rotary_dim / 2]; position_ids: int64 [batch, sequence]. inverse=True gives "
      "the gradient. Outputs may be the inputs. q_stride: elements from one token of q and q_out "
      "to the next; 0: contiguous.",
      arg("q"), arg("k"), arg("cos"), arg("sin"), arg("q_out"), arg("k_out"),
      arg("position_ids") = py::none(), py::kw_only(), arg("rotary_offset") = 0,
      arg("interleaved") = false, arg("inverse") = false, arg("q_stride") = 0, arg("stream") = 0);
}

Activation parse_activation(const Arguments& args, const std::string& name) {
  static const std::map<std::string, Activation> known = {{"silu", Activation::kSilu},
                                                          {"gelu", Activation::kGeluErf},
                                                          {"gelu_tanh", Activation::kGeluTanh}};
  args.check(known.count(name), "activation must be silu, gelu or gelu_tanh, got " + name);
  return known.at(name);
}

void bind_gated_activation(py::module_& m) {
  m.def(
      "gated_activation_forward",
      [](object gate, object up, object out, const std::string& activation, std::intptr_t stream) {
        Arguments args("gated_activation_forward", stream);
        GatedActivationForward p;
        p.gate = args.strided_rows("gate", gate, "T", {"rows", "cols"}, &p.gate_stride);
        p.up = args.strided_rows("up", up, "T", {"rows", "cols"}, &p.up_stride);
        p.out = args.required("out", out, "T", {"rows", "cols"});
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.activation = parse_activation(args, activation);
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(gated_activation_forward));
      },
      "out = activation(gate) * up, all [rows, cols]; rows of gate and up may be strided.",
      arg("gate"), arg("up"), arg("out"), arg("activation") = "silu", py::kw_only(),
      arg("stream") = 0);
  m.def(
      "gated_activation_backward",
      [](object gate, object up, object dout, object dgate, object dup,
         const std::string& activation, std::intptr_t stream) {
        Arguments args("gated_activation_backward", stream);
        GatedActivationBackward p;
        int64_t dgate_stride, dup_stride;
        p.gate = args.strided_rows("gate", gate, "T", {"rows", "cols"}, &p.gate_stride);
        p.up = args.strided_rows("up", up, "T", {"rows", "cols"}, &p.up_stride);
        p.dout = args.required("dout", dout, "T", {"rows", "cols"});
        p.dgate = args.strided_rows("dgate", dgate, "T", {"rows", "cols"}, &dgate_stride);
        p.dup = args.strided_rows("dup", dup, "T", {"rows", "cols"}, &dup_stride);
        args.check(dgate_stride == p.gate_stride && dup_stride == p.up_stride,
                   "dgate and dup must be strided like gate and up");
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.activation = parse_activation(args, activation);
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(gated_activation_backward));
      },
      "All [rows, cols]; dgate and dup are strided like gate and up, and may be them.", arg("gate"),
      arg("up"), arg("dout"), arg("dgate"), arg("dup"), arg("activation") = "silu", py::kw_only(),
      arg("stream") = 0);
}

void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy_forward",
      [](object logits, object labels, object loss, object lse, object row_max, object row_sum,
         object target, int64_t vocab_start, int64_t vocab_size, int64_t ignore_index,
         std::intptr_t stream) {
        Arguments args("cross_entropy_forward", stream);
        CrossEntropyForward p;
        p.logits = args.required("logits", logits, "T", {"rows", "cols"});
        p.labels = args.required("labels", labels, "int64", {"rows"});
        p.loss = args.optional("loss", loss, "float32", {"rows"});
        p.lse = args.optional("lse", lse, "float32", {"rows"});
        p.row_max = args.optional("row_max", row_max, "float32", {"rows"});
        p.row_sum = args.optional("row_sum", row_sum, "float32", {"rows"});
        p.target = args.optional("target", target, "float32", {"rows"});
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.vocab_start = vocab_start;
        p.vocab_size = vocab_size > 0 ? vocab_size : vocab_start + p.cols;
        p.ignore_index = ignore_index;
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(cross_entropy_forward));
      },
      "logits: [rows, cols], columns vocab_start... of a vocabulary of vocab_size (default: all of "
      "it); labels: int64 [rows]. Each float32 [rows] output may be None.",
      arg("logits"), arg("labels"), arg("loss") = py::none(), arg("lse") = py::none(),
      arg("row_max") = py::none(), arg("row_sum") = py::none(), arg("target") = py::none(),
      py::kw_only(), arg("vocab_start") = 0, arg("vocab_size") = 0, arg("ignore_index") = -100,
      arg("stream") = 0);
  m.def(
      "cross_entropy_backward",
      [](object logits, object labels, object lse, object dloss, object dlogits,
         int64_t vocab_start, int64_t ignore_index, std::intptr_t stream) {
        Arguments args("cross_entropy_backward", stream);
        CrossEntropyBackward p;
        p.logits = args.required("logits", logits, "T", {"rows", "cols"});
        p.labels = args.required("labels", labels, "int64", {"rows"});
        p.lse = args.required("lse", lse, "float32", {"rows"});
        p.dloss = args.required("dloss", dloss, "float32", {"rows"});
        p.dlogits = args.required("dlogits", dlogits, "T", {"rows", "cols"});
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.vocab_start = vocab_start;
        p.ignore_index = ignore_index;
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(cross_entropy_backward));
      },
      "dlogits (may be logits) = (exp(logits - lse) - onehot(labels)) * dloss, 0 for ignored rows.",
      arg("logits"), arg("labels"), arg("lse"), arg("dloss"), arg("dlogits"), py::kw_only(),
      arg("vocab_start") = 0, arg("ignore_index") = -100, arg("stream") = 0);
}

// The keyword arguments that describe a mask.
struct MaskArguments {
  bool causal;
  int32_t window;
  object prefix_lengths;
  object document_starts;
  object alibi_slopes;
};

FlashAttentionShape attention_shape(Arguments& args, float scale, float softcap,
                                    const MaskArguments& mask, int64_t token_stride = 0) {
  FlashAttentionShape s;
  s.batch = args["batch"];
  s.seq_q = args["seq_q"];
  s.seq_k = args["seq_k"];
  s.heads_q = args["heads_q"];
  s.heads_k = args["heads_k"];
  s.head_dim = args["head_dim"];
  s.token_stride = token_stride;
  s.scale = scale;
  s.softcap = softcap;
  s.dtype = args.dtype("T");
  args.check(
      token_stride == 0 || token_stride >= s.heads_q * s.head_dim,
      "token_stride " + std::to_string(token_stride) + " must be 0 or a token of q at least");
  args.check(s.heads_k > 0 && s.heads_q % s.heads_k == 0, "heads_q " + std::to_string(s.heads_q) +
                                                              " must be a multiple of heads_k " +
                                                              std::to_string(s.heads_k));
  args.check(softcap >= 0 && std::isfinite(softcap),
             "softcap must be 0 (none) or a positive number, got " + std::to_string(softcap));
  args.check(mask.window >= 0,
             "window must be 0 (none) or positive, got " + std::to_string(mask.window));
  s.mask.causal = mask.causal;
  s.mask.window = mask.window;
  s.mask.prefix_lengths = args.optional("prefix_lengths", mask.prefix_lengths, "int32", {"batch"});
  s.mask.document_starts =
      args.optional("document_starts", mask.document_starts, "int32", {"batch", "seq_k"});
  s.mask.alibi_slopes = args.optional("alibi_slopes", mask.alibi_slopes, "float32", {"heads_q"});
  args.check(!s.mask.document_starts || s.seq_q == s.seq_k,
             "document_starts needs as many queries as keys, got " + std::to_string(s.seq_q) +
                 " and " + std::to_string(s.seq_k));
  return s;
}

// The tensors of the forward pass, which the backward pass reads again.
template <typename Params>
void take_forward_tensors(Arguments& args, Params& p, const object& q, const object& k,
                          const object& v, const object& out, const object& softmax_lse) {
  p.q = args.required("q", q, "T", {"batch", "seq_q", "heads_q", "head_dim"});
  p.k = args.required("k", k, "T", {"batch", "seq_k", "heads_k", "head_dim"});
  p.v = args.required("v", v, "T", {"batch", "seq_k", "heads_k", "head_dim"});
  p.out = args.required("out", out, "T", {"batch", "seq_q", "heads_q", "head_dim"});
  p.softmax_lse =
      args.required("softmax_lse", softmax_lse, "float32", {"batch", "heads_q", "seq_q"});
}

void bind_flash_attention(py::module_& m) {
  m.def(
      "flash_attention_forward",
      [](object q, object k, object v, object out, object softmax_lse, float scale, float softcap,
         bool causal, int32_t window, object prefix_lengths, object document_starts,
         object alibi_slopes, int64_t token_stride, std::intptr_t stream) {
        Arguments args("flash_attention_forward", stream);
        FlashAttentionForward p;
        take_forward_tensors(args, p, q, k, v, out, softmax_lse);
        p.shape = attention_shape(args, scale, softcap,
                                  {causal, window, prefix_lengths, document_starts, alibi_slopes},
                                  token_stride);
        args.run(p, PYPKG_KERNEL(flash_attention_forward));
      },
      "out = softmax(scores + alibi, over visible keys) v with scores = scale * q k^T, made "
      "softcap * tanh(scores / softcap) where softcap > 0. q, out: [batch, seq_q, heads_q, "
      "head_dim]; k, v: [batch, seq_k, heads_k, head_dim]; softmax_lse: float32 [batch, heads_q, "
      "seq_q]; prefix_lengths: int32 [batch]; document_starts: int32 [batch, seq_k]; alibi_slopes: "
      "float32 [heads_q]; token_stride: elements from one token of q, k and v to the next, 0: each "
      "is contiguous.",
      arg("q"), arg("k"), arg("v"), arg("out"), arg("softmax_lse"), py::kw_only(), arg("scale"),
      arg("softcap") = 0.0f, arg("causal") = true, arg("window") = 0,
      arg("prefix_lengths") = py::none(), arg("document_starts") = py::none(),
      arg("alibi_slopes") = py::none(), arg("token_stride") = 0, arg("stream") = 0);
  m.def(
      "flash_attention_backward_workspace",
      [](object q, object k) {
        Arguments args("flash_attention_backward_workspace", 0);
        args.required("q", q, "T", {"batch", "seq_q", "heads_q", "head_dim"});
        args.required("k", k, "T", {"batch", "seq_k", "heads_k", "head_dim"});
        return args.evaluate(
            PYPKG_KERNEL(flash_attention_backward_workspace),
            attention_shape(args, 1.0f, 0.0f, {true, 0, py::none(), py::none(), py::none()}));
      },
      "Floats of workspace that flash_attention_backward needs.", arg("q"), arg("k"));
  m.def(
      "flash_attention_backward",
      [](object dout, object q, object k, object v, object out, object softmax_lse, object dq,
         object dk, object dv, object workspace, float scale, float softcap, bool causal,
         int32_t window, object prefix_lengths, object document_starts, object alibi_slopes,
         int64_t token_stride, std::intptr_t stream) {
        Arguments args("flash_attention_backward", stream);
        FlashAttentionBackward p;
        p.dout = args.required("dout", dout, "T", {"batch", "seq_q", "heads_q", "head_dim"});
        take_forward_tensors(args, p, q, k, v, out, softmax_lse);
        p.dq = args.required("dq", dq, "T", {"batch", "seq_q", "heads_q", "head_dim"});
        p.dk = args.required("dk", dk, "T", {"batch", "seq_k", "heads_k", "head_dim"});
        p.dv = args.required("dv", dv, "T", {"batch", "seq_k", "heads_k", "head_dim"});
        p.shape = attention_shape(args, scale, softcap,
                                  {causal, window, prefix_lengths, document_starts, alibi_slopes},
                                  token_stride);
        p.workspace = args.workspace(
            workspace, args.evaluate(PYPKG_KERNEL(flash_attention_backward_workspace), p.shape));
        args.run(p, PYPKG_KERNEL(flash_attention_backward));
      },
      "Gradients dq, dk, dv of flash_attention_forward, whose arguments and results these are. "
      "They "
      "have the token_stride of q, k and v.",
      arg("dout"), arg("q"), arg("k"), arg("v"), arg("out"), arg("softmax_lse"), arg("dq"),
      arg("dk"), arg("dv"), arg("workspace"), py::kw_only(), arg("scale"), arg("softcap") = 0.0f,
      arg("causal") = true, arg("window") = 0, arg("prefix_lengths") = py::none(),
      arg("document_starts") = py::none(), arg("alibi_slopes") = py::none(),
      arg("token_stride") = 0, arg("stream") = 0);
  m.def(
      "key_block_state",
      [](int64_t i_begin, int64_t i_end, int64_t j_begin, int64_t j_end, object document_starts,
         int64_t seq_k, bool causal, int32_t window, std::optional<int32_t> prefix_length) {
        Arguments args("key_block_state", 0);
        AttentionMask mask;
        mask.causal = causal;
        mask.window = window;
        mask.prefix_lengths = prefix_length ? &*prefix_length : nullptr;
        mask.document_starts = args.optional("document_starts", document_starts, "int32", {seq_k});
        args.check(i_begin < i_end && i_end <= seq_k && 0 <= j_begin && j_begin < j_end &&
                       j_end <= seq_k && (!mask.document_starts || i_begin >= 0),
                   "both ranges must be non-empty and lie inside the sequence");
        static const char* const names[] = {"skip", "partial", "full"};
        return names[static_cast<int>(
            key_block_state(mask, 0, i_begin, i_end, j_begin, j_end, seq_k))];
      },
      "Which part of the block of positions [i_begin, i_end) x [j_begin, j_end) a mask leaves "
      "visible: 'skip' (none), 'partial' or 'full'.",
      arg("i_begin"), arg("i_end"), arg("j_begin"), arg("j_end"),
      arg("document_starts") = py::none(), py::kw_only(), arg("seq_k"), arg("causal") = true,
      arg("window") = 0, arg("prefix_length") = py::none());
}

}  // namespace

void bind_kernels(py::module_& m) {
  bind_rms_norm(m);
  bind_rotary_embedding(m);
  bind_gated_activation(m);
  bind_cross_entropy(m);
  bind_flash_attention(m);
  bind_adamw(m);
  bind_random_normal(m);
  bind_squared_l2_norm(m);
}

}  // namespace pypkg
