"""Guards against what Paddle's autograd leaves to the user."""

from __future__ import annotations

from collections.abc import Sequence

import paddle

_RAN_BEFORE = (
    "backward ran through this result before, and what it needs is gone since. Compute it again."
)


class BackwardGuard:
    """``backward_once`` for a PyLayer of several outputs: one backward may come through each.

    ``watch`` its outputs, and call ``ran`` in its backward.
    """

    def __init__(self) -> None:
        self._ran = False

    def ran(self) -> None:
        self._ran = True

    def watch(self, outputs: Sequence[paddle.Tensor]) -> None:
        for output in outputs:
            if not output.stop_gradient:
                output.register_hook(self._check)

    def _check(self, gradient: paddle.Tensor) -> None:
        if self._ran:
            raise RuntimeError(_RAN_BEFORE)


def backward_once(loss: paddle.Tensor) -> paddle.Tensor:
    """Lets backward run through the PyLayer that made ``loss`` only once.

    A PyLayer loses its context in its first backward, even with retain_graph, and a second one
    ends the process (Paddle 3.3.1). This raises instead; Paddle wraps the error in an OSError.
    """
    if loss.stop_gradient:
        return loss
    ran = False

    def guard(gradient: paddle.Tensor) -> None:
        nonlocal ran
        if ran:
            raise RuntimeError(_RAN_BEFORE)
        ran = True

    loss.register_hook(guard)
    return loss
