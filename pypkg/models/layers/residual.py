"""The forms in which a branch of a layer, attention or MLP, joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import nn

# Output of a branch, and the residual stream that it is added to; None: the output is the stream.
State = tuple[paddle.Tensor, paddle.Tensor | None]
Branch = Callable[[paddle.Tensor], paddle.Tensor]


def _pre(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """x + branch(norm(x))."""
    x, stream = norm(*state)
    return branch(x), stream


def _normed(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """alpha * norm(x) + branch(norm(x)): one branch of DeepNorm (Wang et al., 2022)."""
    x, _ = norm(*state)
    return branch(x), x * alpha


def _post(norm: nn.Layer, branch: Branch, state: State, alpha: float) -> State:
    """norm(x + branch(x)), which is the whole stream."""
    x, _ = state
    return norm(branch(x), x)[0], None


# By ``ModelConfig.residual``; each takes the norm, the branch, the state and ``residual_alpha``.
RESIDUALS = {"pre": _pre, "normed": _normed, "post": _post}
