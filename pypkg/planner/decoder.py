"""The decoder in shapes: the counterpart of models/decoder.py, models/layers and the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from pypkg.models.architecture.layer_split import ModelChunk
from pypkg.parallel.mesh import Degrees
from pypkg.planner.layer import Call, ChunkParts, Layer
from pypkg.planner.micro_batch import Batch
from pypkg.planner.operators import INPUTS, Operators
from pypkg.planner.parallel.tensor_parallel import Shard
from pypkg.planner.tape import Parameter, Tensor

EMBEDDING, HEAD = "embedding", "head"  # the parts of a chunk that are not numbered layers


def run_directly(name: str, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The ``Call`` that runs a layer and adds nothing."""
    return function()


class Decoder(ChunkParts):
    """A model chunk of one rank.

    Args:
        parameters: by name.
        call: runs its layers.
        begin_recompute: called before layers are recomputed, with the name of the last of them and
            the gradients of its outputs.
        recompute: granularity of each layer; "" for none.
        has_hooks: whether calls of layers have hooks, which prevents fusing two layers.
        number: index of the chunk in its stage.
    """

    def __init__(
        self,
        ops: Operators,
        shard: Shard,
        chunk: ModelChunk,
        degrees: Degrees,
        parameters: Mapping[str, Parameter],
        call: Call = run_directly,
        begin_recompute: Callable[[str, list], None] = lambda last, incoming: None,
        recompute: Sequence[str] = (),
        has_hooks: bool = False,
        number: int = 0,
    ) -> None:
        super().__init__(ops, shard, degrees, parameters, call, begin_recompute, has_hooks)
        self.chunk, self._number = chunk, number
        choices = recompute or [""] * len(chunk.layers)
        self.layers = [Layer(self, *each) for each in zip(chunk.layers, choices, strict=True)]
        self._hook_gradients()

    def _hook_gradients(self) -> None:
        """Parameters whose gradients the tensor group sums (tp_layers.py, layers/attention.py)."""
        if self.tp.degree == 1:
            return
        replicates = self.tp.degree > self.config.num_key_value_heads
        for name, parameter in self.parameters.items():
            kind = name.rpartition(".")[0].rpartition(".")[2]
            is_split = self.tp.splits_tokens and ("norm" in kind or name.endswith("_proj.bias"))
            if "qkv_proj" in name and replicates:
                parameter.hook = partial(self.tp.sum_replicas, self.shard)
            elif kind in ("q_norm", "k_norm") or (is_split and kind != "embed_norm"):
                parameter.hook = self.tp.sum_over_group

    def enter(self, place: int | str, phase: str | None = None) -> None:
        """Attributes peaks from now on to a layer (its index in the chunk), EMBEDDING or HEAD."""
        self.ops.tape.enter((self._number, place), phase)

    def run(self, x: Tensor | None, batch: Batch) -> Tensor:
        """The counterpart of ``DecoderChunk.run``."""
        if self.chunk.is_first:
            self.enter(EMBEDDING)
            x = self.tp.split(self._embed(batch))
        assert x is not None
        batch = replace(batch, positions=self._positions(batch))
        residual: Tensor | None = None
        for place, layer in enumerate(self.layers):
            self.enter(place)
            x, residual = layer(x, residual, batch)
        self.enter(HEAD)
        return self._finish(x, residual, batch)

    def loss_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The counterpart of ``DecoderChunk.loss_of``."""
        table = "embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        parameter = self.parameters[f"{table}.weight"]

        def head() -> list[Tensor]:
            weight: Tensor = parameter
            if self.config.norm_head:
                weight = self.ops.normalized(weight, self.shard.padded_rows)
            return [
                self.ops.linear_cross_entropy(
                    *(hidden, weight, batch.tokens, self.shard.rows), is_divided=self.tp.degree > 1
                )
            ]

        return self.call(table, head)[0]

    def _embed(self, batch: Batch) -> Tensor:
        config, ops, tokens = self.config, self.ops, batch.tokens
        table = self.parameters["embed_tokens.weight"]
        x = self.call(
            "embed_tokens", lambda: [self.tp.embedding(table, tokens, config.embedding_size)]
        )[0]
        if config.embedding_gradient_scale != 1.0:
            scaled = ops.scale(x)
            x = ops.add(scaled, ops.scale(x.detach()))
            del scaled
        if config.embedding_size != config.hidden_size:
            x = self.linear("project_in", x, tokens * config.hidden_size)
        if config.position_embedding == "learned":
            positions = self.parameters["embed_positions.weight"]
            rows = self.call(
                "embed_positions",
                lambda: [ops.rows_of(positions, batch.sequence * config.hidden_size)],
            )[0]
            if self.context.degree > 1:
                rows = ops.contiguous_part(rows, tokens // batch.rows * config.hidden_size)
            x = ops.add_rows(x, rows)
            x = ops.dropout(x) if batch.has_dropout else x
        return x if not config.embedding_norm else self.norm("embed_norm", x, None, tokens)[0]

    def _positions(self, batch: Batch) -> Tensor | None:
        """What rotations keep: of a ring its own positions, in 2D contiguous copies of both."""
        config, tokens = self.config, batch.tokens if self.context.is_ring else 0
        if config.position_encoding_2d:
            return self.ops.tape.empty(16 * (tokens or batch.rows * batch.sequence), INPUTS)
        if config.position_embedding == "rope" and tokens:
            return self.ops.tape.empty(8 * tokens, INPUTS)
        return None

    def _finish(self, x: Tensor, residual: Tensor | None, batch: Batch) -> Tensor:
        config, tokens = self.config, self.tp.tokens(batch.tokens)
        if self.chunk.is_last and config.final_norm:
            x = self.norm("norm", x, residual, tokens)[0]
        elif residual is not None:
            x = self.ops.add(x, residual)
        if not self.chunk.is_last:
            return x
        x = self.tp.gather(x)
        if config.embedding_size != config.hidden_size:
            x = self.linear("project_out", x, batch.tokens * config.embedding_size)
        return x
