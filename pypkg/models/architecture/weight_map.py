"""Weight maps: which tensors of a checkpoint make up which parameter, read in both directions.

A map is data. Reading it from left to right imports a checkpoint, from right to left exports one,
of parameters or of anything shaped like them, gradients for example. Arrays are NumPy; bfloat16
travels as its bits in uint16. Nothing here imports Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pypkg.errors import UserError

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer, or of an expert in it
_COPY = re.compile(r"(?:^|(?<=\.))\w+\.\d+\.")  # what there are several of, and which one it is
_MAX_LISTED = 20

Shape = tuple[int, ...]
Range = tuple[int, int]  # from, up to


def kind_of(name: str) -> str:
    """The name of a parameter without layer and index: what all of its kind have in common.

    ``layers.3.self_attn.o_proj.weight`` is a ``self_attn.o_proj.weight``. Of what a layer has
    several of, such as ``layers.3.mlp.experts.7.up_proj.weight``, each is a ``mlp.up_proj.weight``.
    """
    return _COPY.sub("", name)


@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs several matrices into one output axis: [groups, matrices, size].

    Parameters here are [matrices, groups, size]; ``order`` lists the checkpoint's index of each
    matrix. Query, key and value within each head are ``Packing(num_heads, (0, 1, 2))``, and two
    halves in reverse order are ``Packing(1, (1, 0))``. ``widths`` are the relative sizes of the
    matrices of a group, in the checkpoint's order, where they differ: four queries that share a
    key and a value are ``Packing(num_key_value_heads, (0, 1, 2), (4, 1, 1))``.
    """

    groups: int
    order: tuple[int, ...]
    widths: tuple[int, ...] = ()

    def to_model(self, value: np.ndarray) -> np.ndarray:
        """``value``, a NumPy array of any dtype, with its first axis in the model's order."""
        return value[self._places(len(value))]

    def to_checkpoint(self, value: np.ndarray) -> np.ndarray:
        """The inverse of ``to_model``."""
        return value[np.argsort(self._places(len(value)))]

    def _places(self, length: int) -> np.ndarray:
        """The checkpoint's index of each entry of the model's axis of ``length``."""
        grouped = np.arange(length).reshape(self.groups, -1)
        widths = np.array(self.widths or (1,) * len(self.order))
        ends = np.cumsum(widths) * grouped.shape[1] // widths.sum()
        parts = np.split(grouped, ends[:-1], axis=1)
        return np.concatenate([parts[index].reshape(-1) for index in self.order])


@dataclass(frozen=True)
class Weight:
    """One parameter of ours and what holds it in a checkpoint.

    ``{}`` in names stands for an index: of the layer, then of what a layer has several of, such as
    ``model.layers.{}.mlp.experts.{}.up_proj.weight``. A source may number them, ``{0}`` and
    ``{1}``, where its order is another, or leave some out.

    Several sources are joined along their first axis, which is the output axis of a matrix, in
    the given order; ``sizes`` are their lengths there. ``packing`` then puts that axis in our
    order, and ``transpose`` turns the [out, in] of the checkpoint into the [in, out] of a Paddle
    linear layer. ``turned`` says that the checkpoint stores each matrix the other way round from
    what the rest of the entry describes, [in, out] for [out, in].
    """

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transpose: bool = False
    packing: Packing | None = None
    turned: bool = False

    def turn(self, value: np.ndarray) -> np.ndarray:
        """A tensor of the checkpoint the way round that the entry describes, and back."""
        return value.T if self.turned else value


def same_layout(names: Mapping[str, str]) -> list[Weight]:
    """Weights and biases of layers that a checkpoint stores as we do: norms and tables.

    Args:
        names: our layer to theirs, without the ending.
    """
    return [
        Weight(f"{ours}.{kind}", (f"{theirs}.{kind}",))
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    ]


def linear(
    ours: str,
    theirs: str | Sequence[str],
    sizes: Sequence[int] = (),
    transpose: bool = True,
    packing: Packing | None = None,
) -> list[Weight]:
    """Weight and bias of a linear layer; see ``Weight``.

    Args:
        ours: our layer, without the ending.
        theirs: its layer or layers in the checkpoint.
        transpose: whether the checkpoint stores [out, in].
    """
    layers = (theirs,) if isinstance(theirs, str) else theirs
    return [
        Weight(
            f"{ours}.{kind}",
            tuple(f"{layer}.{kind}" for layer in layers),
            tuple(sizes),
            transpose and kind == "weight",
            packing,
        )
        for kind in ("weight", "bias")
    ]


class WeightMap:
    """The weights of a family.

    Args:
        weights: one entry per kind of parameter; entries that a model has no parameter for, such
            as the bias of a layer without bias, are not used.
        ignored: regular expressions for whole names in a checkpoint that are not parameters.
        prefix: what some checkpoints leave out: released ones are at times of the model without
            its head, which the original implementation loads as well.
    """

    def __init__(
        self, weights: Iterable[Weight], ignored: Iterable[str] = (), prefix: str = ""
    ) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._patterns = tuple(ignored)
        self._ignored = [re.compile(pattern) for pattern in self._patterns]
        self._prefix = prefix

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The entries, one per kind of parameter."""
        return tuple(self._weights.values())

    def fitted_to(self, found: Iterable[str]) -> WeightMap:
        """The map for a checkpoint with the names ``found``: without the prefix if it has none."""
        prefix = self._prefix
        if not prefix or any(name.startswith(prefix) for name in found):
            return self
        weights = (
            replace(weight, sources=tuple(name.removeprefix(prefix) for name in weight.sources))
            for weight in self._weights.values()
        )
        escaped = re.escape(prefix)
        return WeightMap(weights, (pattern.removeprefix(escaped) for pattern in self._patterns))

    def is_ignored(self, source: str) -> bool:
        """Whether a tensor of a checkpoint is known not to be a parameter."""
        return any(pattern.fullmatch(source) for pattern in self._ignored)

    def holds(self, name: str) -> bool:
        """Whether checkpoints of the family hold the parameter ``name``."""
        return _INDEX.sub("{}", name) in self._weights

    def source_shapes(self, name: str, shape: Sequence[int]) -> dict[str, Shape]:
        """The tensors that hold the parameter ``name`` of ``shape``, with their shapes."""
        weight, sources = self._find(name)
        joined = tuple(shape)[::-1] if weight.transpose else tuple(shape)
        sizes = weight.sizes or (joined[0],)
        shapes = [(size, *joined[1:]) for size in sizes]
        if weight.turned:
            shapes = [each[::-1] for each in shapes]
        return dict(zip(sources, shapes, strict=True))

    def to_model(self, name: str, sources: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter ``name`` from its tensors, which are in the order of source_shapes."""
        weight, _ = self._find(name)
        parts = [weight.turn(source) for source in sources]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
        if weight.packing:
            joined = weight.packing.to_model(joined)
        return np.ascontiguousarray(joined.T if weight.transpose else joined)

    def read_ranges(
        self,
        name: str,
        shape: Sequence[int],
        axis: int,
        ranges: Sequence[Range],
        read: Callable[[str, Sequence[slice]], np.ndarray],
    ) -> np.ndarray:
        """``ranges`` of an axis of the parameter ``name``, concatenated; nothing else is read.

        Args:
            shape: of the whole parameter.
            axis: of the parameter that ``ranges`` index.
            ranges: (start, stop) pairs, such as those of a TP shard.
            read: returns the elements of a tensor of the checkpoint, given its name and slices.
        """
        weight, sources = self._find(name)
        if weight.transpose:
            axis = len(shape) - 1 - axis
        if axis == 0:
            pieces = [
                weight.turn(read(source, self._stored_slices(weight, shape, cut)))
                for source, cut in self._runs(name, shape, ranges)
            ]
            joined = np.concatenate(pieces, axis=0)
            return np.ascontiguousarray(joined.T if weight.transpose else joined)
        before = (slice(None),) * axis
        parts = [
            [
                read(source, self._stored_slices(weight, shape, (*before, slice(*bounds))))
                for bounds in ranges
            ]
            for source in sources
        ]
        stored_axis = len(shape) - 1 - axis if weight.turned else axis
        return self.to_model(name, [np.concatenate(each, axis=stored_axis) for each in parts])

    @staticmethod
    def _stored_slices(weight: Weight, shape: Sequence[int], cut: Sequence[slice]) -> list[slice]:
        """``cut``, slices of a matrix as the entry describes it, for the matrix as it is stored."""
        if not weight.turned:
            return list(cut)
        return [*cut, *[slice(None)] * (len(shape) - len(cut))][::-1]

    def _runs(
        self, name: str, shape: Sequence[int], ranges: Sequence[Range]
    ) -> list[tuple[str, tuple[slice]]]:
        """Source and slice of its first axis, in the order that makes up ``ranges``."""
        weight, sources = self._find(name)
        length = shape[-1] if weight.transpose else shape[0]
        sizes = weight.sizes or (length,)
        rows = np.arange(length)  # where each entry of ours lies among the joined sources
        if weight.packing:
            rows = weight.packing.to_model(rows)
        rows = np.concatenate([rows[start:stop] for start, stop in ranges])
        offsets = np.cumsum((0, *sizes))
        owners = np.searchsorted(offsets, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owners) != 0)) + 1
        runs = []
        for run in np.split(rows, breaks):
            owner = np.searchsorted(offsets, run[0], side="right") - 1
            start = int(run[0] - offsets[owner])
            runs.append((sources[owner], (slice(start, start + len(run)),)))
        return runs

    def to_checkpoint(self, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors that hold ``value``, the parameter ``name`` or something shaped like it.

        They are views of it where the checkpoint has the same order of elements, transposed or not.
        """
        weight, sources = self._find(name)
        joined = value.T if weight.transpose else value
        if weight.packing:
            joined = weight.packing.to_checkpoint(joined)
        parts = np.split(joined, np.cumsum(weight.sizes)[:-1]) if weight.sizes else [joined]
        return {source: weight.turn(part) for source, part in zip(sources, parts, strict=True)}

    def check(
        self, parameters: Mapping[str, Sequence[int]], found: Mapping[str, Shape], where: str
    ) -> None:
        """Compares what the parameters need with the tensors ``found`` in the checkpoint ``where``.

        Raises:
            UserError: tensors are missing, superfluous or of another shape; all are listed.
        """
        expected: dict[str, Shape] = {}
        for name, shape in parameters.items():
            expected.update(self.source_shapes(name, shape))
        problems = [
            f"missing: {source} {list(shape)}"
            for source, shape in expected.items()
            if source not in found
        ]
        problems += [
            f"wrong shape: {source}: expected {list(shape)}, found {list(found[source])}"
            for source, shape in expected.items()
            if source in found and found[source] != shape
        ]
        problems += [
            f"not part of the model: {source} {list(shape)}"
            for source, shape in found.items()
            if source not in expected and not self.is_ignored(source)
        ]
        if problems:
            listed = problems[:_MAX_LISTED]
            if len(problems) > len(listed):
                listed.append(f"... and {len(problems) - len(listed)} more")
            raise UserError(
                f"the tensors in {where} do not fit its configuration:\n  "
                + "\n  ".join(listed)
                + "\ncheck that config.json, and the settings that override it, belong to these "
                "weights"
            )

    def _find(self, name: str) -> tuple[Weight, list[str]]:
        weight = self._weights[_INDEX.sub("{}", name)]
        indices = _INDEX.findall(name)
        return weight, [source.format(*indices) for source in weight.sources]
