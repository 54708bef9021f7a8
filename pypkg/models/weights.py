"""Weight maps: which tensors of a checkpoint make up which parameter, read in both directions.

A map is data. Reading it from left to right imports a checkpoint, from right to left exports one,
of parameters or of anything shaped like them, gradients for example. Arrays are NumPy; bfloat16
travels as its bits in uint16. Nothing here imports Paddle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pypkg.errors import UserError

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_MAX_LISTED = 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter of ours and what holds it in a checkpoint; ``{i}`` stands for the layer.

    Several sources are joined along their first axis, which is the output axis of a matrix, in
    the given order; ``sizes`` are their lengths there. ``transpose`` then turns the [out, in] of
    the checkpoint into the [in, out] of a Paddle linear layer.
    """

    name: str
    sources: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transpose: bool = False


class WeightMap:
    """The weights of a family.

    Args:
        weights: one entry per kind of parameter; entries that a model has no parameter for, such
            as the bias of a layer without bias, are not used.
        ignored: regular expressions for whole names in a checkpoint that are not parameters.
    """

    def __init__(self, weights: Iterable[Weight], ignored: Iterable[str] = ()) -> None:
        self._weights = {weight.name: weight for weight in weights}
        self._ignored = [re.compile(pattern) for pattern in ignored]

    def is_ignored(self, source: str) -> bool:
        """Whether a tensor of a checkpoint is known not to be a parameter."""
        return any(pattern.fullmatch(source) for pattern in self._ignored)

    def source_shapes(self, name: str, shape: Sequence[int]) -> dict[str, Shape]:
        """The tensors that hold the parameter ``name`` of ``shape``, with their shapes."""
        weight, sources = self._find(name)
        joined = tuple(shape)[::-1] if weight.transpose else tuple(shape)
        sizes = weight.sizes or (joined[0],)
        return {source: (size, *joined[1:]) for source, size in zip(sources, sizes, strict=True)}

    def to_model(self, name: str, sources: Sequence[np.ndarray]) -> np.ndarray:
        """The parameter ``name`` from its tensors, which are in the order of source_shapes."""
        weight, _ = self._find(name)
        joined = sources[0] if len(sources) == 1 else np.concatenate(sources, axis=0)
        return np.ascontiguousarray(joined.T if weight.transpose else joined)

    def to_checkpoint(self, name: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors that hold ``value``, the parameter ``name`` or something shaped like it."""
        weight, sources = self._find(name)
        joined = value.T if weight.transpose else value
        parts = np.split(joined, np.cumsum(weight.sizes)[:-1]) if weight.sizes else [joined]
        return {
            source: np.ascontiguousarray(part) for source, part in zip(sources, parts, strict=True)
        }

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
        number = _LAYER_NUMBER.search(name)
        template = name if number is None else _LAYER_NUMBER.sub(".{i}.", name, count=1)
        weight = self._weights[template]
        layer = "" if number is None else number.group(1)
        return weight, [source.replace("{i}", layer) for source in weight.sources]
