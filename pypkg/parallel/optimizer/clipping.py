"""Clipping by the global gradient norm, in which every element of the model counts exactly once.

Each rank sums the squares of the gradients that no other rank counts. One all-reduce of a scalar
over all ranks then gives every rank the same norm. Fleet's optimizers pass the gradients that their
rank holds, so the same class serves every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import paddle
import paddle.distributed as dist
from paddle import Tensor

from pypkg import ops
from pypkg.parallel.mesh import Mesh

HALF = (paddle.float16, paddle.bfloat16)


@dataclass(frozen=True)
class NormContribution:
    """Which elements of one gradient this rank adds to the global norm.

    Attributes:
        counts: whether it adds any.
        columns: number of leading columns (last axis) that it adds; None: all.
        width: length of the last axis of the TP shard.
        start: index in the flattened gradient at which this rank's slice begins (ZeRO stage 3).
    """

    counts: bool
    columns: int | None = None
    width: int = 0
    start: int = 0

    def counted(self, gradient: Tensor) -> Tensor:
        """The elements to add. Elements that do not count are cut off or zero.

        Args:
            gradient: [..., width], or the flat slice of it that this rank holds.
        """
        if self.columns is None:
            return gradient
        if gradient.ndim == 1:  # a flat slice, or a bias
            place = paddle.arange(self.start, self.start + gradient.shape[0])
            return gradient * (place % self.width < self.columns).astype(gradient.dtype)
        return gradient[..., : self.columns]


def norm_contribution(parameter: Tensor, mesh: Mesh) -> NormContribution:
    """What this rank adds for a parameter under data, context, tensor and pipeline parallelism.

    - Of the replicas of a parameter, only that of data and context rank 0 counts.
    - A parameter that every rank of the tensor group holds whole counts on tensor rank 0.
    - Columns that consecutive ranks replicate (``replicated_columns``, see tp_layers.py) count on
      the first of them.
    - ``counted_elsewhere`` marks the copy of a tied embedding that another pipeline stage counts.
    """
    if mesh.replica_rank > 0 or getattr(parameter, "counted_elsewhere", False):
        return NormContribution(False)
    if not parameter.is_distributed and mesh.tensor_rank > 0:
        return NormContribution(False)
    start, copies = getattr(parameter, "replicated_columns", (None, 1))
    if mesh.tensor_rank % copies == 0:
        start = None
    return NormContribution(True, start, parameter.shape[-1])


@dataclass(frozen=True)
class Layers:
    """The layers whose gradient norms are measured.

    Attributes:
        names: results of ``layer_of`` for the whole model, each once.
        of: index in ``names`` for each of this rank's parameters, by Paddle name.
    """

    names: tuple[str, ...]
    of: Mapping[str, int]


def layer_of(name: str) -> str:
    """The layer of the parameter ``name``: "layers.3", or its module, such as "embed_tokens"."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first


class GlobalNormClip:
    """Measures the global norm. The optimizer's update multiplies the gradients by ``factor``.

    Attributes (after each call, the same on all ranks):
        norm: the global norm without the loss scale, a float32 scalar on the device.
        factor: the factor of the gradients: min(1, max_norm / (norm + 1e-6)) / loss scale, a
            float32 scalar on the device. NaN if the norm is not finite: the optimizer then changes
            no parameter.
        skipped: whether gradients were not finite; only with ``unscale``.
        layer_norms: the norm of each of ``layers``, float32 [layers], or None.

    Args:
        max_norm: 0: measures but does not clip.
        contributions: what this rank adds for each parameter, by its Paddle name.
        is_alone: whether the run has one rank.
        unscale: returns the loss scale that the gradients contain. With it, the host waits for the
            norm. None: the scale is 1.
        layers: of the whole model; they cost one more all-reduce. None: not measured.
    """

    def __init__(
        self,
        max_norm: float,
        contributions: Mapping[str, NormContribution],
        is_alone: bool,
        unscale: Callable[[], float] | None = None,
        layers: Layers | None = None,
    ) -> None:
        self.max_norm = max_norm
        self.norm: Tensor
        self.factor: Tensor
        self.skipped = False
        self._contributions = contributions
        self._is_alone = is_alone
        self._unscale = unscale
        self._layers = layers
        self.layer_norms: Tensor | None = None

    @paddle.no_grad()
    def __call__(self, params_grads: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Measures the norm. Every rank must call this.

        Args:
            params_grads: (parameter, gradient) of the parameters that this rank updates; a gradient
                may be None.

        Returns:
            The pairs with a gradient; none if ``skipped`` is set.
        """
        held = [pair for pair in params_grads if pair[1] is not None]
        self.norm = self._global_norm(held)
        scale = 1.0 if self._unscale is None else self._unscale()
        if scale != 1.0:
            self.norm = self.norm / scale
            if self.layer_norms is not None:
                self.layer_norms = self.layer_norms / scale
        self.skipped = self._unscale is not None and not paddle.isfinite(self.norm).item()
        if self.skipped:
            return []
        if self.max_norm > 0:
            self.factor = paddle.clip(self.max_norm / (self.norm + 1e-6), max=1.0)
            if scale != 1.0:
                self.factor = self.factor * paddle.full([], 1.0 / scale)
        else:
            self.factor = paddle.full([], 1.0 / scale)
        self.factor = self.factor + self.norm * 0.0  # NaN where the norm is not finite
        return held

    @cached_property
    def _adds_all(self) -> bool:
        """Whether this rank adds every gradient whole."""
        return all(each.counts and each.columns is None for each in self._contributions.values())

    def _global_norm(self, held: list[tuple[Tensor, Tensor]]) -> Tensor:
        if self._adds_all and self._layers is None:  # nothing to look up for each gradient
            counted = [gradient for _, gradient in held]
        else:
            named = [
                (parameter.name, contribution.counted(gradient))
                for parameter, gradient in held
                if (contribution := self._contributions[parameter.name]).counts
            ]
            counted = [gradient for _, gradient in named]
            if self._layers is not None:
                self.layer_norms = self._norms_of_layers(self._layers, named)
        total = ops.squared_l2_norm(counted).squeeze()
        if not self._is_alone:
            dist.all_reduce(total)
        return total.sqrt()

    def _norms_of_layers(self, layers: Layers, named: Sequence[tuple[str, Tensor]]) -> Tensor:
        """The gradient norm of each layer, float32 [layers].

        Args:
            named: Paddle names of parameters, and the elements of their gradients that this rank
                adds.
        """
        groups: dict[int, list[Tensor]] = {}
        for name, gradient in named:
            groups.setdefault(layers.of[name], []).append(gradient)
        sums = paddle.concat(
            [ops.squared_l2_norm(groups.get(index, ())) for index in range(len(layers.names))]
        )
        if not self._is_alone:
            dist.all_reduce(sums)
        return sums.sqrt()
