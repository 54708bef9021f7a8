"""The mean of gradients over a data-parallel group, in flat buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.distributed.communication.group import Group

# Fleet's default: large enough that bandwidth, not latency, determines the time of a message.
BUCKET_BYTES = 128 * 2**20


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The accumulated gradient, or None: ``main_grad`` (float32) where the parameter has it."""
    return parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad


def average_gradients(
    parameters: Iterable[Tensor], group: Group, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Calls ``average`` with the gradients of those ``parameters`` that have one."""
    gradients = [gradient_of(parameter) for parameter in parameters]
    average([g for g in gradients if g is not None], group, bucket_bytes)


@paddle.no_grad()
def average(gradients: Sequence[Tensor], group: Group, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replaces each gradient by its mean over ``group``. Every rank of the group must call this.

    One bucket at a time is copied, so the copies take at most ``bucket_bytes``. A gradient that is
    larger than a bucket is reduced without a copy.
    """
    for bucket in _buckets(gradients, bucket_bytes):
        flat = bucket[0] if len(bucket) == 1 else paddle.concat([g.flatten() for g in bucket])
        flat.scale_(1.0 / group.nranks)
        dist.all_reduce(flat, group=group)
        if len(bucket) > 1:
            pieces = flat.split([g.size for g in bucket])
            for gradient, piece in zip(bucket, pieces, strict=True):
                paddle.assign(piece.reshape(gradient.shape), gradient)


def _buckets(gradients: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Consecutive gradients of one dtype with at most ``limit`` bytes, or a single larger one."""
    bucket: list[Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.size * gradient.element_size()
        if bucket and (held + size > limit or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += size
    if bucket:
        yield bucket
