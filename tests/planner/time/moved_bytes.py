"""Bytes that Paddle's operators read and write, counted where rules call them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import paddle
import pytest

from pypkg import ops
from pypkg.parallel.optimizer.rules import muon

# Operators of the rules that are no views.
_METHODS = (
    "__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__", "__gt__",
    "square", "sqrt", "rsqrt", "sign", "sum", "abs", "max", "mean",
)  # fmt: skip
_FUNCTIONS = (
    "where", "index_select", "clip", "index_add", "concat",
)  # fmt: skip


class Moved:
    """Counts what is called while it patches Paddle.

    Attributes:
        bytes: of the arguments and results of operators; an operator within another is part of it.
        flops: of Muon's matrix products.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, self.flops, self._depth = 0, 0, 0
        for name in _METHODS:
            patch.setattr(paddle.Tensor, name, self._counted(getattr(paddle.Tensor, name)))
        for name in _FUNCTIONS:
            patch.setattr(paddle, name, self._counted(getattr(paddle, name)))
        patch.setattr(paddle.linalg, "norm", self._counted(paddle.linalg.norm))
        patch.setattr(paddle.Tensor, "astype", self._astype(paddle.Tensor.astype))
        patch.setattr(paddle, "assign", self._assign(paddle.assign))
        patch.setattr(ops, "adamw_", self._adamw(ops.adamw_))
        for name in ("dequantize_blockwise", "quantize_blockwise_", "stochastic_bfloat16"):
            patch.setattr(ops, name, self._counted(getattr(ops, name)))
        patch.setattr(muon, "_product", self._product)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._alone(function, *args, **kwargs)
            if not self._depth:
                self.bytes += _bytes((*args, *kwargs.values(), result))
            return result

        return call

    def _alone(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            self._depth -= 1

    def _astype(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: paddle.Tensor, dtype: Any) -> paddle.Tensor:
            result = self._alone(function, x, dtype)
            if not self._depth and result.dtype != x.dtype:  # else it is a view
                self.bytes += _bytes((x, result))
            return result

        return call

    def _assign(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: paddle.Tensor, output: paddle.Tensor) -> paddle.Tensor:
            if not self._depth and x is not output:
                self.bytes += 2 * _bytes([x])
            return self._alone(function, x, output)

        return call

    def _adamw(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(weights: Any, gradients: Any, first: Any, second: Any, *rest: Any, **kw: Any):
            masters = rest[2] or ()
            changed = _bytes((masters or weights, first, second))
            self.bytes += 2 * changed + _bytes((gradients, weights if masters else ()))
            return self._alone(function, weights, gradients, first, second, *rest, **kw)

        return call

    def _product(self, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
        """As on a GPU, where bfloat16 is multiplied and the result widened."""
        self.flops += 2 * x.shape[0] * x.shape[1] * y.shape[1]

        def product() -> paddle.Tensor:
            return paddle.matmul(*(each.astype("float32") for each in (x, y))).astype("bfloat16")

        return self._alone(product).astype("float32")


def _bytes(values: Iterable[Any]) -> int:
    return sum(each.size * each.element_size() for each in _tensors(values))


def _tensors(values: Iterable[Any]) -> Iterator[paddle.Tensor]:
    for each in values:
        if isinstance(each, paddle.Tensor):
            yield each
        elif isinstance(each, (list, tuple)):
            yield from _tensors(each)
