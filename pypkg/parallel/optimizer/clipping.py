"""Clipping by the global norm, for which every element of the whole model counts exactly once.

Each process adds up the squares of the gradients that nobody else adds; one all-reduce of a scalar
over all processes gives each of them the same norm. Fleet's optimizers call the clip with the
gradients they hold, so that one class serves every way of dividing them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.nn.clip import ClipGradBase

from pypkg.parallel.mesh import Mesh

HALF = (paddle.float16, paddle.bfloat16)


@dataclass(frozen=True)
class Share:
    """What one process adds of one gradient.

    Attributes:
        counts: whether it adds any of it.
        columns: only the first so many of the last axis, which has ``width``; None: all.
        start: where in the flattened gradient the slice begins that the process holds.
    """

    counts: bool
    columns: int | None = None
    width: int = 0
    start: int = 0

    def squares(self, gradient: Tensor) -> Tensor:
        """Sum of squares of this process's share, a float32 scalar."""
        if gradient.dtype in HALF:
            gradient = gradient.astype("float32")  # whose squares overflow, in the sum at least
        if self.columns is not None:
            if gradient.ndim == 1:  # a flat slice, or a bias
                place = paddle.arange(self.start, self.start + gradient.shape[0])
                gradient = gradient * (place % self.width < self.columns).astype(gradient.dtype)
            else:
                gradient = gradient[..., : self.columns]
        return paddle._C_ops.squared_l2_norm(gradient).reshape([])


def tensor_share(parameter: Tensor, mesh: Mesh) -> Share:
    """By what tensor and pipeline parallelism make of a parameter.

    Parameters that every process of the tensor group has whole count on its first; columns that
    neighbours share (tp_layers.py), on the first of them; ``counted_elsewhere`` marks the copy of a
    tied embedding that another pipeline stage counts; data-parallel copies count once.
    """
    if mesh.data_rank > 0 or getattr(parameter, "counted_elsewhere", False):
        return Share(False)
    if not parameter.is_distributed and mesh.tensor_rank > 0:
        return Share(False)
    start, copies = getattr(parameter, "replicated_columns", (None, 1))
    if mesh.tensor_rank % copies == 0:
        start = None
    return Share(True, start, parameter.shape[-1])


class GlobalNormClip(ClipGradBase):
    """Measures the norm, and leaves it to the optimizer to scale gradients in its update.

    After each call ``norm`` is the norm, and ``factor`` what gradients have to be multiplied by so
    that it is at most ``max_norm``: float32 scalars that are the same on all processes and not yet
    synchronised with the host.

    Args:
        max_norm: 0 only measures.
        shares: what this process adds for each parameter, by its Paddle name.
        is_alone: whether there is no other process.
        unscale: the loss scale that gradients still hold; None: 1, and gradients that are not
            finite go on to the update. With a scale they do not: ``skipped`` is set instead.
    """

    def __init__(
        self,
        max_norm: float,
        shares: Mapping[str, Share],
        is_alone: bool,
        unscale: Callable[[], float] | None = None,
    ) -> None:
        super().__init__()
        self.max_norm = max_norm
        self.norm: Tensor | None = None
        self.factor: Tensor | None = None
        self.skipped = False
        self._shares = shares
        self._is_alone = is_alone
        self._unscale = unscale

    def __str__(self) -> str:
        return f"global norm at most {self.max_norm}"

    @paddle.no_grad()
    def _dygraph_clip(
        self, params_grads: list[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        held = [pair for pair in params_grads if pair[1] is not None]
        self.norm = self._global_norm(held)
        scale = 1.0 if self._unscale is None else self._unscale()
        if scale != 1.0:
            self.norm = self.norm / scale
        self.skipped = self._unscale is not None and not paddle.isfinite(self.norm).item()
        if self.skipped:
            return []
        self.factor = paddle.ones([]) if scale == 1.0 else paddle.full([], 1.0 / scale)
        if self.max_norm > 0:
            self.factor = self.factor * paddle.clip(self.max_norm / (self.norm + 1e-6), max=1.0)
        return held

    def _global_norm(self, held: list[tuple[Tensor, Tensor]]) -> Tensor:
        shares = [(self._shares[parameter.name], gradient) for parameter, gradient in held]
        squares = [share.squares(gradient) for share, gradient in shares if share.counts]
        total = paddle.stack(squares).sum() if squares else paddle.zeros([])
        if not self._is_alone:
            dist.all_reduce(total)
        return total.sqrt()
