"""Guards against a second backward pass, which Paddle's autograd does not detect."""

from __future__ import annotations

from collections.abc import Sequence

import paddle

_RAN_BEFORE = (
    "backward ran through this result before, and the tensors that it needs were freed. Compute "
    "the result again."
)


class BackwardGuard:
    """``backward_once`` for a PyLayer with several outputs.

    The gradients of all outputs may arrive in one backward pass; a second pass raises. The layer
    passes its outputs to ``watch`` and calls ``ran`` at the end of its backward.
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
    """Returns ``loss`` with a hook that makes a second backward pass through it raise.

    A PyLayer loses its context in the first backward pass, even with retain_graph, and a second
    pass ends the process (Paddle 3.3.1). The hook raises RuntimeError first; Paddle reports it as
    an OSError.
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
