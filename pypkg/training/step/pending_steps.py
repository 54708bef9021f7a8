"""Losses and gradient norms of steps, kept on the device until a log line or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import paddle
import paddle.distributed as dist
from paddle import Tensor

from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import mean_over_token_shards, ranks_where
from pypkg.parallel.launch.rendezvous import named


class BadStep(Exception):
    """A step whose update must be undone. All ranks raise it at the same point of the run.

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
        losses: pending losses from a checkpoint; their steps are known to be good.
        has_loss_scale: whether there is a loss scale. A gradient norm that is not finite then
            lowers the scale and skips the update, and is not a fault.
        judge: returns what is wrong with the loss and the gradient norm of a step, or None. It is
            called once for each step, in order.
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
            loss: float32 scalar; its mean over the token shards is the loss of the step.
            grad_norm: float32 scalar, the same on all ranks.
        """
        self._waiting.append((step, loss, grad_norm))

    def fetch(self) -> list[float]:
        """Fetches all losses since ``clear`` in one copy. Every rank must call this.

        Raises:
            BadStep: the first step whose loss or norm is not finite, or that ``judge`` rejects.
        """
        if not self._waiting:
            return list(self._losses)
        steps, losses, norms = zip(*self._waiting, strict=True)
        means = mean_over_token_shards(paddle.stack(losses))
        values = paddle.stack([means, paddle.stack(norms)]).numpy().T.tolist()
        good, reason = len(values), ""
        for index, (loss, norm) in enumerate(values):
            reason = self._fault(loss, norm)
            if reason:
                good = index
                break
        agreed = _least(good)
        if agreed < len(values):
            reason = _first_reason(reason if good == agreed else "")
            raise BadStep(steps[agreed], reason, _culprits(losses[agreed]))
        self._losses += [loss for loss, _ in values]
        self._waiting.clear()
        return list(self._losses)

    def _fault(self, loss: float, norm: float) -> str:
        """The fault of a step; empty if the step is good."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm) and not self._has_loss_scale:
            return f"the gradient norm is {norm}"
        return self._judge(loss, norm) or ""

    def clear(self) -> None:
        """Removes all steps, after they have been logged."""
        self._losses, self._waiting = [], []


def _least(number: int) -> int:
    """The minimum of ``number`` over the ranks that train on the same samples.

    One of them may be the only rank that sees a fault. Ranks with other samples see it too, because
    they have the same mean losses.
    """
    current = mesh.current()
    for group in (current.tensor, current.context, current.pipeline):
        if group is not None:
            least = paddle.to_tensor([number], dtype="int64")
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
            number = int(least.numpy()[0])
    return number


def _first_reason(reason: str) -> str:
    """The reason given by the first rank that has one."""
    if mesh.current().world_size == 1:
        return reason
    reasons: list[str] = []
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons))


def _culprits(loss: Tensor) -> str:
    """The ranks whose loss is not finite, as text; empty for one process."""
    if mesh.current().world_size == 1:
        return ""
    ranks = ranks_where(not math.isfinite(float(loss)))
    return f" on {named(ranks)}" if ranks else ""
