"""One rank reads the samples for all ranks that train on the same ones.

These ranks differ only on the tensor, context and pipeline axes. The reader has rank 0 on all of
them. It broadcasts in its pipeline group. In each stage the receiver then broadcasts in its context
group, and each of these ranks in its tensor group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import paddle.distributed as dist
from paddle.distributed.communication.group import Group

from pypkg.data import Batch
from pypkg.errors import UserError
from pypkg.parallel import mesh

T = TypeVar("T")


def is_reader() -> bool:
    """Whether this rank reads for those that train on the same samples."""
    current = mesh.current()
    return current.pipeline_rank == current.context_rank == current.tensor_rank == 0


def from_reader(make: Callable[[], T]) -> T:
    """Calls ``make`` on the reader only, and returns its result (pickled) on all ranks.

    All ranks that train on the same samples must call this.

    Raises:
        UserError: raised by ``make``; on all of these ranks.
        RuntimeError: on the other ranks, for another error of ``make``, which the reader raises.
    """
    if not is_reader():
        value, error, is_users = _share(None)
        if error is not None:
            raise UserError(error) if is_users else RuntimeError(error)
        return value
    try:
        value = make()
    except Exception as error:
        is_users = isinstance(error, UserError)
        message = str(error) if is_users else f"the process that reads the samples: {error!r}"
        _share((None, message, is_users))
        raise
    _share((value, None, False))
    return value


class SharedBatches(Iterator[Batch]):
    """The reader's batches, on every rank that trains on the same samples.

    These ranks have to call ``next`` at the same points. Errors are those of :func:`from_reader`.
    """

    def __init__(self, source: Iterator[Batch] | None) -> None:
        """
        Args:
            source: the reader's batches; None on the other ranks.
        """
        self._source = source

    def __next__(self) -> Batch:
        batch = from_reader(self._read)
        if batch is None:
            raise StopIteration
        return batch

    def _read(self) -> Batch | None:
        assert self._source is not None  # only the reader reads
        return next(self._source, None)


def _share(value: Any) -> Any:
    """Broadcasts the reader's ``value`` to the ranks that train on the same samples."""
    current = mesh.current()
    if current.pipeline is not None and current.context_rank == current.tensor_rank == 0:
        value = _broadcast(value, current.pipeline)
    if current.context is not None and current.tensor_rank == 0:
        value = _broadcast(value, current.context)
    if current.tensor is not None:
        value = _broadcast(value, current.tensor)
    return value


def _broadcast(value: Any, group: Group) -> Any:
    """``value`` of the first rank of ``group``."""
    values = [value]
    dist.broadcast_object_list(values, src=group.ranks[0], group=group)
    return values[0]
