"""Guards against what Paddle's autograd leaves to the user."""

from __future__ import annotations

import paddle


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
            raise RuntimeError(
                "backward ran through this loss before, and what it needs was given up then. "
                "Compute the loss again."
            )
        ran = True

    loss.register_hook(guard)
    return loss
