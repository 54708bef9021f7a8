"""Tensors as arrays in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

_BITS: Any = "int16"  # of a bfloat16, which neither NumPy nor Paddle's exchange of arrays knows


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
