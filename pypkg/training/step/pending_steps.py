"""Losses and gradient norms of steps, left on the device until a log line or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor

from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_sample_shards, ranks_where
from pypkg.parallel.launch.rendezvous import named


class BadStep(Exception):
    """A step whose update must not stay. All ranks raise it at the same place.

    Attributes:
        step: its number, from 1.
        reason: what is wrong, such as "the loss is nan".
    """

    def __init__(self, step: int, reason: str, where: str = "") -> None:
        super().__init__(f"{reason} at step {step}{where}")
        self.step, self.reason = step, reason


class PendingSteps:
    """The steps since the last log line.

    Args:
        losses: of steps that a checkpoint has as pending; they are known to be good.
        has_loss_scale: whether steps with a norm that is not finite are common: the loss scale is
            lowered, and nothing else changes.
        judge: given the loss and the gradient norm of a step, says what is wrong with them, or
            None. It is asked once for each step, in order.
    """

    def __init__(
        self,
        losses: Sequence[float] = (),
        *,
        has_loss_scale: bool = False,
        judge: Callable[[float, float], str | None] = lambda *_: None,
    ) -> None:
        self._losses = list(losses)
        self._has_loss_scale = has_loss_scale
        self._judge = judge
        self._waiting: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Keeps a step's results without waiting for the device.

        Args:
            loss: float32 scalar, whose mean over the sample shards is the loss of the step.
            grad_norm: float32 scalar, the same on all ranks.
        """
        self._waiting.append((step, loss, grad_norm))

    def fetch(self) -> list[float]:
        """Losses since ``clear``, fetched from the device in one go. All ranks have to call it.

        Raises:
            BadStep: the first step whose loss or norm is not finite, or that ``judge`` rejects.
        """
        if not self._waiting:
            return list(self._losses)
        steps, losses, norms = zip(*self._waiting, strict=True)
        means = mean_over_sample_shards(paddle.stack(losses))
        values = paddle.stack([means, paddle.stack(norms)]).numpy().tolist()
        for index, (step, loss, norm) in enumerate(zip(steps, *values, strict=True)):
            if not math.isfinite(loss):
                raise BadStep(step, f"the loss is {loss}", _culprits(losses[index]))
            if not math.isfinite(norm) and not self._has_loss_scale:
                raise BadStep(step, f"the gradient norm is {norm}")
            if reason := self._judge(loss, norm):
                raise BadStep(step, reason)
            self._losses.append(loss)
        self._waiting.clear()
        return list(self._losses)

    def clear(self) -> None:
        """Forgets all steps: they have been logged."""
        self._losses, self._waiting = [], []


def _culprits(loss: Tensor) -> str:
    """Which ranks have a loss that is not finite, where there are several."""
    if mesh.current().world_size == 1:
        return ""
    ranks = ranks_where(not math.isfinite(float(loss)))
    return f" on {named(ranks)}"
