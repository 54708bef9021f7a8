"""Starts Triton kernels on the memory of any framework's tensors."""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import driver

# Triton reads TRITON_INTERPRET when a kernel is declared. With 1, all kernels run in Python.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Fuses multiplication and addition, like nvcc. Triton's default differs between versions.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

_THREADS_PER_WARP = 32
_MAX_WARPS = 32


class Pointer:
    """The memory of a tensor of any framework as a Triton argument."""

    def __init__(self, tensor: Any) -> None:
        self._address = tensor.data_ptr()
        self.dtype = str(tensor.dtype).rpartition(".")[2]

    def data_ptr(self) -> int:
        return self._address

    # The interpreter copies the storage of a tensor to the CPU before a kernel and back after it.
    # These tensors are on the CPU already, so that it works on their own memory.
    def untyped_storage(self) -> Pointer:
        return self

    def cpu(self) -> Pointer:
        return self

    def new_empty(self, *size: int, device: str) -> Pointer:
        return self

    def set_(self, *storage_offset_size_stride: Any) -> None:
        pass

    def copy_(self, source: Pointer) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    stride = size


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, stream: int | None, **constants: Any
) -> None:
    """Runs ``kernel`` on a grid of programs, or returns at once for an empty grid.

    Args:
        arguments: tensors (objects with ``data_ptr()`` and ``dtype``), numbers or None.
        stream: a raw CUDA stream; None: Triton's current stream, which is torch's.
        constants: ``tl.constexpr`` parameters and Triton's own options, such as ``num_warps``.
    """
    if 0 in grid:
        return
    constants = {**COMPILER_OPTIONS, **constants}
    passed = [Pointer(each) if hasattr(each, "data_ptr") else each for each in arguments]
    if stream is None or INTERPRETED:
        kernel[grid](*passed, **constants)
        return
    active = driver.active
    own_choice = active.get_current_stream
    active.get_current_stream = lambda device: stream
    try:
        kernel[grid](*passed, **constants)
    finally:
        active.get_current_stream = own_choice


def tile(cols: int, elements: int) -> tuple[int, int]:
    """(rows, columns), powers of two, of a tile with whole rows and about ``elements`` elements."""
    width = triton.next_power_of_2(cols)
    return max(1, elements // width), width


def warps(elements: int, per_thread: int) -> int:
    """Number of warps, a power of two, so that a thread has about ``per_thread`` elements."""
    return max(1, min(_MAX_WARPS, elements // (per_thread * _THREADS_PER_WARP)))


def multiprocessors() -> int:
    """Number of multiprocessors of the current GPU."""
    if INTERPRETED:
        return 2
    active = driver.active
    properties = active.utils.get_device_properties(active.get_current_device())
    return properties["multiprocessor_count"]
