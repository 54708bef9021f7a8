"""Collectives that gloo lacks, composed of all-reduce, all-gather and broadcast.

All of them are synchronous; ``sync_op`` has no effect. They take the arguments of the methods of
``paddle.base.core.ProcessGroup`` that they replace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor
from paddle.base import core

from pypkg.parallel.gloo.groups import ProcessGroup
from pypkg.parallel.host_memory import to_host

_SUM, _AVG = core.ReduceOp.SUM, core.ReduceOp.AVG
# Paddle's own methods, bound before ``install`` replaces them.
_all_reduce = core.ProcessGroup.all_reduce
_all_gather = core.ProcessGroup.all_gather_into_tensor
_broadcast = core.ProcessGroup.broadcast
_scatter = core.ProcessGroup.scatter
_scatter_tensor = core.ProcessGroup.scatter_tensor


class Done:
    """The task object that Paddle expects from a collective. The work is already complete."""

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def all_reduce(
    group: ProcessGroup, tensor: Tensor, op: core.ReduceOp = _SUM, sync_op: bool = True
) -> Done:
    if op == _AVG:
        all_reduce(group, tensor, _SUM)
        tensor.scale_(1.0 / group.size())
    elif tensor.dtype == paddle.float16:  # gloo sums float16 wrongly
        wide = tensor.astype("float32")
        _all_reduce(group, wide, op, True)
        paddle.assign(wide.astype(tensor.dtype), tensor)
    else:
        _all_reduce(group, tensor, op, True)
    return Done()


def reduce(
    group: ProcessGroup,
    tensor: Tensor,
    destination: int,
    op: core.ReduceOp = _SUM,
    sync_op: bool = True,
) -> Done:
    total = tensor.clone()
    all_reduce(group, total, op)
    if group.rank() == destination:
        paddle.assign(total, tensor)
    return Done()


def broadcast(group: ProcessGroup, tensor: Tensor, source: int) -> Done:
    _broadcast(group, tensor, source, True)
    return Done()


def all_gather_into_tensor(
    group: ProcessGroup, out: Tensor, tensor: Tensor, sync_op: bool = True
) -> Done:
    _all_gather(group, out, tensor.contiguous(), True)
    return Done()


def all_gather(
    group: ProcessGroup, outs: Sequence[Tensor], tensor: Tensor, sync_op: bool = True
) -> Done:
    joined = paddle.empty([group.size(), *tensor.shape], tensor.dtype)
    all_gather_into_tensor(group, joined, tensor)
    for part, out in zip(joined.unbind(0), outs, strict=True):
        paddle.assign(part, out)
    return Done()


def reduce_scatter_tensor(
    group: ProcessGroup,
    out: Tensor,
    tensor: Tensor,
    op: core.ReduceOp = _SUM,
    sync_op: bool = True,
) -> Done:
    total = tensor.clone()
    all_reduce(group, total, op)
    own = total.reshape([group.size(), -1])[group.rank()]
    paddle.assign(own.reshape(out.shape), out)
    return Done()


def reduce_scatter(
    group: ProcessGroup,
    out: Tensor,
    tensors: Sequence[Tensor],
    op: core.ReduceOp = _SUM,
    sync_op: bool = True,
) -> Done:
    return reduce_scatter_tensor(group, out, paddle.stack(list(tensors)), op)


def all_to_all_single(
    group: ProcessGroup,
    out: Tensor,
    tensor: Tensor,
    out_sizes: Sequence[int] = (),
    sizes: Sequence[int] = (),
    sync_op: bool = True,
) -> Done:
    """
    Args:
        out_sizes, sizes: number of rows received from and sent to each rank; empty: equal numbers.
    """
    count, rank = group.size(), group.rank()
    table = [list(sizes) or [tensor.shape[0] // count] * count for _ in range(count)]
    most = tensor.shape[0]
    if out_sizes or sizes:
        rows = paddle.empty([count, count], "int64")
        all_gather_into_tensor(group, rows, paddle.to_tensor(table[rank], "int64"))
        table = [list(map(int, row)) for row in to_host(rows)]
        most = max(map(sum, table))
    padding = paddle.zeros([most - tensor.shape[0], *tensor.shape[1:]], tensor.dtype)
    joined = paddle.empty([count, most, *tensor.shape[1:]], tensor.dtype)
    all_gather_into_tensor(group, joined, paddle.concat([tensor, padding]))
    firsts = [sum(parts[:rank]) for parts in table]
    parts = [joined[i, first : first + table[i][rank]] for i, first in enumerate(firsts)]
    paddle.assign(paddle.concat(parts).reshape(out.shape), out)
    return Done()


def scatter(group: ProcessGroup, out: Tensor, tensors: Sequence[Tensor], source: int) -> Done:
    _scatter(group, out, tensors, source, True)
    return Done()


def scatter_tensor(group: ProcessGroup, out: Tensor, tensor: Tensor, source: int) -> Done:
    _scatter_tensor(group, out, tensor, source, True)
    return Done()


# Functions by the name of the Paddle method that they replace. A CPU has no streams, so the
# variants for the calculation stream of a GPU are the same functions.
METHODS: dict[str, Callable[..., Done]] = {
    "all_reduce": all_reduce,
    "allreduce": all_reduce,
    "all_reduce_on_calc_stream": all_reduce,
    "reduce": reduce,
    "reduce_on_calc_stream": reduce,
    "broadcast_on_calc_stream": broadcast,
    "all_gather_into_tensor": all_gather_into_tensor,
    "all_gather_into_tensor_on_calc_stream": all_gather_into_tensor,
    "all_gather_on_calc_stream": all_gather,
    "all_to_all_single": all_to_all_single,
    "all_to_all_single_on_calc_stream": all_to_all_single,
    "reduce_scatter": reduce_scatter,
    "reduce_scatter_on_calc_stream": reduce_scatter,
    "reduce_scatter_tensor": reduce_scatter_tensor,
    "reduce_scatter_tensor_on_calc_stream": reduce_scatter_tensor,
    "scatter_on_calc_stream": scatter,
    "scatter_tensor_on_calc_stream": scatter_tensor,
}


def install() -> None:
    """Replaces the methods of gloo's process groups by ``METHODS``."""
    for name, method in METHODS.items():
        setattr(ProcessGroup, name, paddle.no_grad()(method))
