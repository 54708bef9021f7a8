"""Clipping by the global norm, for which every element of the whole model counts exactly once.

Each rank sums the squares of the gradients that no other rank sums. One all-reduce of a scalar over
all ranks then gives every rank the same norm. Fleet's optimizers hand over the gradients that they
hold, so one class serves every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        counts: False: none of them.
        columns: only the first so many of the last axis, which has ``width``; None: all.
        width: length of the last axis of the whole TP shard.
        start: index in the flattened gradient at which this rank's slice begins (ZeRO stage 3).
    """

    counts: bool
    columns: int | None = None
    width: int = 0
    start: int = 0

    def counted(self, gradient: Tensor) -> Tensor:
        """The elements that count; among them may be zeros for those that do not.

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
    """What this rank adds for a parameter, given data, context, tensor and pipeline
    parallelism.

    - Copies count on the first rank of ``replicas``: data and context rank 0.
    - A parameter that every rank of the tensor group holds whole counts on tensor rank 0.
    - Columns that neighbouring ranks share (``replicated_columns``, see tp_layers.py) count on the
      first of them.
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
        names: of the layers of the whole model; of what is outside layers, that of the module.
        of: index in ``names`` of the layer of each of this rank's parameters, by Paddle name.
    """

    names: tuple[str, ...]
    of: Mapping[str, int]


def layer_of(name: str) -> str:
    """The layer of the parameter ``name``: "layers.3", or the module's name outside layers."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first


class GlobalNormClip:
    """Measures the global norm and leaves the scaling of gradients to the optimizer's update.

    After each call ``norm`` is the norm and ``factor`` the number that gradients have to be
    multiplied by so that their norm is at most ``max_norm``: float32 scalars, the same on all
    ranks, not synchronised with the host. Where the norm is not finite, ``factor`` is NaN, which
    tells the optimizer to change nothing.

    Args:
        max_norm: 0 only measures.
        contributions: what this rank adds for each parameter, by its Paddle name.
        is_alone: whether there is one rank.
        unscale: returns the loss scale that gradients still hold. With it, the host waits for the
            norm, and gradients that are not finite set ``skipped``. None: the scale is 1.
        layers: of the whole model. With it, ``layer_norms`` is the norm of each of them after each
            call: float32 [layers], the same on all ranks. It takes one message more, and changes
            neither ``norm`` nor ``factor``.
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
        """Measures; all ranks have to call it.

        Args:
            params_grads: (parameter, gradient) of those that this rank updates; a gradient may be
                None.

        Returns:
            The pairs to update: those with a gradient, none of them where ``skipped`` is set.
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

    def _global_norm(self, held: list[tuple[Tensor, Tensor]]) -> Tensor:
        counted: list[Tensor] = []
        names = []
        for parameter, gradient in held:
            name = parameter.name
            contribution = self._contributions[name]
            if contribution.counts:
                counted.append(contribution.counted(gradient))
                names.append(name)
        if self._layers is not None:
            self.layer_norms = self._norms_of_layers(self._layers, names, counted)
        total = ops.squared_l2_norm(counted).squeeze()
        if not self._is_alone:
            dist.all_reduce(total)
        return total.sqrt()

    def _norms_of_layers(
        self, layers: Layers, names: Sequence[str], counted: Sequence[Tensor]
    ) -> Tensor:
        """
        Args:
            names: Paddle names of the parameters whose gradients are ``counted``.
        """
        groups: dict[int, list[Tensor]] = {}
        for name, gradient in zip(names, counted, strict=True):
            groups.setdefault(layers.of[name], []).append(gradient)
        sums = paddle.concat(
            [ops.squared_l2_norm(groups.get(index, ())) for index in range(len(layers.names))]
        )
        if not self._is_alone:
            dist.all_reduce(sums)
        return sums.sqrt()
