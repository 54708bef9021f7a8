"""Tensors as arrays in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

_HUGE_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux's madvise: from now on, and at once
_BITS: Any = "int16"  # of a bfloat16, which neither NumPy nor Paddle's exchange of arrays knows


@paddle.no_grad()
def to_host(tensor: Tensor) -> np.ndarray:
    """The values of ``tensor``, of any shape; bfloat16 as its bits in uint16.

    On a CPU the array is the tensor's own memory: it sees later changes of the tensor, and copies
    nothing. ``Tensor.numpy`` copies all of the buffer that a tensor is a view of, which is that of
    many parameters in ZeRO stages 1 and 2. From a GPU, the values of the view alone are copied.
    """
    plain = tensor.detach()
    if plain.place.is_gpu_place():
        return plain.clone().numpy()
    if plain.place.is_cuda_pinned_place():
        plain = plain.clone()._copy_to(paddle.CPUPlace(), True)
    if plain.dtype == paddle.bfloat16:
        return np.from_dlpack(plain.view(_BITS)).view(np.uint16)
    return np.from_dlpack(plain)


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Asks Linux for pages of 2 MiB where ``tensors`` lie on a CPU, with what lies beside them.

    A step of generation reads every weight once. With pages of 4 KiB, looking up their addresses
    takes a good part of it, most of all on a virtual machine. It is advice: a system that cannot
    follow it changes nothing.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    for tensor in tensors:
        if not tensor.place.is_cpu_place():
            continue
        first = tensor.data_ptr() // _HUGE_PAGE
        end = tensor.data_ptr() + tensor.size * tensor.element_size()
        count = -(-end // _HUGE_PAGE) - first
        span = ctypes.c_void_p(first * _HUGE_PAGE), ctypes.c_size_t(count * _HUGE_PAGE)
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(*span, advice)
