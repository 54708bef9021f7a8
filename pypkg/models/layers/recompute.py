"""Activation recomputation (gradient checkpointing) by fleet's recompute.

In the forward pass it keeps only the inputs of a function. In the backward pass it runs the
function again with the same random states. Each layer has its own choice, so that a pipeline stage
recomputes the same activations as a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn

FULL, ATTENTION_BLOCK, ATTENTION = "full", "full_attn", "core_attn"


@dataclass(frozen=True)
class Recompute:
    """Which layers recompute which activations.

    Attributes:
        granularity: "full": the whole layer; "full_attn": the attention block with projections;
            "core_attn": attention without projections.
        skipped_layers: indices in the model of layers that keep all activations.
        interval: the first layer of each model chunk, and every ``interval``-th layer after it,
            recompute; 0: none. A model without pipeline stages is one chunk.
        use_reentrant: whether to use an autograd function that calls backward within backward,
            instead of hooks on saved tensors. The results are equal.
    """

    granularity: str = FULL
    skipped_layers: frozenset[int] = frozenset()
    interval: int = 1
    use_reentrant: bool = False

    def covers(self, number: int, position: int) -> bool:
        """Whether a layer recomputes.

        Args:
            number: index of the layer in the model.
            position: index of the layer in its model chunk.
        """
        is_due = self.interval > 0 and position % self.interval == 0
        return is_due and number not in self.skipped_layers


def use_recompute(layers: Iterable[tuple[int, nn.Layer]], choice: Recompute | None) -> None:
    """Sets which activations decoder layers recompute in training.

    Args:
        layers: (index in the model, layer) for each layer of a model chunk, in forward order.
        choice: None: no layer recomputes.
    """
    for position, (number, layer) in enumerate(layers):
        covered = choice if choice is not None and choice.covers(number, position) else None
        layer.recompute = layer.self_attn.recompute = covered


def recomputed(layer: nn.Layer, granularity: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function(*args)``; recomputes it in the backward pass if ``layer`` is set to do so.

    Args:
        layer: has the attribute ``recompute``: a choice or None. Only in training mode.
        granularity: ``function`` is recomputed if the choice has this granularity.
        function: returns a tensor, or a tuple of tensors and None.
    """
    choice = layer.recompute
    if (
        choice is None
        or choice.granularity != granularity
        or not layer.training
        or not paddle.is_grad_enabled()
    ):
        return function(*args)
    from paddle.distributed.fleet.utils import recompute

    missing: list[bool] = []

    def tensors_only(*args: Any) -> Any:  # an autograd function cannot return None
        outputs = function(*args)
        if isinstance(outputs, paddle.Tensor):
            return outputs
        missing[:] = [output is None for output in outputs]
        return tuple(output for output in outputs if output is not None)

    outputs = recompute(tensors_only, *args, use_reentrant=choice.use_reentrant)
    if not missing:
        return outputs
    present = iter(outputs)
    return tuple(None if is_missing else next(present) for is_missing in missing)
