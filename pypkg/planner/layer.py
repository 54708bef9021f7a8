"""A decoder layer in shapes: the counterpart of models/layers/decoder_layer.py and attention.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pypkg.parallel.mesh import Degrees
from pypkg.planner.blocks import PreNorm, attention_block, mlp_block
from pypkg.planner.micro_batch import Batch, attention_workspace
from pypkg.planner.operators import Operators
from pypkg.planner.parallel.context_parallel import ContextParallel
from pypkg.planner.parallel.tensor_parallel import Shard, TensorParallel
from pypkg.planner.tape import Parameter, Tensor

FULL, ATTENTION_BLOCK, ATTENTION = "full", "full_attn", "core_attn"  # models/layers/recompute.py

# As of models/layers/residual.py.
State = tuple[Tensor, Tensor | None]


# Runs a named layer with its own parameters, and returns its outputs.
Call = Callable[[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]]


class ChunkParts:
    """What the layers of a model chunk share: operators, parameters, norms and linear layers.

    Args:
        parameters, call, begin_recompute, has_hooks: as of ``Decoder``.
    """

    def __init__(
        self,
        ops: Operators,
        shard: Shard,
        degrees: Degrees,
        parameters: Mapping[str, Parameter],
        call: Call,
        begin_recompute: Callable[[str, list], None],
        has_hooks: bool,
    ) -> None:
        self.ops, self.shard, self.config = ops, shard, shard.config
        self.tp, self.context = TensorParallel(ops, degrees), ContextParallel(ops, degrees)
        self.parameters, self.call, self.begin_recompute = parameters, call, begin_recompute
        self.has_hooks = has_hooks
        overlaps = degrees.tensor > 1 and degrees.overlap_input_gradients
        has_own_product = overlaps or (degrees.adds_weight_gradients and ops.dtype_bytes == 2)
        self.joins_layers = not has_hooks and not has_own_product  # joined_layers of tp_layers.py

    def norm(self, name: str, x: Tensor, residual: Tensor | None, rows: int) -> Sequence[Tensor]:
        """The norm of x + residual, and x + residual."""
        return self.call(name, lambda: self._norm(name, x, residual, rows))

    def _norm(self, name: str, x: Tensor, residual: Tensor | None, rows: int) -> tuple:
        ops, weight = self.ops, self.parameters[f"{name}.weight"]
        if self.config.norm == "layer_norm":
            if residual is not None:
                x = ops.add(x, residual)
            return ops.layer_norm(x, weight, self.parameters[f"{name}.bias"], rows), x
        if residual is None:
            return ops.rms_norm(x, weight, rows), x
        return ops.add_rms_norm(x, residual, weight, rows)

    def linear(self, name: str, x: Tensor, outputs: int, kind: str = "linear") -> Tensor:
        """A linear layer with ``outputs`` output elements.

        Args:
            kind: "linear", or "column_linear" or "row_linear" where tensor parallelism divides it.
        """
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        function = self.ops.linear if kind == "linear" else getattr(self.tp, kind)
        return self.call(name, lambda: [function(x, weight, bias, outputs)])[0]


class Layer:
    """The counterpart of ``DecoderLayer``."""

    def __init__(self, model: ChunkParts, number: int, recompute: str) -> None:
        self._model, self._config, self._shard = model, model.config, model.shard
        self._name, self._recompute = f"layers.{number}", recompute
        # Paddle recomputes when the first operator of the backward pass needs a saved tensor. That
        # operator belongs to the layer of the output.
        last = "mlp_branch_norm" if self._config.branch_norm else "mlp.down_proj"
        if self._config.residual == "post":
            last = "post_attention_layernorm"
        self._lasts = {FULL: last, ATTENTION_BLOCK: "self_attn.o_proj"}

    @property
    def _is_packed(self) -> bool:
        is_plain = not self._config.qk_norm and not self._config.position_encoding_2d
        return is_plain and not self._model.context.is_ring

    @property
    def _attends_in_one(self) -> bool:
        config = self._config
        has_bias = config.qkv_bias or config.attention_output_bias
        is_alone = self._model.context.degree == 1
        is_one = self._model.joins_layers and self._is_packed and is_alone and not has_bias
        return is_one and self._recompute != ATTENTION

    @property
    def _has_mlp_in_one(self) -> bool:
        return self._model.joins_layers and self._config.gated_mlp and not self._config.mlp_bias

    def _begin_recompute(self, last: str, incoming: list[Tensor | None]) -> None:
        if last:
            self._model.begin_recompute(f"{self._name}.{last}", incoming)
        if last.endswith("_proj"):
            self._model.tp.gather_gradient(incoming)

    def _recomputed(
        self, granularity: str, function: Callable[..., Any], *inputs: Tensor | None
    ) -> Any:
        if self._recompute != granularity:
            return function(*inputs)
        begin = partial(self._begin_recompute, self._lasts.get(granularity, ""))
        keeps = not {
            FULL: self._attends_in_one and self._has_mlp_in_one and self._config.norm == "rms_norm",
            ATTENTION_BLOCK: self._attends_in_one,
            ATTENTION: True,
        }[granularity]  # is there an operator of Paddle that saves tensors?
        # The hook of a layer of stage 3 needs nothing that was saved, and runs before.
        turns = int(self._model.has_hooks and granularity == FULL)
        return self._model.ops.tape.recomputed(function, inputs, begin, keeps, turns)

    def __call__(self, x: Tensor, residual: Tensor | None, batch: Batch) -> State:
        return self._recomputed(FULL, partial(self._forward, batch=batch), x, residual)

    def _forward(self, x: Tensor, residual: Tensor | None, batch: Batch) -> State:
        norm, state = "input_layernorm", None
        if self._attends_in_one and self._recompute in ("", FULL):
            state = self._joined(norm, self._attention_block, x, residual, batch)
        x, residual = state or self._add(norm, self._attention, x, residual, batch)
        norm, state = "post_attention_layernorm", None
        if self._has_mlp_in_one:
            state = self._joined(norm, self._mlp_block, x, residual, batch)
        return state or self._add(norm, self._feed_forward, x, residual, batch)

    def _add(
        self,
        norm: str,
        branch: Callable[[Tensor, Batch], Tensor],
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
    ) -> State:
        """The branch of the norm of x + residual."""
        model, name = self._model, f"{self._name}.{norm}"
        rows = model.tp.tokens(batch.tokens)
        if self._config.residual == "post":
            return model.norm(name, branch(x, batch), x, rows)[0], None
        x, stream = model.norm(name, x, residual, rows)
        if self._config.residual == "normed":
            return branch(x, batch), model.ops.scale(x)
        return branch(x, batch), stream

    def _joined(
        self,
        norm: str,
        block: Callable[[Tensor, Batch, PreNorm], list[Tensor]],
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
    ) -> State | None:
        """Norm and branch as one operator (models/layers/decoder_layer.py); None if they cannot."""
        config, model = self._config, self._model
        is_plain = config.residual == "pre" and not config.branch_norm and not batch.has_dropout
        if residual is None or not is_plain or config.norm != "rms_norm" or model.tp.degree > 1:
            return None
        weight = model.parameters[f"{self._name}.{norm}.weight"]
        out, stream = block(x, batch, PreNorm(residual, weight, batch.tokens))
        return out, stream

    def _attention(self, x: Tensor, batch: Batch) -> Tensor:
        attention = partial(self._self_attention, batch=batch)
        (x,) = self._recomputed(ATTENTION_BLOCK, attention, x)
        return self._branch_norm("attention_branch_norm", self._dropout(x, batch), batch)

    def _feed_forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self._dropout(self._mlp(x, batch), batch)
        return self._branch_norm("mlp_branch_norm", x, batch)

    def _dropout(self, x: Tensor, batch: Batch) -> Tensor:
        return self._model.ops.dropout(x) if batch.has_dropout else x

    def _branch_norm(self, name: str, x: Tensor, batch: Batch) -> Tensor:
        if not self._config.branch_norm:
            return x
        rows = self._model.tp.tokens(batch.tokens)
        return self._model.norm(f"{self._name}.{name}", x, None, rows)[0]

    def _self_attention(self, x: Tensor, batch: Batch) -> list[Tensor]:
        model, config, name = self._model, self._config, f"{self._name}.self_attn"
        width = self._shard.query_size + 2 * self._shard.key_value_size
        if self._attends_in_one:
            (out,) = self._attention_block(model.tp.enter(x), batch)
            return [model.tp.leave(out)]
        qkv = model.linear(f"{name}.qkv_proj", x, batch.tokens * width, "column_linear")
        attend = self._attend_packed if self._is_packed else self._attend_split
        if model.context.exchanges_heads:
            of_heads = model.context.tokens_for_heads(qkv, self._given(batch), self._sizes(batch))
            out = model.context.heads_for_tokens(attend(of_heads, batch))
        else:
            out = attend(qkv, batch)
        outputs = batch.tokens * config.hidden_size
        return [model.linear(f"{name}.o_proj", out, outputs, "row_linear")]

    def _attention_block(
        self, x: Tensor, batch: Batch, norm: PreNorm | None = None
    ) -> list[Tensor]:
        shard, tokens = self._shard, batch.tokens
        width = shard.query_size + 2 * shard.key_value_size
        return attention_block(
            self._model.ops,
            x,
            norm,
            self._weights("self_attn.qkv_proj", "self_attn.o_proj"),
            [tokens * each for each in (width, shard.query_size, self._config.hidden_size)],
            rows=tokens * shard.heads,
            workspace=self._workspace(batch),
        )

    def _mlp_block(self, x: Tensor, batch: Batch, norm: PreNorm | None = None) -> list[Tensor]:
        weights = self._weights("mlp.gate_up_proj", "mlp.down_proj")
        width, outputs = self._shard.intermediate_size, self._config.hidden_size
        sizes = (batch.tokens * width, batch.tokens * outputs)
        return mlp_block(self._model.ops, x, norm, weights, *sizes)

    def _given(self, batch: Batch) -> list[int]:
        """Elements of query, key and value of this rank's tokens."""
        shard, tokens = self._shard, batch.tokens
        return [tokens * shard.query_size, *[tokens * shard.key_value_size] * 2]

    def _sizes(self, batch: Batch) -> list[int]:
        """Elements of query, key and value in attention; Ulysses may repeat keys and values."""
        query, key, _ = self._given(batch)
        if self._model.context.exchanges_heads:
            heads = self._shard.key_value_heads
            key = key // heads * max(heads, self._model.context.degree)
        return [query, key, key]

    def _workspace(self, batch: Batch) -> int:
        shard, model = self._shard, self._model
        heads = model.context.attended_heads(shard.heads, shard.key_value_heads)
        return attention_workspace(*heads, shard.config.head_dim, batch, model.ops)

    def _weights(self, *names: str) -> list[Parameter]:
        return [self._model.parameters[f"{self._name}.{name}.weight"] for name in names]

    def _attend_packed(self, qkv: Tensor, batch: Batch) -> Tensor:
        ops, shard = self._model.ops, self._shard
        is_repeated = self._recompute == ATTENTION
        attend = partial(
            ops.packed_attention,
            out_elements=batch.tokens * shard.query_size,
            rows=batch.tokens * shard.heads,
            workspace=self._workspace(batch),
            is_copied=self._config.position_embedding == "rope" and is_repeated,
        )
        return self._recomputed(ATTENTION, lambda qkv: [attend(qkv)], qkv)[0]

    def _attend_split(self, qkv: Tensor, batch: Batch) -> Tensor:
        model, config, shard, tokens = self._model, self._config, self._shard, batch.tokens
        ops, name, heads = model.ops, f"{self._name}.self_attn", shard.heads
        query, key, value = (ops.contiguous(part) for part in ops.split(qkv, self._sizes(batch)))
        if config.qk_norm:
            query = self._head_norm(f"{name}.q_norm", query, tokens * heads)
            key = self._head_norm(f"{name}.k_norm", key, tokens * shard.key_value_heads)
        if config.position_embedding == "rope":
            for _ in range(1 + config.position_encoding_2d):
                query, key = ops.rotary(query, key, batch.positions)
        rows = tokens * heads
        if model.context.is_ring:
            block = replace(batch, sequence=tokens // batch.rows // 2)
            attend = partial(
                model.context.ring_attention,
                rows=rows,
                workspace=self._workspace(block),
                is_strided=batch.rows > 1,
            )
        else:
            attend = partial(ops.attention, rows=rows, workspace=self._workspace(batch))
        (out,) = self._recomputed(ATTENTION, lambda q, k, v: [attend(q, k, v)], query, key, value)
        return ops.view(out)

    def _head_norm(self, name: str, x: Tensor, rows: int) -> Tensor:
        model = self._model
        weight = model.parameters[f"{name}.weight"]
        return model.call(name, lambda: [model.ops.rms_norm(x, weight, rows), x])[0]

    def _mlp(self, x: Tensor, batch: Batch) -> Tensor:
        model, config, ops = self._model, self._config, self._model.ops
        name, inner = f"{self._name}.mlp", batch.tokens * self._shard.intermediate_size
        if self._has_mlp_in_one:
            (out,) = self._mlp_block(model.tp.enter(x), batch)
            return model.tp.leave(out)
        if config.gated_mlp:
            x = model.linear(f"{name}.gate_up_proj", x, 2 * inner, "column_linear")
            x = ops.gated(x)
        else:
            x = model.linear(f"{name}.up_proj", x, inner, "column_linear")
            x = ops.activation(x, config.activation)
        outputs = batch.tokens * config.hidden_size
        return model.linear(f"{name}.down_proj", x, outputs, "row_linear")
