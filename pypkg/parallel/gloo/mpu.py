"""Replacements of operators of fleet's TP layers whose CPU kernel is missing or wrong."""

from __future__ import annotations

import importlib
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from pypkg.parallel.gloo.groups import ProcessGroup, group_numbered


class _Concat(PyLayer):
    """Concatenates the parts of all ranks on the last axis; the gradient of a part is its slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, size: int, group: ProcessGroup) -> Tensor:
        ctx.place = rank, size
        parts = paddle.empty([size, *x.shape], x.dtype)
        group.all_gather_into_tensor(parts, x, True)
        return paddle.concat(parts.unbind(0), axis=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank, size = ctx.place
        return paddle.split(gradient, size, axis=-1)[rank].contiguous()


class _Operators:
    """Replaces ``paddle._C_ops`` in fleet's mp_ops module; its methods take the same arguments."""

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle._C_ops, name)

    def c_identity(self, x: Tensor, *_: object) -> Tensor:
        return paddle.assign(x)

    def c_split(self, x: Tensor, rank: int, size: int, *_: object) -> Tensor:
        return paddle.split(x, size, axis=-1)[rank].contiguous()

    def c_concat(self, x: Tensor, rank: int, size: int, group: int, *_: object) -> Tensor:
        return _Concat.apply(x, rank, size, group_numbered(group).process_group)

    def c_embedding(self, weight: Tensor, ids: Tensor, start: int, vocab_size: int) -> Tensor:
        """The rows of ``weight`` for ``ids``; zeros for rows that another rank holds.

        Paddle's CPU kernel has a wrong gradient in float64.
        """
        own = (ids >= start) & (ids < start + weight.shape[0])
        places = paddle.where(own, ids - start, paddle.zeros_like(ids))
        rows = paddle.nn.functional.embedding(places, weight)
        return rows * own.astype(weight.dtype).unsqueeze(-1)


def install() -> None:
    """Replaces Paddle's operators by those of ``_Operators``."""
    module: Any = importlib.import_module("paddle.distributed.fleet.layers.mpu.mp_ops")
    module._C_ops = _Operators()
