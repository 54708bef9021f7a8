"""The part of a decoder that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import paddle
from paddle import Tensor, nn

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import cut
from pypkg.models.cached_pass import cached_pass
from pypkg.models.decoder import DecoderChunk
from pypkg.models.layers.kv_cache import KVCache, NewTokens
from pypkg.models.layers.recompute import Recompute
from pypkg.parallel.pipeline import (
    Schedule,
    from_last_stage,
    pipeline_degree,
    pipeline_rank,
    virtual_stages,
)
from pypkg.parallel.tied_copies import TiedCopies

# The tensors that a stage sends to the next one: the residual stream and the inputs of the micro
# batch. Each stage derives masks and positions from these inputs, like a model without stages.
_STREAM = "stream"
_INPUTS = ("input_ids", "position_ids", "prefix_lengths", "document_starts")
_LABELS = ("labels", "token_losses", "loss_weight")


class PipelineDecoder(nn.Layer):
    """The model chunks of this pipeline stage, and the schedule that trains all stages.

    Parameter names are those of the whole model. The copy of a tied embedding table on the last
    stage has ``counted_elsewhere = True``, so that norms over all parameters count the table once.

    Attributes:
        tied: the copies of a tied embedding table, whose gradients the update must sum; None if the
            head is not tied.

    Raises:
        UserError: the model has fewer layers than the pipeline has model chunks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        stages, rank = pipeline_degree(), pipeline_rank()
        self._chunks = tuple(
            DecoderChunk(config, chunk)
            for chunk in cut(config.num_hidden_layers, stages, virtual_stages())[rank::stages]
        )
        for chunk in self._chunks:
            self._adopt(chunk)
        self.tied: TiedCopies | None = None
        if config.tie_word_embeddings:
            table = self.embed_tokens.weight if rank in (0, stages - 1) else None
            self.tied = TiedCopies(table)
            if table is not None:
                table.counted_elsewhere = rank > 0
        self._handovers = [_Handover(chunk) for chunk in self._chunks]
        self._schedule = Schedule(self._handovers, _LABELS, self._chunks[-1].loss_of)

    def _adopt(self, chunk: DecoderChunk) -> None:
        """Registers the sublayers of ``chunk`` as sublayers of this layer, under the same names."""
        for name, child in chunk.named_children():
            if name != "layers":
                self.add_sublayer(name, child)
                continue
            if not hasattr(self, name):
                self.layers = nn.LayerList()
            for number, layer in child.named_children():
                self.layers.add_sublayer(number, layer)

    def train(self, mode: bool = True) -> PipelineDecoder:
        super().train(mode)
        if mode:
            self._schedule.train()
        else:
            self._schedule.eval()
        return self

    def eval(self) -> PipelineDecoder:
        return self.train(False)

    def use_attention(self, backend: str) -> None:
        """``Decoder.use_attention`` for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_attention(backend)

    def use_recompute(self, choice: Recompute | None) -> None:
        """``Decoder.use_recompute`` for all chunks; intervals count the layers of each chunk."""
        for chunk in self._chunks:
            chunk.use_recompute(choice)

    def use_dropout(self, probability: float) -> None:
        """``Decoder.use_dropout`` for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_dropout(probability)

    def use_z_loss(self, factor: float) -> None:
        """``Decoder.use_z_loss`` for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_z_loss(factor)

    def forward_backward(
        self,
        micro_batches: Sequence[Mapping[str, Any]],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:
        """Accumulates the gradients of the mean loss over ``micro_batches`` on this stage.

        The gradient of a tied table is only the part of this stage; see ``tied``.

        Args:
            micro_batches: arguments of ``Decoder.loss`` by name, without ``reduction``; the same on
                all stages. Only the last stage fills ``token_losses``.
            scale: applied to each loss before its backward pass.

        Returns:
            The mean of ``Decoder.loss`` over the micro batches, without ``scale``: a float32
            scalar, the same on all stages.
        """
        return self._schedule.forward_backward(micro_batches, scale)

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of ``batch`` on all stages, a float32 scalar without gradient.

        Args:
            batch: arguments of ``Decoder.loss`` by name.
        """
        return self._schedule.evaluate(batch)

    def next_logits(self, input_ids: Tensor, tokens: NewTokens, cache: KVCache) -> Tensor:
        """Logits of the token after the last of ``input_ids``, [batch, vocab_size], on all stages.

        Args:
            input_ids: int64 [batch, sequence], the tokens after those in the cache.
            tokens: the result of ``cache.advance(input_ids)``.
            cache: for the layers of this rank.
        """
        for handover in self._handovers:
            handover.cached = (tokens, cache)
        try:
            hidden = self._schedule.forward({"input_ids": input_ids})
        finally:
            for handover in self._handovers:
                handover.cached = None
        shape = [input_ids.shape[0], self.config.vocab_size]
        if hidden is None:
            logits = paddle.empty(shape, self.parameters()[0].dtype)
        else:
            logits = self._chunks[-1].logits(hidden[:, -1]).contiguous()
        return from_last_stage(logits)


class _Handover(nn.Layer):
    """A model chunk whose input and output are the dictionaries that the schedule sends."""

    def __init__(self, chunk: DecoderChunk) -> None:
        super().__init__()
        self.chunk = chunk
        self.cached: tuple[NewTokens, KVCache] | None = None  # set during a pass with a cache

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor] | Tensor:
        inputs = {name: state[name] for name in _INPUTS if name in state}
        if self.cached is not None:
            out = cached_pass(self.chunk, state.get(_STREAM), state["input_ids"], *self.cached)
        else:
            out = self.chunk.run(state.get(_STREAM), **inputs)
        if self.chunk.chunk.is_last:
            return out
        # Copies, because the schedule frees sent tensors and the backward pass needs their values.
        return {_STREAM: out, **{name: value.clone() for name, value in inputs.items()}}
