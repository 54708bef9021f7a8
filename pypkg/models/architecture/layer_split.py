"""How pipeline parallelism cuts a model: which stage has which layers.

A pipeline has ``stages`` processes, each of which has ``virtual_stages`` parts of the model. Part k
belongs to stage k % stages, so that a batch goes round the stages ``virtual_stages`` times.
Nothing here imports Paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.errors import UserError


@dataclass(frozen=True)
class Part:
    """Consecutive layers of a model, and what it has before and after its layers.

    Attributes:
        layers: their numbers in the model.
        is_first: has the embedding.
        is_last: has the final norm and the head.
    """

    layers: range
    is_first: bool = True
    is_last: bool = True


def layer_ranges(num_layers: int, parts: int) -> list[range]:
    """The layers of each part.

    All have ``num_layers // parts`` of them. The layers that are left over go, one each, to the
    second part and those after it, and to the first if they suffice for it; the last never gets
    one. The embedding and the head count as no layer, but the part that has the head, which takes
    the time of several layers, comes last in line, and the part that has the embedding, and most
    batches in flight, comes before it.

    Raises:
        UserError: fewer layers than parts.
    """
    if num_layers < parts:
        raise UserError(
            f"num_hidden_layers ({num_layers}) is less than the {parts} parts that "
            "pipeline_parallel_degree x virtual_pp_degree makes; use fewer stages"
        )
    each, more = divmod(num_layers, parts)
    in_line = [*range(1, parts - 1), 0, parts - 1]
    larger = set(in_line[:more])
    ranges, start = [], 0
    for part in range(parts):
        stop = start + each + (part in larger)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def cut(num_layers: int, stages: int, virtual_stages: int = 1) -> list[Part]:
    """The parts in the order in which a batch goes through them; one is the whole model."""
    ranges = layer_ranges(num_layers, stages * virtual_stages)
    last = len(ranges) - 1
    return [Part(layers, k == 0, k == last) for k, layers in enumerate(ranges)]
