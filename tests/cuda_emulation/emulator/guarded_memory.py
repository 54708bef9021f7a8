"""Arrays for kernels under test: guarded against accesses outside, in any dtype, by DLPack.

An array ends just before an inaccessible page, so that reading or writing past its end is a
crash, and lies among canary bytes, which are checked when it is read back. Kernels get it through
`__dlpack__`, which NumPy does not offer for bfloat16.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

CANARY = 0xFF  # a NaN in every floating-point dtype
STORAGE = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "uint8": np.uint8,
    "int32": np.int32,
    "int64": np.int64,
}
# DLPack's type codes.
_KIND = {"int32": 0, "int64": 0, "uint8": 1, "float32": 2, "float16": 2, "bfloat16": 4}
_libc = ctypes.CDLL(None, use_errno=True)


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float -> uint16 bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class _GuardedBuffer:
    """`size` bytes at an address that is `shift` above a multiple of 16."""

    def __init__(self, size: int, shift: int):
        page = mmap.PAGESIZE
        body = -(-(size + 64) // page) * page
        self.mapping = mmap.mmap(-1, body + page)
        everything = np.frombuffer(self.mapping, np.uint8)
        guard = everything.ctypes.data + body
        if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        start = (body - size - shift) // 16 * 16 + shift
        everything[:body] = CANARY
        self.bytes = everything[start : start + size]
        self._around = (everything[:start], everything[start + size : body])

    def check_canaries(self) -> None:
        for side, canaries in zip(("before", "after"), self._around):
            if (canaries != CANARY).any():
                raise AssertionError(f"a kernel wrote {side} the array")


class GuardedArray:
    """Filled with NaN (integers: -1) until something is written into it."""

    def __init__(self, shape: Sequence[int], dtype: str, misaligned: bool = False):
        self.dtype = dtype
        storage = np.dtype(STORAGE[dtype])
        size = int(np.prod(shape)) * storage.itemsize
        self._buffer = _GuardedBuffer(size, storage.itemsize if misaligned else 0)
        self.storage = self._buffer.bytes.view(storage).reshape(shape)

    def columns(self, start: int, stop: int) -> GuardedArray:
        """A view of some of the last dimension."""
        view = object.__new__(GuardedArray)
        view.dtype, view._buffer = self.dtype, self._buffer
        view.storage = self.storage[..., start:stop]
        return view

    def write(self, values: np.ndarray) -> GuardedArray:
        self.storage[...] = to_bfloat16(values) if self.dtype == "bfloat16" else values
        return self

    def numpy(self) -> np.ndarray:
        """float64 (integers: int64) copy of the values."""
        self._buffer.check_canaries()
        floating = self.dtype.startswith(("float", "bfloat"))
        values = from_bfloat16(self.storage) if self.dtype == "bfloat16" else self.storage
        return values.astype(np.float64 if floating else np.int64)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # CPU

    def __dlpack__(self) -> object:
        ndim, itemsize = self.storage.ndim, self.storage.itemsize
        dims = ctypes.c_int64 * ndim
        managed = _ManagedTensor()
        tensor = managed.tensor
        tensor.data, tensor.device_type = self.storage.ctypes.data, 1
        tensor.ndim, tensor.lanes = ndim, 1
        tensor.code, tensor.bits = _KIND[self.dtype], 8 * itemsize
        self._shape = dims(*self.storage.shape)
        self._strides = dims(*(stride // itemsize for stride in self.storage.strides))
        tensor.shape = ctypes.cast(self._shape, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64))
        self._managed = managed  # lives as long as this array, so the capsule needs no deleter
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)


class GuardedBackend:
    """What ``checks.check`` runs ``kernels`` with: arrays between inaccessible pages."""

    stream = 0

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def array(self, values: np.ndarray, dtype: str, misaligned: bool = False) -> GuardedArray:
        return GuardedArray(values.shape, dtype, misaligned).write(values)

    def poisoned(
        self, shape: tuple[int, ...], dtype: str, misaligned: bool = False
    ) -> GuardedArray:
        return GuardedArray(shape, dtype, misaligned)

    def columns(self, array: GuardedArray, start: int, stop: int) -> GuardedArray:
        return array.columns(start, stop)

    def numpy(self, array: GuardedArray) -> np.ndarray:
        return array.numpy()
