"""Division of a model into pipeline stages.

Each of the ``stages`` pipeline stages has ``virtual_stages`` model chunks (interleaved schedule of
Narayanan et al., 2021). Chunk k belongs to stage k % stages, so that a micro batch visits every
stage ``virtual_stages`` times. Nothing here imports Paddle.
"""

from __future__ import annotations

from dataclasses import dataclass

from pypkg.errors import UserError


@dataclass(frozen=True)
class ModelChunk:
    """Consecutive layers of a model; the first chunk has the embedding, the last one the head.

    Attributes:
        layers: indices of the layers in the model, from 0.
        is_first: whether the chunk has the embedding.
        is_last: whether the chunk has the final norm and the head.
    """

    layers: range
    is_first: bool = True
    is_last: bool = True


def layer_ranges(num_layers: int, chunks: int) -> list[range]:
    """Layer indices of each model chunk, in the order of a forward pass.

    Each chunk has ``num_layers // chunks`` layers. The remaining layers go to the second and the
    following chunks, one each, then to the first chunk, and never to the last one. The last chunk
    has the head, which takes the time of several layers. The first chunk has the embedding and the
    most micro batches in flight.

    Raises:
        UserError: there are fewer layers than chunks.
    """
    if num_layers < chunks:
        raise UserError(
            f"num_hidden_layers ({num_layers}) is less than the number of model chunks, "
            f"pipeline_parallel_degree x virtual_pp_degree ({chunks}); use fewer stages"
        )
    each, more = divmod(num_layers, chunks)
    in_line = [*range(1, chunks - 1), 0, chunks - 1]
    larger = set(in_line[:more])
    ranges, start = [], 0
    for chunk in range(chunks):
        stop = start + each + (chunk in larger)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def cut(num_layers: int, stages: int, virtual_stages: int = 1) -> list[ModelChunk]:
    """The model chunks in the order of a forward pass. A single chunk is the whole model.

    Raises:
        UserError: there are fewer layers than chunks.
    """
    ranges = layer_ranges(num_layers, stages * virtual_stages)
    last = len(ranges) - 1
    return [ModelChunk(layers, k == 0, k == last) for k, layers in enumerate(ranges)]
