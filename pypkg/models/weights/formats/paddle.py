"""Reads files of ``paddle.save`` (.pdparams, .pdopt) without Paddle and without executing them.

Such a file is a pickle of a dict in which tensors are NumPy arrays; bfloat16 is stored as its bits
in uint16 (https://github.com/PaddlePaddle/Paddle, python/paddle/framework/io.py). ``PickleReader``
reads it in bounded time and memory. The data of arrays is not read, only located.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.models.weights.formats.pickle_reader import (
    ORDERED_DICT,
    Call,
    PickleReader,
    Restorable,
    Span,
    user_errors,
)
from pypkg.models.weights.formats.stored_tensor import (
    MAX_AXES,
    STORAGE,
    StoredTensor,
    contiguous_strides,
)

PARAMETER_NAMES = "StructuredToParameterName@@"  # key of a dict: name in the model -> Paddle name
_IN_PIECES = "UnpackBigParamInfor@@"  # key of arrays that protocols 2 and 3 cut into pieces
_TRUSTED = (
    "load it where Paddle is installed, with paddle.load(path), and paddle.save its state dict "
    "alone"
)
# NumPy's code -> dtype.
_DTYPES = {
    "f4": "float32",
    "f2": "float16",
    "u2": "bfloat16",
    "f8": "float64",
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
    "u1": "uint8",
    "u4": "uint32",
    "u8": "uint64",
    "b1": "bool",
}


class _DType(Restorable):
    """A NumPy dtype."""

    __slots__ = ("name",)

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"an array of a NumPy dtype that is none of {', '.join(_DTYPES)}")
        self.name = _DTYPES[code]

    def restore(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("an array that is not little-endian")


class _Array(Restorable):
    """A NumPy array; ``shape`` is None until its state is given."""

    __slots__ = ("dtype", "is_fortran", "place", "shape")

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] | None = None

    def restore(self, state: Any) -> None:
        _, shape, dtype, is_fortran, place = state
        if not (isinstance(dtype, _DType) and isinstance(place, Span) and isinstance(shape, tuple)):
            raise ValueError("an array without shape, dtype or bytes")
        if len(shape) > MAX_AXES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("an array with an invalid shape")
        if math.prod(shape) * STORAGE[dtype.name].itemsize != place.length:
            raise ValueError(f"an array of shape {shape} in {place.length} bytes")
        self.shape, self.dtype, self.place = shape, dtype.name, place
        self.is_fortran = is_fortran is True

    def stored_in(self, path: Path) -> StoredTensor:
        """The array as a tensor stored in the file ``path``."""
        if self.shape is None:
            raise ValueError("an array without a state")
        shape = self.shape
        strides = (
            contiguous_strides(shape[::-1])[::-1]
            if self.is_fortran
            else (contiguous_strides(shape))
        )
        return StoredTensor(path, self.dtype, shape, strides, self.place.offset)


def _make_named_array(pair: Any) -> Any:
    """A tensor below the first level of a dict: a tuple of its Paddle name and its array."""
    if not isinstance(pair, tuple):
        raise ValueError(f"a tuple of a {type(pair).__name__}")
    return pair


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")  # NumPy 1, 2
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): ORDERED_DICT,
    ("builtins", "tuple"): Call(_make_named_array),
    ("__builtin__", "tuple"): Call(_make_named_array),
    ("numpy", "ndarray"): "numpy.ndarray",
    ("numpy", "dtype"): Call(_DType),
    **{(module, "_reconstruct"): Call(_Array) for module in _NUMPY},
}


def read_paddle_file(path: Path) -> dict[str, StoredTensor]:
    """Locates the tensors in a file of weights.

    Returns:
        Stored tensors by name in the model.

    Raises:
        UserError: as in ``read_paddle_object``, or the file has no named tensors.
    """
    tensors = {
        name: value
        for name, value in read_paddle_object(path).items()
        if isinstance(value, StoredTensor)
    }
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; give a file of a model's state dict")
    return tensors


def read_paddle_object(path: Path) -> dict[str, Any]:
    """The dict that ``paddle.save`` wrote: stored tensors, plain values, and nested dicts of them.

    Dicts are read to depth 3.

    Raises:
        UserError: the file cannot be read, is damaged, or contains objects of other types.
    """
    with (
        user_errors(path, _TRUSTED),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        content = PickleReader(buffer, _NAMES).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of a dict")
        if _IN_PIECES in content:
            raise UserError(
                f"{path} holds arrays in pieces, as paddle.save writes them with protocol 2 or 3; "
                "write it anew where Paddle is installed: "
                "paddle.save(paddle.load(path), path, protocol=4)"
            )
        located = _Locator(path).located(content, 3)
    return located


class _Locator:
    """Converts arrays to stored tensors. A dict that occurs twice is converted once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[tuple[int, int], dict[str, Any]] = {}

    def located(self, values: dict[Any, Any], depth: int) -> dict[str, Any]:
        """``values`` with stored tensors, without lists and without dicts deeper than ``depth``."""
        key = (id(values), depth)
        if key not in self._done:
            found: dict[str, Any] = {}
            self._done[key] = found
            for name, value in values.items():
                if isinstance(value, tuple) and len(value) == 2:
                    value = value[1]  # (Paddle name, array)
                if isinstance(value, _Array):
                    found[name] = value.stored_in(self._path)
                elif isinstance(value, (str, int, float)):
                    found[name] = value
                elif isinstance(value, dict) and depth > 1:
                    found[name] = self.located(value, depth - 1)
        return self._done[key]
