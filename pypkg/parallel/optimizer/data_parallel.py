"""The mean of gradients over a group, in flat buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import paddle
import paddle.distributed as dist
from paddle import Tensor

# As fleet's: large enough that the time of a message is that of its bytes.
BUCKET_BYTES = 128 * 2**20


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The accumulated gradient: the float32 one where there is a ``main_grad``."""
    return parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad


@paddle.no_grad()
def average_gradients(
    parameters: Iterable[Tensor], group: object, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Replaces each gradient by its mean over ``group``.

    One bucket at a time is copied, so this takes ``bucket_bytes`` of memory at most; a gradient
    that is larger is sent as it is.
    """
    gradients = [gradient_of(parameter) for parameter in parameters]
    for bucket in _buckets([g for g in gradients if g is not None], bucket_bytes):
        flat = bucket[0] if len(bucket) == 1 else paddle.concat([g.flatten() for g in bucket])
        flat.scale_(1.0 / group.nranks)
        dist.all_reduce(flat, group=group)
        if len(bucket) > 1:
            parts = flat.split([g.size for g in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                paddle.assign(part.reshape(gradient.shape), gradient)


def _buckets(gradients: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype that take at most ``limit`` bytes together."""
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
