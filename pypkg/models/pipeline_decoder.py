"""The part of a decoder that one pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paddle import Tensor, nn

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import cut
from pypkg.models.decoder import DecoderChunk
from pypkg.models.layers.recompute import Recompute
from pypkg.parallel.pipeline import Schedule, pipeline_degree, pipeline_rank, virtual_stages

# The tensors that a stage sends to the next one: the residual stream and the inputs of the micro
# batch. Every stage derives masks and positions from these inputs, as a model in one process does.
_STREAM = "stream"
_INPUTS = ("input_ids", "position_ids", "prefix_lengths", "document_starts")
_LABELS = ("labels", "token_losses", "loss_weight")


class PipelineDecoder(nn.Layer):
    """The model chunks of this pipeline stage, and the schedule that trains all stages.

    Parameter names are those of the whole model. The copy of a tied embedding table on the last
    stage has ``counted_elsewhere = True``, so that norms over all parameters count the table once.

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
        tied = None
        if config.tie_word_embeddings and rank in (0, stages - 1):
            tied = self.embed_tokens.weight
            tied.counted_elsewhere = rank > 0
        self._schedule = Schedule(
            [_Handover(chunk) for chunk in self._chunks], _LABELS, self._chunks[-1].loss_of, tied
        )

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
        """Same as the method of ``Decoder``, for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_attention(backend)

    def use_recompute(self, choice: Recompute | None) -> None:
        """See ``Decoder.use_recompute``. Intervals count the layers of each chunk."""
        for chunk in self._chunks:
            chunk.use_recompute(choice)

    def use_dropout(self, probability: float) -> None:
        """Same as the method of ``Decoder``, for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_dropout(probability)

    def use_z_loss(self, factor: float) -> None:
        """Same as the method of ``Decoder``, for all chunks of this rank."""
        for chunk in self._chunks:
            chunk.use_z_loss(factor)

    def forward_backward(
        self,
        micro_batches: Sequence[Mapping[str, Any]],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:
        """Accumulates the gradients of the mean loss over ``micro_batches`` on this stage.

        Args:
            micro_batches: arguments of ``Decoder.loss`` by name without ``reduction``; equal on all
                stages. Only the last stage fills ``token_losses``.
            scale: applied to each loss before its backward pass.

        Returns:
            A float32 scalar, equal on all stages: the mean over micro batches of ``Decoder.loss``,
            each a mean over its labels times its ``loss_weight``.
        """
        return self._schedule.forward_backward(micro_batches, scale)

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of ``batch`` on all stages, a float32 scalar without gradient.

        Args:
            batch: arguments of ``Decoder.loss`` by name.
        """
        return self._schedule.evaluate(batch)


class _Handover(nn.Layer):
    """A model chunk whose input and output are the dictionaries that the schedule sends."""

    def __init__(self, chunk: DecoderChunk) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor] | Tensor:
        inputs = {name: state[name] for name in _INPUTS if name in state}
        out = self.chunk.run(state.get(_STREAM), **inputs)
        if self.chunk.chunk.is_last:
            return out
        # These are copies: the schedule frees sent tensors, and backward passes need the values.
        return {_STREAM: out, **{name: value.clone() for name, value in inputs.items()}}
