"""Weight maps: the correspondence between parameters and the tensors of a checkpoint.

The same map serves import and export, of parameters and of values of the same shape, such as
gradients. Arrays are NumPy arrays; bfloat16 is stored as its bits in uint16. Nothing here imports
Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from pypkg.errors import UserError

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # index of a layer, or of an expert in a layer
_COPY = re.compile(r"(?:^|(?<=\.))\w+\.\d+\.")  # a numbered part of a name, such as "layers.3."
_MAX_LISTED = 20

Shape = tuple[int, ...]
Range = tuple[int, int]  # start, stop


class Matrix(Protocol):
    """What exporting needs of an array, or of a tensor in parts."""

    @property
    def T(self) -> Any: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


Values = TypeVar("Values", bound=Matrix)


def kind_of(name: str) -> str:
    """The kind of a parameter: its name without numbered parts.

    The kind of ``layers.3.self_attn.o_proj.weight`` is ``self_attn.o_proj.weight``. The kind of
    ``layers.3.mlp.experts.7.up_proj.weight`` is ``mlp.up_proj.weight``.
    """
    return _COPY.sub("", name)


@dataclass(frozen=True)
class Packing:
    """The order in which a checkpoint packs several matrices into one output axis.

    The axis is [groups, matrices, size] in the checkpoint and [matrices, groups, size] here.
    Query, key and value within each head are ``Packing(num_heads, (0, 1, 2))``; two halves in
    reverse order are ``Packing(1, (1, 0))``; groups of four queries, one key and one value are
    ``Packing(num_key_value_heads, (0, 1, 2), (4, 1, 1))``.

    Args:
        groups: number of groups.
        order: for each matrix here, its index in a group of the checkpoint.
        widths: relative sizes of the matrices of a group, in the order of the checkpoint; empty if
            they are equal.
    """

    groups: int
    order: tuple[int, ...]
    widths: tuple[int, ...] = ()

    def to_model(self, value: np.ndarray) -> np.ndarray:
        """``value`` with its first axis rearranged from the checkpoint's order to the model's."""
        return value[self._places(len(value))]

    def to_checkpoint(self, value: Values) -> Values:
        """The inverse of ``to_model``."""
        return value[np.argsort(self._places(len(value)))]

    def _places(self, length: int) -> np.ndarray:
        """For each entry of the model's axis of ``length``, its index in the checkpoint."""
        grouped = np.arange(length).reshape(self.groups, -1)
        widths = np.array(self.widths or (1,) * len(self.order))
        ends = np.cumsum(widths) * grouped.shape[1] // widths.sum()
        parts = np.split(grouped, ends[:-1], axis=1)
        return np.concatenate([parts[index].reshape(-1) for index in self.order])


@dataclass(frozen=True)
class Weight:
    """A kind of parameter and the checkpoint tensors that hold it.

    ``{}`` in a name stands for an index: first that of the layer, then that of a numbered part of
    the layer, as in ``model.layers.{}.mlp.experts.{}.up_proj.weight``. A source that has the
    indices in another order, or only some of them, refers to them as ``{0}`` and ``{1}``.

    Import joins the sources along their first axis, the output axis of a matrix; then applies
    ``packing`` to this axis; then transposes.

    Args:
        name: of the parameter in this package.
        sources: names in the checkpoint, in the order in which they are joined.
        sizes: lengths of the sources along the first axis; empty for one source.
        transpose: whether [out, in] of the checkpoint becomes the [in, out] of a Paddle linear
            layer.
        packing: order of matrices along the joined axis; None: that of the model.
        turned: whether the checkpoint stores the transpose of what the other arguments describe,
            such as [in, out] instead of [out, in].
    """

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transpose: bool = False
    packing: Packing | None = None
    turned: bool = False

    def turn(self, value: Values) -> Values:
        """``value`` transposed if ``turned``; converts stored to described layout and back."""
        return value.T if self.turned else value


def same_layout(names: Mapping[str, str]) -> list[Weight]:
    """Weights and biases of layers that have the same layout in the checkpoint: norms, embeddings.

    Args:
        names: layer here -> layer in the checkpoint, without ".weight" and ".bias".
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
    """Weight and bias of a linear layer.

    Args:
        ours: layer here, without ".weight" and ".bias".
        theirs: layer or layers in the checkpoint.
        sizes, packing: see ``Weight``.
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
        weights: one entry per kind of parameter. Entries without a parameter in the model, such as
            the bias of a layer without bias, are not used.
        ignored: regular expressions that match whole names of tensors that are not parameters.
        prefix: prefix of the names in a checkpoint. Some released checkpoints hold a model without
            its head and do not have the prefix; the original implementations load them too.
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
        """This map for a checkpoint with the tensor names ``found``: without ``prefix`` if no name
        has it.
        """
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
        """Whether the checkpoint tensor ``source`` is known not to be a parameter."""
        return any(pattern.fullmatch(source) for pattern in self._ignored)

    def holds(self, name: str) -> bool:
        """Whether the map has an entry for the parameter ``name``."""
        return _INDEX.sub("{}", name) in self._weights

    def source_shapes(self, name: str, shape: Sequence[int]) -> dict[str, Shape]:
        """Names and shapes of the checkpoint tensors of the parameter ``name`` with ``shape``."""
        weight, sources = self._find(name)
        joined = tuple(shape)[::-1] if weight.transpose else tuple(shape)
        sizes = weight.sizes or (joined[0],)
        shapes = [(size, *joined[1:]) for size in sizes]
        if weight.turned:
            shapes = [each[::-1] for each in shapes]
        return dict(zip(sources, shapes, strict=True))

    def to_model(self, name: str, sources: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter ``name``, from its checkpoint tensors in the order of ``source_shapes``."""
        weight, _ = self._find(name)
        parts = [weight.turn(source) for source in sources]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)
        if weight.packing:
            joined = weight.packing.to_model(joined)
        return np.ascontiguousarray(joined.T if weight.transpose else joined)

    def read_slices(
        self,
        name: str,
        shape: Sequence[int],
        cut: Sequence[slice],
        read: Callable[[str, Sequence[slice]], np.ndarray],
    ) -> np.ndarray:
        """Reads only those elements of the parameter ``name`` that ``cut`` selects.

        Args:
            shape: of the whole parameter.
            cut: one slice per axis, with step 1; missing slices at the end select whole axes.
            read: takes the name of a checkpoint tensor and slices; returns the selected elements.
        """
        weight, _ = self._find(name)
        whole = [slice(None)] * (len(shape) - len(cut))
        bounds = [each.indices(n)[:2] for each, n in zip((*cut, *whole), shape, strict=True)]
        if weight.transpose:
            bounds.reverse()
        others = [slice(*each) for each in bounds[1:]]
        pieces = [
            weight.turn(read(source, self._stored_slices(weight, (run, *others))))
            for source, run in self._runs(name, shape, bounds[0])
        ]
        joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)
        return np.ascontiguousarray(joined.T if weight.transpose else joined)

    @staticmethod
    def _stored_slices(weight: Weight, cut: Sequence[slice]) -> list[slice]:
        """``cut``, slices of the matrix that ``weight`` describes, as slices of the stored one."""
        return list(cut)[::-1] if weight.turned else list(cut)

    def _runs(self, name: str, shape: Sequence[int], bounds: Range) -> list[tuple[str, slice]]:
        """(source, slice of its first axis) pairs whose concatenation is the range ``bounds``."""
        weight, sources = self._find(name)
        if bounds[0] >= bounds[1]:
            return [(sources[0], slice(0, 0))]
        length = shape[-1] if weight.transpose else shape[0]
        sizes = weight.sizes or (length,)
        rows = np.arange(length)  # for each entry of the parameter, its index in the joined sources
        if weight.packing:
            rows = weight.packing.to_model(rows)
        rows = rows[slice(*bounds)]
        offsets = np.cumsum((0, *sizes))
        owners = np.searchsorted(offsets, rows, side="right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owners) != 0)) + 1
        runs = []
        for run in np.split(rows, breaks):
            owner = np.searchsorted(offsets, run[0], side="right") - 1
            start = int(run[0] - offsets[owner])
            runs.append((sources[owner], slice(start, start + len(run))))
        return runs

    def to_checkpoint(self, name: str, value: Values) -> dict[str, Values]:
        """The checkpoint tensors of the parameter ``name``, by name.

        Args:
            value: the parameter, its gradient or its state. The results are views of it, except
                for an array that the checkpoint packs in another order.
        """
        weight, sources = self._find(name)
        joined = value.T if weight.transpose else value
        if weight.packing:
            joined = weight.packing.to_checkpoint(joined)
        bounds = accumulate(weight.sizes or (len(joined),), initial=0)
        parts = (joined[start:stop] for start, stop in pairwise(bounds))
        return {source: weight.turn(part) for source, part in zip(sources, parts, strict=True)}

    def check(
        self, parameters: Mapping[str, Sequence[int]], found: Mapping[str, Shape], where: str
    ) -> None:
        """Checks that a checkpoint has all tensors of the parameters and no others.

        Args:
            parameters: shapes of the parameters by name.
            found: shapes of the checkpoint tensors by name.
            where: the checkpoint, for the message.

        Raises:
            UserError: tensors are missing, superfluous or have another shape; up to 20 are listed.
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
