"""Tensors as arrays in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

_BITS: Any = "int16"  # for a bfloat16, which neither NumPy nor Paddle's DLPack export supports


def to_host(tensor: Tensor) -> np.ndarray:
    """The values of ``tensor``, of any shape; bfloat16 as its bits in uint16.

    On a CPU the array shares the tensor's memory, so it sees later changes of the tensor. From a
    GPU only the values of the tensor are copied. (``Tensor.numpy`` copies the whole buffer of which
    a tensor is a view; in ZeRO stages 1 and 2 that buffer holds many parameters.)
    """
    plain = tensor.detach()
    if plain.place.is_gpu_place():
        return plain.clone().numpy()
    if plain.place.is_cuda_pinned_place():
        plain = plain.clone()._copy_to(paddle.CPUPlace(), True)
    if plain.dtype == paddle.bfloat16:
        return np.from_dlpack(plain.view(_BITS)).view(np.uint16)
    return np.from_dlpack(plain)
