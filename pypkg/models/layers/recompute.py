"""Activation recompute: what a layer keeps for its backward pass, and what it computes again.

The choice is made inside the layer, so that it is the same for a layer of a whole model and of a
pipeline stage. fleet's recompute does the work: it runs a function once without keeping anything
but its inputs, and again, from the same random states, when gradients need the rest.
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
    """Which layers compute what again.

    Attributes:
        granularity: "full", the whole layer; "full_attn", its attention block with projections;
            "core_attn", attention alone.
        skipped_layers: numbers of layers in the model that keep everything.
        interval: of the layers of each model chunk, the first and every ``interval``-th after it
            recompute; 0: none. A whole model is one chunk.
        use_reentrant: recompute inside an autograd function instead of hooks on what is kept.
            Same results; the function calls backward within backward.
    """

    granularity: str = FULL
    skipped_layers: frozenset[int] = frozenset()
    interval: int = 1
    use_reentrant: bool = False

    def covers(self, number: int, position: int) -> bool:
        """Whether layer ``number`` of the model recomputes, the ``position``-th of its stage."""
        is_due = self.interval > 0 and position % self.interval == 0
        return is_due and number not in self.skipped_layers


def use_recompute(layers: Iterable[tuple[int, nn.Layer]], choice: Recompute | None) -> None:
    """Sets what the decoder layers of a stage recompute when they train; None: nothing.

    Args:
        layers: number in the model and layer, in the order in which the stage runs them.
    """
    for position, (number, layer) in enumerate(layers):
        covered = choice if choice is not None and choice.covers(number, position) else None
        layer.recompute = layer.self_attn.recompute = covered


def recomputed(layer: nn.Layer, granularity: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, computed again in the backward pass if ``layer`` is to.

    Args:
        layer: has ``recompute``, its choice or None. Nothing is recomputed unless it trains.
        granularity: of ``function``; it runs plainly if the choice is another.
        function: returns a tensor, or a tuple of tensors and None.
    """
    choice = layer.recompute if layer.training and paddle.is_grad_enabled() else None
    if choice is None or choice.granularity != granularity:
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
