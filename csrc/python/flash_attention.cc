#include "attention/flash_attention.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "arguments.h"
#include "kernels.h"

namespace py = pybind11;
using py::arg;
using py::object;

namespace pypkg {
namespace {

// The keyword arguments that describe a mask.
struct MaskArguments {
  bool causal;
  int32_t window;
  object prefix_lengths;
  object document_starts;
  object alibi_slopes;
  // Positions of the first query and the first key; none: queries are aligned to the last keys.
  std::optional<int64_t> query_offset;
  int64_t key_offset = 0;
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
  s.query_offset = mask.query_offset.value_or(s.seq_k - s.seq_q);
  s.key_offset = mask.key_offset;
  args.check(s.key_offset >= 0 && (!mask.query_offset || s.query_offset >= 0),
             "query_offset and key_offset must be 0 or more");
  const char* tokens = mask.query_offset ? "tokens" : "seq_k";
  s.mask.document_starts =
      args.optional("document_starts", mask.document_starts, "int32", {"batch", tokens});
  s.mask.tokens = s.mask.document_starts ? args[tokens] : 0;
  s.mask.alibi_slopes = args.optional("alibi_slopes", mask.alibi_slopes, "float32", {"heads_q"});
  args.check(!s.mask.document_starts || !mask.query_offset ||
                 std::max(s.query_offset + s.seq_q, s.key_offset + s.seq_k) <= s.mask.tokens,
             "document_starts has " + std::to_string(s.mask.tokens) +
                 " tokens, fewer than the blocks reach to");
  args.check(!s.mask.document_starts || mask.query_offset || s.seq_q == s.seq_k,
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

}  // namespace

void bind_flash_attention(py::module_& m) {
  m.def(
      "flash_attention_forward",
      [](object q, object k, object v, object out, object softmax_lse, float scale, float softcap,
         bool causal, int32_t window, object prefix_lengths, object document_starts,
         object alibi_slopes, int64_t token_stride, std::optional<int64_t> query_offset,
         int64_t key_offset, std::intptr_t stream) {
        Arguments args("flash_attention_forward", stream);
        FlashAttentionForward p;
        take_forward_tensors(args, p, q, k, v, out, softmax_lse);
        p.shape = attention_shape(args, scale, softcap,
                                  {causal, window, prefix_lengths, document_starts, alibi_slopes,
                                   query_offset, key_offset},
                                  token_stride);
        args.run(p, PYPKG_KERNEL(flash_attention_forward));
      },
      "out = softmax(scores + alibi, over visible keys) v with scores = scale * q k^T, made "
      "softcap * tanh(scores / softcap) where softcap > 0. q, out: [batch, seq_q, heads_q, "
      "head_dim]; k, v: [batch, seq_k, heads_k, head_dim]; softmax_lse: float32 [batch, heads_q, "
      "seq_q]; prefix_lengths: int32 [batch]; document_starts: int32 [batch, seq_k]; alibi_slopes: "
      "float32 [heads_q]; token_stride: elements from one token of q, k and v to the next, 0: each "
      "is contiguous; query_offset, key_offset: positions of the first query and key, which the "
      "mask goes by, None: queries are aligned to the last keys. With a query_offset "
      "document_starts is [batch, tokens], of the whole sequence.",
      arg("q"), arg("k"), arg("v"), arg("out"), arg("softmax_lse"), py::kw_only(), arg("scale"),
      arg("softcap") = 0.0f, arg("causal") = true, arg("window") = 0,
      arg("prefix_lengths") = py::none(), arg("document_starts") = py::none(),
      arg("alibi_slopes") = py::none(), arg("token_stride") = 0, arg("query_offset") = py::none(),
      arg("key_offset") = 0, arg("stream") = 0);
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
         int64_t token_stride, std::optional<int64_t> query_offset, int64_t key_offset,
         std::intptr_t stream) {
        Arguments args("flash_attention_backward", stream);
        FlashAttentionBackward p;
        p.dout = args.required("dout", dout, "T", {"batch", "seq_q", "heads_q", "head_dim"});
        take_forward_tensors(args, p, q, k, v, out, softmax_lse);
        p.dq = args.required("dq", dq, "T", {"batch", "seq_q", "heads_q", "head_dim"});
        p.dk = args.required("dk", dk, "T", {"batch", "seq_k", "heads_k", "head_dim"});
        p.dv = args.required("dv", dv, "T", {"batch", "seq_k", "heads_k", "head_dim"});
        p.shape = attention_shape(args, scale, softcap,
                                  {causal, window, prefix_lengths, document_starts, alibi_slopes,
                                   query_offset, key_offset},
                                  token_stride);
        p.workspace = args.workspace(
            workspace, args.evaluate(PYPKG_KERNEL(flash_attention_backward_workspace), p.shape));
        args.run(p, PYPKG_KERNEL(flash_attention_backward));
      },
      "Gradients dq, dk, dv of flash_attention_forward, whose arguments and results these are. "
      "They have the token_stride of q, k and v.",
      arg("dout"), arg("q"), arg("k"), arg("v"), arg("out"), arg("softmax_lse"), arg("dq"),
      arg("dk"), arg("dv"), arg("workspace"), py::kw_only(), arg("scale"), arg("softcap") = 0.0f,
      arg("causal") = true, arg("window") = 0, arg("prefix_lengths") = py::none(),
      arg("document_starts") = py::none(), arg("alibi_slopes") = py::none(),
      arg("token_stride") = 0, arg("query_offset") = py::none(), arg("key_offset") = 0,
      arg("stream") = 0);
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
        return names[static_cast<int>(key_block_state(mask, 0, i_begin, i_end, j_begin, j_end))];
      },
      "Which part of the block of positions [i_begin, i_end) x [j_begin, j_end) a mask leaves "
      "visible: 'skip' (none), 'partial' or 'full'.",
      arg("i_begin"), arg("i_end"), arg("j_begin"), arg("j_end"),
      arg("document_starts") = py::none(), py::kw_only(), arg("seq_k"), arg("causal") = true,
      arg("window") = 0, arg("prefix_length") = py::none());
}

}  // namespace pypkg
