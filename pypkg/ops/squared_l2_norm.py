"""The sum of the squares of many tensors in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import paddle
from paddle import Tensor, _C_ops

from pypkg.ops.dispatch.checks import FLOATING, check_dtype, compute_dtype, dtype_name
from pypkg.ops.dispatch.library import backend


@paddle.no_grad()
def squared_l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of ``tensors``.

    On a CPU the compiled kernel sums runs of 8192 elements in float32, and the runs in float64. The
    order does not depend on the number of threads. Elsewhere Paddle's operator runs for each
    tensor, in float32. The host does not wait for the result.

    Args:
        tensors: of any shapes, on one device; float32, float16, bfloat16 or float64 each.

    Returns:
        float32 [1] on that device; float64 if a tensor is float64. Of no tensors it is 0.

    Raises:
        TypeError: a tensor has another dtype.
    """
    if not tensors:
        return paddle.zeros([1])
    if backend() == "compiled" and _kernel_takes(tensors):
        return _squared_l2_norm_compiled(tensors)
    for each in tensors:
        check_dtype("squared_l2_norm", "tensors", each, FLOATING)
    squares = [_C_ops.squared_l2_norm(each.astype(compute_dtype(each))) for each in tensors]
    return paddle.concat(squares).sum(keepdim=True)


def _kernel_takes(tensors: Sequence[Tensor]) -> bool:
    dtype = getattr(tensors[0], "dtype", None)
    if dtype not in (paddle.float32, paddle.bfloat16) or not tensors[0].place.is_cpu_place():
        return False
    # Written out, because a call for each tensor takes longer than its norm if it is small.
    return all([isinstance(each, Tensor) and each.dtype is dtype for each in tensors])


def _squared_l2_norm_compiled(tensors: Sequence[Tensor]) -> Tensor:
    from pypkg import _native

    whole = [each if each.is_contiguous() else each.contiguous() for each in tensors]
    total = _native.squared_l2_norm_at(
        arrays=[each.data_ptr() for each in whole],
        sizes=[math.prod(each.shape) for each in whole],
        dtype=dtype_name(whole[0].dtype),
    )
    return paddle.full([1], total, "float32")
