"""The residual connections of a branch of a layer (attention or MLP): pre-norm, post-norm, ..."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

# The output of a branch, and the residual stream to which it is added. None: the output is already
# the whole residual stream.
State = tuple[paddle.Tensor, paddle.Tensor | None]
Branch = Callable[[paddle.Tensor], paddle.Tensor]


def _pre(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """Pre-norm: x + branch(norm(x))."""
    x, stream = norm(*state)
    return branch(x), stream


def _normed(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """alpha * norm(x) + branch(norm(x)), as in ChatGLM-6B and in some configurations of BLOOM."""
    x, _ = norm(*state)
    return branch(x), x * alpha


def _post(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """Post-norm: norm(x + branch(x)), which is the whole residual stream."""
    x, _ = state
    return norm(branch(x), x)[0], None


# By ``ModelConfig.residual``; each takes the norm, the branch, the state and ``residual_alpha``.
RESIDUALS = {"pre": _pre, "normed": _normed, "post": _post}
