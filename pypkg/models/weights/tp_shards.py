"""The TP shard of each parameter that a rank holds under tensor parallelism.

A table gives the divided axis of each kind of parameter, in the layout of this package, and the
matrices that are packed along it. Each matrix is divided separately. A parameter without an entry
is replicated on all ranks. Nothing here imports Paddle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import kind_of

Range = tuple[int, int]  # start, stop


@dataclass(frozen=True)
class TPShard:
    """The shard of a parameter on one rank: concatenated ``ranges`` of ``axis``, then padding.

    Attributes:
        axis: divided axis of the parameter, in the layout of this package.
        ranges: (start, stop) pairs in the whole parameter, in the order of the shard.
        length: length of the shard along the axis, with zero padding after the ranges.
    """

    axis: int
    ranges: tuple[Range, ...]
    length: int

    def take(self, whole: np.ndarray) -> np.ndarray:
        """The padded shard of the parameter ``whole``, an array of any dtype."""
        return self.read(lambda cut: whole[tuple(cut)])

    def read(
        self, read: Callable[[Sequence[slice]], np.ndarray], rows: Range | None = None
    ) -> np.ndarray:
        """Reads the padded shard or some of its rows, and nothing else.

        Args:
            read: takes slices of the whole parameter, one per axis from the first on; returns the
                selected elements.
            rows: (start, stop) along the first axis of the shard; None: all.
        """
        before: tuple[slice, ...] = (slice(None),) * self.axis
        ranges, length = self.ranges, self.length
        if rows is not None and self.axis == 0:
            ranges, length = _cut(ranges, rows), rows[1] - rows[0]
        elif rows is not None:
            before = (slice(*rows), *before[1:])
        return self._padded(
            np.concatenate([read((*before, slice(*each))) for each in ranges], self.axis), length
        )

    def _padded(self, value: np.ndarray, length: int) -> np.ndarray:
        missing = length - value.shape[self.axis]
        if not missing:
            return value
        widths = [(0, missing if axis == self.axis else 0) for axis in range(value.ndim)]
        return np.pad(value, widths)

    def put(self, value: np.ndarray, whole: np.ndarray) -> None:
        """Writes the shard ``value`` into the parameter ``whole``, without the padding."""
        index, at = (slice(None),) * self.axis, 0
        for start, stop in self.ranges:
            whole[(*index, slice(start, stop))] = value[(*index, slice(at, at + stop - start))]
            at += stop - start


def _cut(ranges: Sequence[Range], rows: Range) -> tuple[Range, ...]:
    """The ranges of the whole parameter that ``rows`` of the concatenated ``ranges`` cover.

    If they cover none, the result is one empty range.
    """
    found, at = [], 0
    for start, stop in ranges:
        first, last = (min(max(row - at, 0), stop - start) for row in rows)
        found.append((start + first, start + last))
        at += stop - start
    return tuple(each for each in found if each[0] < each[1]) or ((0, 0),)


@dataclass(frozen=True)
class _Split:
    """The division of one kind of parameter.

    ``matrices`` maps (configuration, degree, rank) to one pair per matrix: its length along the
    axis, and the range of the rank.
    """

    axis: int  # of the weight; a bias has one axis
    matrices: Callable[[ModelConfig, int, int], list[tuple[int, Range]]]


def _even(length: int, degree: int, rank: int) -> tuple[int, Range]:
    each = length // degree
    return length, (rank * each, (rank + 1) * each)


def key_value_range(config: ModelConfig, degree: int, rank: int) -> Range:
    """(start, stop) of the key-value heads of a rank, which its query heads use.

    If there are fewer key-value heads than ranks, consecutive ranks hold the same head.
    """
    heads = config.num_key_value_heads
    start = rank * heads // degree
    return start, start + max(1, heads // degree)


def _query_key_value(config: ModelConfig, degree: int, rank: int) -> list[tuple[int, Range]]:
    start, stop = (head * config.head_dim for head in key_value_range(config, degree, rank))
    key_value = (config.key_value_size, (start, stop))
    return [_even(config.query_size, degree, rank), key_value, key_value]


def _vocabulary(config: ModelConfig, degree: int, rank: int) -> list[tuple[int, Range]]:
    rows = -(-config.vocab_size // degree)
    start = min(rank * rows, config.vocab_size)
    return [(config.vocab_size, (start, min(start + rows, config.vocab_size)))]


_TABLE: dict[str, _Split] = {
    "self_attn.qkv_proj": _Split(1, _query_key_value),
    "self_attn.o_proj": _Split(0, lambda c, n, r: [_even(c.query_size, n, r)]),
    "mlp.gate_up_proj": _Split(1, lambda c, n, r: [_even(c.intermediate_size, n, r)] * 2),
    "mlp.up_proj": _Split(1, lambda c, n, r: [_even(c.intermediate_size, n, r)]),
    "mlp.down_proj": _Split(0, lambda c, n, r: [_even(c.intermediate_size, n, r)]),
    "embed_tokens": _Split(0, _vocabulary),
    "lm_head": _Split(0, _vocabulary),
}


def tp_shard(config: ModelConfig, name: str, degree: int, rank: int) -> TPShard | None:
    """The shard of the parameter ``name`` on ``rank`` of ``degree``; None: the whole parameter."""
    layer, _, ending = kind_of(name).rpartition(".")
    split = _TABLE.get(layer)
    if degree == 1 or split is None or (ending == "bias" and split.axis == 0):
        return None
    ranges, start = [], 0
    for length, (first, last) in split.matrices(config, degree, rank):
        ranges.append((start + first, start + last))
        start += length
    padded = -(-start // degree) if split.matrices is _vocabulary else 0
    held = sum(stop - first for first, stop in ranges)
    return TPShard(0 if ending == "bias" else split.axis, tuple(ranges), max(padded, held))


def side_by_side(config: ModelConfig, name: str) -> tuple[int, tuple[int, ...]]:
    """The matrices packed in the parameter ``name``: their axis, and their lengths along it.

    The lengths are empty if tensor parallelism does not divide the parameter.
    """
    layer, _, ending = kind_of(name).rpartition(".")
    split = _TABLE.get(layer)
    if split is None or (ending == "bias" and split.axis == 0):
        return 0, ()
    axis = 0 if ending == "bias" else split.axis
    return axis, tuple(length for length, _ in split.matrices(config, 1, 0))


def whole_shape(
    config: ModelConfig, name: str, shape: Sequence[int], degree: int
) -> tuple[int, ...]:
    """Shape of the whole parameter ``name`` whose shards have ``shape``."""
    last = tp_shard(config, name, degree, degree - 1)
    if last is None:
        return tuple(shape)
    # The end of the last rank's last range is the end of the parameter.
    return (*shape[: last.axis], last.ranges[-1][1], *shape[last.axis + 1 :])


def tensor_parallel_problems(config: ModelConfig, degree: int) -> list[str]:
    """The reasons why ``degree`` ranks cannot divide the model; empty if they can."""
    problems = []
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {"num_attention_heads": heads, "intermediate_size": config.intermediate_size}
    for name, size in sizes.items():
        if size % degree:
            problems.append(
                f"{name} ({size}) is not divisible by tensor_parallel_degree ({degree}); use "
                f"{_listed(_degrees(config))}"
            )
    if key_value_heads % degree and degree % key_value_heads:
        problems.append(
            f"num_key_value_heads ({key_value_heads}) and tensor_parallel_degree ({degree}): one "
            f"must be a multiple of the other; use {_listed(_degrees(config))}"
        )
    if (degree - 1) * -(-config.vocab_size // degree) >= config.vocab_size:
        problems.append(
            f"vocab_size ({config.vocab_size}) is too small to give each of "
            f"tensor_parallel_degree ({degree}) ranks a row; use a smaller degree"
        )
    return problems


def _degrees(config: ModelConfig) -> list[int]:
    """The degrees up to 64 that can divide the model."""
    key_value_heads = config.num_key_value_heads
    return [
        degree
        for degree in range(1, 65)
        if config.num_attention_heads % degree == 0
        and config.intermediate_size % degree == 0
        and (key_value_heads % degree == 0 or degree % key_value_heads == 0)
    ]


def _listed(degrees: Sequence[int]) -> str:
    *first, last = map(str, degrees)
    return f"{', '.join(first)} or {last}" if first else last


def exchange_problems(config: ModelConfig, degree: int, tensor: int) -> list[str]:
    """The reasons why ``degree`` ranks cannot exchange heads for tokens; empty if they can.

    Args:
        degree: sep_parallel_degree.
        tensor: tensor_parallel_degree, which divides the heads first.
    """
    if degree <= 1:
        return []
    heads, keys = config.num_attention_heads // tensor, max(config.num_key_value_heads // tensor, 1)
    of_each = f" / tensor_parallel_degree ({tensor})" if tensor > 1 else ""
    way_out = "use another sep_parallel_degree, or context_parallel_degree instead"
    problems = []
    if heads % degree:
        problems.append(
            f"num_attention_heads ({config.num_attention_heads}){of_each} is not divisible by "
            f"sep_parallel_degree ({degree}); {way_out}"
        )
    if keys % degree and degree % keys:
        problems.append(
            f"num_key_value_heads ({config.num_key_value_heads}){of_each} and sep_parallel_degree "
            f"({degree}): one must be a multiple of the other; {way_out}"
        )
    return problems
