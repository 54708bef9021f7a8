"""Counter-based normal random numbers."""

from __future__ import annotations

import paddle
from paddle import Tensor

from pypkg.ops.dispatch.checks import check_dtype
from pypkg.ops.dispatch.library import backend, raw_stream

DTYPES = (paddle.float32, paddle.float16, paddle.bfloat16)


@paddle.no_grad()
def random_normal_(
    out: Tensor,
    *,
    key: int,
    stream: int,
    cols: int,
    rows: int = 1,
    deviation: float = 1.0,
    first: int = 0,
    offset: int = 0,
    out_stride: int = 0,
    index_stride: int = 0,
) -> None:
    """Overwrites a rectangle of ``out`` with normal numbers that only depend on their index::

        out[offset + r * out_stride + c] = deviation * z(first + r * index_stride + c)

    z is normal with mean 0, standard deviation 1 and magnitudes up to 6.66. It is computed by
    Philox 4x32-10 (Salmon et al., 2011), with ``key`` as the key and the index and ``stream`` as
    the counter, and by the transform of Box and Muller (1958), in float32. GPUs and CPUs of every
    instruction set give the same bits, for any part of a stream.

    The compiled module computes the numbers under every backend. If it has no code for a GPU, they
    are computed on the host and copied.

    Args:
        out: contiguous, of any shape, treated as flat; float32, float16 or bfloat16.
        key, stream: from 0 to 2^64 - 1.
        cols, rows: size of the rectangle.
        deviation: factor of z, multiplied in float32 and then rounded to the dtype of out.
        first: index of the rectangle's first number.
        offset: position of the rectangle's first number in out.
        out_stride: elements of out from one row of the rectangle to the next; at least cols.
        index_stride: index of a row's first number minus that of the row before.

    Raises:
        TypeError, ValueError: out has another dtype or is not contiguous, or the rectangle is not
            inside out.
    """
    from pypkg import _native

    check_dtype("random_normal_", "out", out, DTYPES)
    if not out.is_contiguous():
        raise ValueError("random_normal_: out must be contiguous")
    target = out.detach()
    is_copy = not target.place.is_cpu_place() and backend() != "compiled"
    if is_copy:
        target = target.cpu()
    device = "cpu" if target.place.is_cpu_place() else "cuda"
    _native.random_normal(
        (target.data_ptr(), [target.size], str(out.dtype).removeprefix("paddle."), device),
        key=key, stream_id=stream, deviation=deviation, first=first, offset=offset, rows=rows,
        cols=cols, out_stride=out_stride, index_stride=index_stride,
        stream=raw_stream(target) or 0,
    )  # fmt: skip
    if is_copy:
        out.set_value(target)
