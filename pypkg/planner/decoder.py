"""The decoder in shapes: the counterpart of models/decoder.py, models/layers and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.planner.operators import GRADIENTS, LOGITS, Operators
from pypkg.planner.parameters import parameters
from pypkg.planner.tape import Parameter, Tensor

WEIGHTS, TABLES = "weights", "tables"
LOSS_CHUNK_BYTES = 256 * 2**20  # ops/linear_cross_entropy.py


@dataclass(frozen=True)
class Batch:
    """A micro batch.

    Attributes:
        rows, sequence: its shape in tokens.
    """

    rows: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence


def attention_workspace(config: ModelConfig, batch: Batch) -> int:
    """Floats that the backward pass of attention takes on a CPU (flash_attention_backward_cpu.cc)."""
    queries, keys, lanes = 96, 96, 16
    blocks = -(-batch.sequence // queries)
    chunks = max(
        1, min(-(-16 // (batch.rows * config.num_key_value_heads)), 4, -(-batch.sequence // keys))
    )
    padded = -(-config.head_dim // lanes) * lanes
    return chunks * batch.rows * config.num_attention_heads * blocks * queries * padded


class Decoder:
    """A model chunk of one rank; its parameters are allocated on ``ops.tape``."""

    def __init__(self, ops: Operators, config: ModelConfig, chunk: ModelChunk) -> None:
        self.ops, self.config, self.chunk = ops, config, chunk
        self.parameters = {
            each.name: Parameter(ops.tape, each.size * ops.dtype_bytes, WEIGHTS)
            for each in parameters(config, chunk)
        }
        self.layers = [_Layer(self, number) for number in chunk.layers]

    def loss(self, batch: Batch) -> Tensor:
        """The counterpart of ``Decoder.loss``."""
        return self._loss_of(self._run(batch), batch)

    def norm(
        self, name: str, x: Tensor, residual: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and x + residual."""
        ops, weight = self.ops, self.parameters[f"{name}.weight"]
        if self.config.norm == "layer_norm":
            if residual is not None:
                x = ops.add(x, residual)
            return ops.layer_norm(x, weight, self.parameters[f"{name}.bias"], rows), x
        if residual is None:
            return ops.rms_norm(x, weight, rows), x
        return ops.add_rms_norm(x, residual, weight, rows)

    def linear(self, name: str, x: Tensor, outputs: int) -> Tensor:
        """A linear layer with ``outputs`` output elements."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        return self.ops.linear(x, weight, bias, outputs)

    def _run(self, batch: Batch) -> Tensor:
        x, residual = self._embed(batch), None
        for layer in self.layers:
            x, residual = layer(x, residual, batch)
        if self.config.final_norm:
            x = self.norm("norm", x, residual, batch.tokens)[0]
        elif residual is not None:
            x = self.ops.add(x, residual)
        if self.config.embedding_size != self.config.hidden_size:
            x = self.linear("project_out", x, batch.tokens * self.config.embedding_size)
        return x

    def _embed(self, batch: Batch) -> Tensor:
        config, ops = self.config, self.ops
        x = ops.embedding(
            self.parameters["embed_tokens.weight"], batch.tokens * config.embedding_size
        )
        if config.embedding_gradient_scale != 1.0:
            scaled = ops.scale(x)
            x = ops.add(scaled, ops.scale(x.detach()))
            del scaled
        if config.embedding_size != config.hidden_size:
            x = self.linear("project_in", x, batch.tokens * config.hidden_size)
        if config.position_embedding == "learned":
            table = self.parameters["embed_positions.weight"]
            x = ops.add_rows(x, ops.rows_of(table, batch.sequence * config.hidden_size))
        return x if not config.embedding_norm else self.norm("embed_norm", x, None, batch.tokens)[0]

    def _loss_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        table = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        weight: Tensor = self.parameters[f"{table}.weight"]
        if self.config.norm_head:
            weight = self.ops.normalized(weight, self.config.vocab_size)
        return self._cross_entropy(hidden, weight, batch)

    def _cross_entropy(self, hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        ops, vocabulary = self.ops, self.config.vocab_size
        tokens = batch.tokens
        rows = max(1, LOSS_CHUNK_BYTES // (vocabulary * ops.dtype_bytes))
        dhidden, dweight = ops.like(hidden), None
        losses, total = [], ops.floats(1, LOGITS)
        for start in range(0, tokens, rows):
            count = min(rows, tokens - start)
            logits = ops.new(count * vocabulary, LOGITS)
            loss, lse = ops.floats(count, LOGITS), ops.floats(count, LOGITS)
            losses.append(loss)
            del lse
            part = ops.new(count * self.config.embedding_size, GRADIENTS)
            del part
            product = ops.floats(weight.num_bytes // ops.dtype_bytes, GRADIENTS)
            dweight = product if dweight is None else dweight
            del product, logits
        gradients = [dhidden, dweight]
        ops.tape.record([hidden, weight], [total], lambda incoming: gradients)
        return total


class _Layer:
    """The counterpart of ``DecoderLayer``."""

    def __init__(self, model: Decoder, number: int) -> None:
        self._model, self._config = model, model.config
        self._name = f"layers.{number}"
        self.recompute = ""  # granularity, or nothing

    def _recomputed(self, granularity, function, *inputs):
        if self.recompute != granularity:
            return function(*inputs)
        return self._model.ops.tape.recomputed(function, inputs)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        forward = partial(self._forward, batch=batch)
        return self._recomputed("full", forward, x, residual)

    def _forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = self._add("input_layernorm", self._attention, x, residual, batch)
        return self._add("post_attention_layernorm", self._feed_forward, x, residual, batch)

    def _add(self, norm, branch, x, residual, batch):
        model, name = self._model, f"{self._name}.{norm}"
        if self._config.residual == "post":
            return model.norm(name, branch(x, batch), x, batch.tokens)[0], None
        x, stream = model.norm(name, x, residual, batch.tokens)
        if self._config.residual == "normed":
            return branch(x, batch), model.ops.scale(x)
        return branch(x, batch), stream

    def _attention(self, x: Tensor, batch: Batch) -> Tensor:
        attention = partial(self._self_attention, batch=batch)
        (x,) = self._recomputed("full_attn", attention, x)
        return self._branch_norm("attention_branch_norm", x, batch)

    def _feed_forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self._branch_norm("mlp_branch_norm", self._mlp(x, batch), batch)

    def _branch_norm(self, name: str, x: Tensor, batch: Batch) -> Tensor:
        if not self._config.branch_norm:
            return x
        return self._model.norm(f"{self._name}.{name}", x, None, batch.tokens)[0]

    def _self_attention(self, x: Tensor, batch: Batch) -> list[Tensor]:
        model, config, name = self._model, self._config, f"{self._name}.self_attn"
        width = config.query_size + 2 * config.key_value_size
        qkv = model.linear(f"{name}.qkv_proj", x, batch.tokens * width)
        is_packed = not config.qk_norm and not config.position_encoding_2d
        out = self._attend_packed(qkv, batch) if is_packed else self._attend_split(qkv, batch)
        return [model.linear(f"{name}.o_proj", out, batch.tokens * config.hidden_size)]

    def _attend_packed(self, qkv: Tensor, batch: Batch) -> Tensor:
        config, ops = self._config, self._model.ops
        is_copied = config.position_embedding == "rope" and self.recompute == "core_attn"
        attend = partial(
            ops.packed_attention,
            out_elements=batch.tokens * config.query_size,
            rows=batch.tokens * config.num_attention_heads,
            workspace=attention_workspace(config, batch),
            is_copied=is_copied,
        )
        return self._recomputed("core_attn", lambda qkv: [attend(qkv)], qkv)[0]

    def _attend_split(self, qkv: Tensor, batch: Batch) -> Tensor:
        config, ops, tokens = self._config, self._model.ops, batch.tokens
        name, heads = f"{self._name}.self_attn", config.num_attention_heads
        sizes = [tokens * config.query_size, *[tokens * config.key_value_size] * 2]
        query, key, value = (ops.contiguous(part) for part in ops.split(qkv, sizes))
        if config.qk_norm:
            norms = [self._model.parameters[f"{name}.{each}_norm.weight"] for each in "qk"]
            query = ops.rms_norm(query, norms[0], tokens * heads)
            key = ops.rms_norm(key, norms[1], tokens * config.num_key_value_heads)
        if config.position_embedding == "rope":
            for _ in range(1 + config.position_encoding_2d):
                query, key = ops.rotary(query, key)
        attend = partial(
            ops.attention, rows=tokens * heads, workspace=attention_workspace(config, batch)
        )
        (out,) = self._recomputed("core_attn", lambda q, k, v: [attend(q, k, v)], query, key, value)
        return ops.view(out)

    def _mlp(self, x: Tensor, batch: Batch) -> Tensor:
        model, config, ops = self._model, self._config, self._model.ops
        name, inner = f"{self._name}.mlp", batch.tokens * config.intermediate_size
        if config.gated_mlp:
            x = ops.gated(model.linear(f"{name}.gate_up_proj", x, 2 * inner))
        else:
            x = ops.activation(model.linear(f"{name}.up_proj", x, inner), config.activation)
        return model.linear(f"{name}.down_proj", x, batch.tokens * config.hidden_size)
