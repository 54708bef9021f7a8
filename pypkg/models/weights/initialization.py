"""Random initial weights, with the standard deviations that the authors of each family chose.

A weight depends only on the seed, the name of its parameter and its index in the whole parameter.
Each rank therefore computes only its part, and the result is the same under every parallel layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from paddle import Tensor

from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import kind_of
from pypkg.models.weights.tp_shards import Range, TPShard, tp_shard, whole_shape
from pypkg.ops import random_normal_

# For packed matrices: the number of columns and the standard deviation of each.
Deviations = tuple[tuple[int, float], ...]

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def fill_random(
    out: Tensor,
    config: ModelConfig,
    name: str,
    seed: int,
    own_shape: Sequence[int],
    *,
    degree: int = 1,
    rank: int = 0,
    start: int = 0,
) -> None:
    """Overwrites ``out`` with random weights: a slice of this rank's TP shard of a matrix.

    ``out`` receives the elements of the flattened shard from ``start`` on. Elements beyond its end,
    and rows that pad a divided vocabulary, become 0.

    Args:
        out: contiguous, of any shape; float32, float16 or bfloat16.
        config: of the model.
        name: of the matrix.
        seed: of the run.
        own_shape: of the TP shard; of the whole matrix without tensor parallelism.
        degree, rank: of tensor parallelism.
        start: index of the slice's first element in the flattened shard.
    """
    shape = whole_shape(config, name, own_shape, degree)
    shard = tp_shard(config, name, degree, rank)
    pieces = [[_Piece(0, 0, length)] for length in own_shape]
    if shard is not None:
        pieces[shard.axis] = list(_held(shard))
    columns = list(_by_deviation(pieces[1], standard_deviation(config, name, shape)))
    stop = max(start, min(start + out.size, math.prod(own_shape)))
    rectangles = [
        (row, column, deviation)
        for rows_of_band, columns_of_band in _bands(start, stop, own_shape[1])
        for row in _cut(pieces[0], rows_of_band)
        for whole_column, deviation in columns
        for column in _cut([whole_column], columns_of_band)
    ]
    if sum(row.length * column.length for row, column, _ in rectangles) < out.size:
        out.detach().zero_()
    key, stream = _stream(seed, name)
    for row, column, deviation in rectangles:
        random_normal_(
            out, key=key, stream=stream, deviation=deviation,
            rows=row.length, cols=column.length,
            first=row.whole * shape[1] + column.whole, index_stride=shape[1],
            offset=row.own * own_shape[1] + column.own - start, out_stride=own_shape[1],
        )  # fmt: skip


def _stream(seed: int, name: str) -> tuple[int, int]:
    """The arguments ``key`` and ``stream`` of ``random_normal_`` for a matrix."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows or columns, from ``own`` on in the shard and ``whole`` in the matrix."""

    own: int
    whole: int
    length: int


def _held(shard: TPShard) -> Iterator[_Piece]:
    own = 0
    for start, stop in shard.ranges:
        yield _Piece(own, start, stop - start)
        own += stop - start


def _cut(pieces: Sequence[_Piece], band: Range) -> Iterator[_Piece]:
    """The parts of ``pieces`` inside ``band``, (start, stop) in the shard."""
    for piece in pieces:
        first, last = max(piece.own, band[0]), min(piece.own + piece.length, band[1])
        if first < last:
            yield _Piece(first, piece.whole + first - piece.own, last - first)


def _by_deviation(
    columns: Sequence[_Piece], deviation: float | Deviations
) -> Iterator[tuple[_Piece, float]]:
    if isinstance(deviation, float):
        yield from ((piece, deviation) for piece in columns)
        return
    begin = 0
    for width, each in deviation:
        for piece in columns:
            first = max(piece.whole, begin)
            last = min(piece.whole + piece.length, begin + width)
            if first < last:
                yield _Piece(piece.own + first - piece.whole, first, last - first), each
        begin += width


def _bands(start: int, stop: int, width: int) -> Iterator[tuple[Range, Range]]:
    """Divides elements [start, stop) of a flattened matrix into rectangles: (rows, columns)."""
    (first, begin), (last, end) = divmod(start, width), divmod(stop, width)
    if first == last:
        yield (first, first + 1), (begin, end)
        return
    if begin:
        yield (first, first + 1), (begin, width)
    yield (first + bool(begin), last), (0, width)
    yield (last, last + 1), (0, end)


def standard_deviation(config: ModelConfig, name: str, shape: Sequence[int]) -> float | Deviations:
    """The standard deviation of the normal distribution of the matrix ``name`` with ``shape``.

    It depends on ``config.initialization``, with L layers:

    - normal: ``initializer_range``;
    - scaled_residual: ``initializer_range``, divided by sqrt(2 L) for the last matrix of each
      branch (Radford et al., 2019; Megatron-LM, with which OPT and BLOOM were trained);
    - deepnorm: ``initializer_range`` outside the layers. Inside, sqrt(2 / (inputs + outputs))
      (Glorot and Bengio, 2010), multiplied by (2 L)^-0.5 in the MLP, the value projection and the
      attention output (Wang et al., 2022; Zeng et al., 2022, section 2.1).

    With ``mup_base_width``, that of hidden matrices is divided by the square root of
    ``width_factor``, and that of the head by ``width_factor`` (Yang et al., Tensor Programs V,
    2022, table 3).

    Returns:
        One number, or (columns, standard deviation) for each of several packed matrices.
    """
    scheme = chosen("initialization", config.initialization, _SCHEMES)
    deviation = scheme(config, name, shape)
    if isinstance(deviation, float) and config.mup_base_width is not None:
        if name.startswith("lm_head"):
            return deviation / config.width_factor
        if not name.startswith("embed_"):
            return deviation / math.sqrt(config.width_factor)
    return deviation


def _normal(config: ModelConfig, name: str, shape: Sequence[int]) -> float:
    return config.initializer_range


def _scaled_residual(config: ModelConfig, name: str, shape: Sequence[int]) -> float:
    if kind_of(name) in _OUTPUTS:
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


def _deepnorm(config: ModelConfig, name: str, shape: Sequence[int]) -> float | Deviations:
    beta = (2 * config.num_hidden_layers) ** -0.5
    (inputs, outputs), kind = shape, kind_of(name)
    if kind == "self_attn.qkv_proj.weight":
        widths = (config.query_size, config.key_value_size, config.key_value_size)
        gains = (1.0, 1.0, beta)
        return tuple((width, gain * _glorot(inputs, width)) for width, gain in zip(widths, gains))
    if kind == "mlp.gate_up_proj.weight":
        return beta * _glorot(inputs, outputs // 2)  # two packed matrices
    if kind in (*_OUTPUTS, "mlp.up_proj.weight"):
        return beta * _glorot(inputs, outputs)
    return config.initializer_range


def _glorot(inputs: int, outputs: int) -> float:
    return math.sqrt(2.0 / (inputs + outputs))


_SCHEMES: dict[str, Callable[[ModelConfig, str, Sequence[int]], float | Deviations]] = {
    "normal": _normal,
    "scaled_residual": _scaled_residual,
    "deepnorm": _deepnorm,
}
