"""One process reads for all that train on the same samples.

Those are the processes of a tensor group, in every stage of their pipeline. The first of them, of
tensor rank 0 in the first stage, reads; what it has goes along the pipeline to the first of each
tensor group, and from there to the rest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import paddle.distributed as dist

from pypkg.data import Batch
from pypkg.errors import UserError
from pypkg.parallel import mesh

T = TypeVar("T")


def is_reader() -> bool:
    """Whether this process reads for those that train on the same samples."""
    current = mesh.current()
    return current.pipeline_rank == 0 and current.tensor_rank == 0


def from_reader(make: Callable[[], T]) -> T:
    """What ``make`` gives, which is called in the reader alone and has to be picklable.

    All processes that train on the same samples have to call this.

    Raises:
        UserError: the reader's, in all of them.
        RuntimeError: another error of the reader, in the others; in the reader, that error.
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
    """The batches of the reader, in every process that trains on the same samples.

    Each has to ask for the next one at the same point of its work. Errors of the reader are raised
    as by :func:`from_reader`.
    """

    def __init__(self, source: Iterator[Batch] | None) -> None:
        """
        Args:
            source: of the reader; None in the others.
        """
        self._source = source

    def __next__(self) -> Batch:
        batch = from_reader(lambda: next(self._source, None))
        if batch is None:
            raise StopIteration
        return batch


def _share(value: Any) -> Any:
    """``value`` of the reader."""
    current = mesh.current()
    if current.pipeline is not None and current.tensor_rank == 0:
        value = _broadcast(value, current.pipeline)
    if current.tensor is not None:
        value = _broadcast(value, current.tensor)
    return value


def _broadcast(value: Any, group: dist.communication.group.Group) -> Any:
    """``value`` of the first process of ``group``."""
    told = [value]
    dist.broadcast_object_list(told, src=group.ranks[0], group=group)
    return told[0]
