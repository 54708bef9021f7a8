"""One rank of test_shared_batches.py. Arguments: degrees of data, pipeline and tensor."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from distributed_testing import report

from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.training.feed.distributed_batches import SharedBatches, from_reader, is_reader


def batches(failure: Exception | None = None) -> Iterator[dict[str, np.ndarray]]:
    """Three batches that tell whose they are, of the arrays that batches can hold."""
    shard = mesh.current().sample_shard
    for number in range(3):
        first = 1000 * shard + 10 * number
        yield {
            "input_ids": np.arange(first, first + 6).reshape(2, 3),
            "document_starts": np.full((2, 3), number, np.int32),
        }
    if failure is not None:
        raise failure


def shared(failure: Exception | None = None) -> Iterator[dict[str, np.ndarray]]:
    return SharedBatches(batches(failure) if is_reader() else None)


def caught(failure: Exception) -> list[str]:
    """What comes after three batches."""
    received = shared(failure)
    for _ in range(3):
        next(received)
    try:
        next(received)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def main(data: int, pipeline: int, tensor: int) -> None:
    current = mesh.initialize(mesh.Degrees(data=data, pipeline=pipeline, tensor=tensor))
    received = list(shared())
    report(
        {
            "reads": is_reader(),
            "shard": current.sample_shard,
            "batches": [
                {name: array.tolist() for name, array in batch.items()} for batch in received
            ],
            "dtypes": [str(array.dtype) for array in received[0].values()],
            "told": from_reader(lambda: ["corpus", current.rank]),
            "user_error": caught(UserError("a.bin: broken")),
            "other_error": caught(OSError("disk")),
            "after_errors": len(list(shared())),
        }
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
