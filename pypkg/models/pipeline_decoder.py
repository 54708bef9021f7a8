"""A decoder under pipeline parallelism: what one stage has of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paddle import Tensor, nn

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.layer_split import cut
from pypkg.models.decoder import DecoderChunk
from pypkg.models.layers.recompute import Recompute
from pypkg.parallel.pipeline import Schedule, pipeline_degree, pipeline_rank, virtual_stages

# What a stage hands to the next: the residual stream, and the inputs of the micro batch, from which
# every stage has its masks and positions as one process has them.
_STREAM = "stream"
_INPUTS = ("input_ids", "position_ids", "prefix_lengths", "document_starts")
_LABELS = ("labels", "token_losses", "loss_weight")


class PipelineDecoder(nn.Layer):
    """The model chunks of this pipeline stage, and the schedule that trains all stages.

    Parameters have the names of the whole model. The last stage's copy of a tied embedding table
    has ``counted_elsewhere = True``: norms over all parameters leave it out.

    Raises:
        UserError: the model has fewer layers than the pipeline has parts.
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
        """Makes the layers of ``chunk`` this layer's own, under the same names."""
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

    def use_flash_attention(self, enabled: bool) -> None:
        """As of ``Decoder``."""
        for chunk in self._chunks:
            chunk.use_flash_attention(enabled)

    def use_recompute(self, choice: Recompute | None) -> None:
        """As of ``Decoder``; intervals count the layers of each chunk."""
        for chunk in self._chunks:
            chunk.use_recompute(choice)

    def use_dropout(self, probability: float) -> None:
        """As of ``Decoder``."""
        for chunk in self._chunks:
            chunk.use_dropout(probability)

    def forward_backward(
        self,
        micro_batches: Sequence[Mapping[str, Any]],
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> Tensor:
        """Adds this stage's gradients of the mean loss over ``micro_batches``.

        Args:
            micro_batches: arguments of ``Decoder.loss`` by name, save ``reduction``; the same on
                all stages. ``token_losses`` are those of the last stage alone.
            scale: applied to each loss before its backward pass.

        Returns:
            The mean loss, a float32 scalar, on all stages: that of each micro batch over its
            labels that count, times its ``loss_weight``, then that of these.
        """
        return self._schedule.forward_backward(micro_batches, scale)

    def evaluate(self, batch: Mapping[str, Any]) -> Tensor:
        """The loss of ``batch``, arguments of ``Decoder.loss``, on all stages; no gradients."""
        return self._schedule.evaluate(batch)


class _Handover(nn.Layer):
    """A model chunk whose input and output are dictionaries, which the schedule sends."""

    def __init__(self, chunk: DecoderChunk) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor] | Tensor:
        inputs = {name: state[name] for name in _INPUTS if name in state}
        out = self.chunk.run(state.get(_STREAM), **inputs)
        if self.chunk.chunk.is_last:
            return out
        # Copies, because the schedule frees what it has sent, and backward passes need these.
        return {_STREAM: out, **{name: value.clone() for name, value in inputs.items()}}
