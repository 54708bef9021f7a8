// The kernels as Python functions. They allocate nothing: outputs and workspaces are arguments.
#include "kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>

#include "arguments.h"
#include "cross_entropy/cross_entropy.h"
#include "gated_activation/gated_activation.h"
#include "narrow_state/narrow_state.h"
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
         object workspace, object dh, object dresidual, object y, std::intptr_t stream) {
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
        p.y = args.optional("y", y, "T", {"rows", "cols"});
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.workspace = args.workspace(
            workspace, args.evaluate(PYPKG_KERNEL(rms_norm_backward_workspace), p.rows, p.cols));
        p.dtype = args.dtype("T");
        p.weight_dtype = args.dtype("W");
        args.run(p, PYPKG_KERNEL(rms_norm_backward));
      },
      "dx is the gradient of h (of x and residual alike), dh what arrives at residual_out. "
      "dresidual receives dx once more, and y (may be dy if dx is not) the y of the forward pass. "
      "dy, h, dx (may be dy or dh), dh, dresidual, y: [rows, cols]; "
      "weight, dweight: [cols]; rstd: [rows].",
      arg("dy"), arg("h"), arg("weight"), arg("rstd"), arg("dx"), arg("dweight"), arg("workspace"),
      arg("dh") = py::none(), arg("dresidual") = py::none(), arg("y") = py::none(), py::kw_only(),
      arg("stream") = 0);
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
         const std::string& activation, object out, std::intptr_t stream) {
        Arguments args("gated_activation_backward", stream);
        GatedActivationBackward p;
        int64_t dgate_stride, dup_stride;
        p.gate = args.strided_rows("gate", gate, "T", {"rows", "cols"}, &p.gate_stride);
        p.up = args.strided_rows("up", up, "T", {"rows", "cols"}, &p.up_stride);
        p.dout = args.required("dout", dout, "T", {"rows", "cols"});
        p.dgate = args.strided_rows("dgate", dgate, "T", {"rows", "cols"}, &dgate_stride);
        p.dup = args.strided_rows("dup", dup, "T", {"rows", "cols"}, &dup_stride);
        p.out = args.optional("out", out, "T", {"rows", "cols"});
        args.check(dgate_stride == p.gate_stride && dup_stride == p.up_stride,
                   "dgate and dup must be strided like gate and up");
        p.rows = args["rows"];
        p.cols = args["cols"];
        p.activation = parse_activation(args, activation);
        p.dtype = args.dtype("T");
        args.run(p, PYPKG_KERNEL(gated_activation_backward));
      },
      "All [rows, cols]; dgate and dup are strided like gate and up, and may be them. out (may be "
      "dout) receives the out of the forward pass.",
      arg("gate"), arg("up"), arg("dout"), arg("dgate"), arg("dup"), arg("activation") = "silu",
      arg("out") = py::none(), py::kw_only(), arg("stream") = 0);
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

using Table = py::array_t<float, py::array::c_style>;

BlockwiseState blockwise_state(Arguments& args, const object& values, const object& codes,
                               const object& largest, const Table& table, int64_t block_size,
                               bool is_signed) {
  BlockwiseState p;
  p.values = args.required("values", values, "float32", {"elements"});
  p.codes = args.required("codes", codes, "uint8", {"elements"});
  p.largest = args.required("largest", largest, "float32", {"blocks"});
  p.numel = args["elements"];
  args.check(block_size > 0 && args["blocks"] == (p.numel + block_size - 1) / block_size,
             "largest must have one element for each " + std::to_string(block_size) + " of the " +
                 std::to_string(p.numel) + " values, got " + std::to_string(args["blocks"]));
  args.check(table.size() == kCodes, "table must have 256 values");
  p.table = table.data();
  p.block_size = block_size;
  p.is_signed = is_signed;
  return p;
}

void bind_narrow_state(py::module_& m) {
  m.def(
      "quantize_blockwise",
      [](object values, object codes, object largest, const Table& table, int64_t block_size,
         bool is_signed, std::intptr_t stream) {
        Arguments args("quantize_blockwise", stream);
        const BlockwiseState p =
            blockwise_state(args, values, codes, largest, table, block_size, is_signed);
        args.run(p, PYPKG_KERNEL(quantize_blockwise));
      },
      "Overwrites codes, uint8 [elements], and largest, float32 [blocks], such that values, "
      "float32 [elements], are nearest to table[code] * largest. table: 256 ascending float32 from "
      "-1 to 1 in host memory. is_signed: codes are int8, 128 below the place in the table; if "
      "not, positive values never get the code 0.",
      arg("values"), arg("codes"), arg("largest"), arg("table"), py::kw_only(), arg("block_size"),
      arg("is_signed"), arg("stream") = 0);
  m.def(
      "dequantize_blockwise",
      [](object values, object codes, object largest, const Table& table, int64_t block_size,
         bool is_signed, std::intptr_t stream) {
        Arguments args("dequantize_blockwise", stream);
        const BlockwiseState p =
            blockwise_state(args, values, codes, largest, table, block_size, is_signed);
        args.run(p, PYPKG_KERNEL(dequantize_blockwise));
      },
      "values = table[code] * largest, with the arguments of quantize_blockwise.", arg("values"),
      arg("codes"), arg("largest"), arg("table"), py::kw_only(), arg("block_size"),
      arg("is_signed"), arg("stream") = 0);
  m.def(
      "stochastic_bfloat16",
      [](object values, object out, uint32_t key, std::intptr_t stream) {
        Arguments args("stochastic_bfloat16", stream);
        StochasticBFloat16 p;
        p.values = args.required("values", values, "float32", {"elements"});
        p.out = args.required("out", out, "bfloat16", {"elements"});
        p.numel = args["elements"];
        p.key = key;
        args.run(p, PYPKG_KERNEL(stochastic_bfloat16));
      },
      "Rounds values, float32 [elements], up or down at random to out, bfloat16. The random bits "
      "depend on key and the place alone.",
      arg("values"), arg("out"), py::kw_only(), arg("key"), arg("stream") = 0);
}

}  // namespace

void bind_kernels(py::module_& m) {
  bind_rms_norm(m);
  bind_rotary_embedding(m);
  bind_gated_activation(m);
  bind_cross_entropy(m);
  bind_narrow_state(m);
  bind_flash_attention(m);
  bind_adamw(m);
  bind_random_normal(m);
  bind_squared_l2_norm(m);
}

}  // namespace pypkg
