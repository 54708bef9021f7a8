"""A tensor stored in a file: its offset and strides, and how to read it or a slice of it.

Arrays are NumPy arrays; bfloat16 is stored as its bits in uint16, as in Paddle. Nothing here
imports Paddle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pypkg.errors import UserError
from pypkg.models.weights.formats.opening import open_file

Shape = tuple[int, ...]
# One slice per axis, without steps; missing slices at the end select whole axes.
Slices = Sequence[slice]

# dtype -> NumPy type of its bytes in a file. Weights have one of the first four dtypes.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
    "float8_e4m3": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
MAX_AXES = 32  # NumPy's before version 2
FLOATS = ("float32", "float16", "bfloat16", "float64")
_RANGES = {"float16": 0, "bfloat16": 1, "float32": 1, "float64": 2}  # in ascending order
_BLOCK = 1 << 24  # bytes per read: the memory that reading needs besides its result


class StoredTensor(NamedTuple):
    """A strided tensor in a file. It is a tuple so that a pickle cannot modify it.

    ``strides`` are in elements, ``offset`` is in bytes from the start of the file.
    """

    file: Path
    dtype: str
    shape: Shape
    strides: Shape
    offset: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return STORAGE[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize

    def narrow(self, axis: int, start: int, stop: int) -> StoredTensor:
        """The slice [start, stop) along an axis, without reading it."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        offset = self.offset + start * self.strides[axis] * self.itemsize
        return self._replace(shape=shape, offset=offset)

    def is_contiguous(self) -> bool:
        """Whether the elements are stored in C order without gaps."""
        return all(
            length == 1 or stride == expected
            for length, stride, expected in zip(
                self.shape, self.strides, contiguous_strides(self.shape)
            )
        )

    def read_into(self, out: np.ndarray, dtype: str) -> None:
        """Reads and converts all elements to ``out``, an array of the same shape.

        Raises:
            UserError: the file cannot be read.
        """
        # With the axes in the order of the file, a transposed matrix is read sequentially too.
        order = sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])
        ordered = self._replace(
            shape=tuple(self.shape[axis] for axis in order),
            strides=tuple(self.strides[axis] for axis in order),
        )
        try:
            with open_file(self.file)[0] as file:
                _read_blocks(file, ordered, out.transpose(order), dtype, 0)
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror}") from error


class SlicedTensor(NamedTuple):
    """A tensor, or a part of it, that is stored as consecutive flat slices with zero padding.

    Attributes:
        slices: the slices, each with one axis.
        whole: shape of the whole tensor.
        bounds: (start, stop) along each axis of the part.
    """

    slices: tuple[StoredTensor, ...]
    whole: Shape
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, slices: Sequence[StoredTensor], shape: Shape) -> SlicedTensor:
        """The whole tensor of ``shape``; ``slices`` have at least as many elements."""
        return cls(tuple(slices), shape, tuple((0, length) for length in shape))

    @property
    def file(self) -> Path:
        """The file of the first slice, for error messages."""
        return self.slices[0].file

    @property
    def dtype(self) -> str:
        """dtype of the first slice; reading converts each slice from its own."""
        return self.slices[0].dtype

    @property
    def shape(self) -> Shape:
        """Shape of the part."""
        return tuple(stop - start for start, stop in self.bounds)

    def narrow(self, axis: int, start: int, stop: int) -> SlicedTensor:
        """The slice [start, stop) along an axis, without reading it."""
        first = self.bounds[axis][0]
        bounds = (*self.bounds[:axis], (first + start, first + stop), *self.bounds[axis + 1 :])
        return self._replace(bounds=bounds)

    def read_into(self, out: np.ndarray, dtype: str) -> None:
        """Reads and converts the part to ``out``, an array of its shape. All slices are read.

        Raises:
            UserError: a file cannot be read, or the padding is not zero.
        """
        flat = np.empty(sum(each.shape[0] for each in self.slices), STORAGE[dtype])
        end = 0
        for each in self.slices:
            start, end = end, end + each.shape[0]
            each.read_into(flat[start:end], dtype)
        length = math.prod(self.whole)
        if flat[length:].any():
            raise UserError(
                f"{self.slices[-1].file}: a tensor of shape {list(self.whole)} is stored in "
                f"{len(flat)} elements, and those beyond {length} are not zero; the file is of "
                "another model"
            )
        out[...] = flat[:length].reshape(self.whole)[tuple(slice(*each) for each in self.bounds)]


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor stored in several shards that are concatenated along ``axis``."""

    shards: tuple[StoredTensor | SlicedTensor, ...]
    axis: int = 0

    @property
    def dtype(self) -> str:
        """dtype of the first shard; reading converts each shard from its own."""
        return self.shards[0].dtype

    @property
    def shape(self) -> Shape:
        """Shape of the concatenated tensor."""
        first = self.shards[0].shape
        if len(self.shards) == 1:
            return first
        length = sum(shard.shape[self.axis] for shard in self.shards)
        return (*first[: self.axis], length, *first[self.axis + 1 :])

    def read(self, name: str, dtype: str, slices: Slices = ()) -> np.ndarray:
        """Reads the elements that ``slices`` select and converts them to ``dtype``.

        Args:
            name: of the tensor, for error messages.
            dtype: float32, float16, bfloat16 (returned as its bits in uint16) or float64.
            slices: one per axis, with step 1; missing slices select whole axes. Only the selected
                elements are read.

        Raises:
            UserError: a stored dtype is not one of FLOATS, a value exceeds the range of ``dtype``,
                or a file cannot be read.
            ValueError: a slice has a step, or there are more slices than axes.
        """
        bounds = _bounds(self.shape, slices)
        out = np.empty([stop - start for start, stop in bounds], STORAGE[dtype])
        before = 0  # start of the shard in the whole tensor along the axis
        for shard in self.shards:
            if shard.dtype not in FLOATS:
                raise UserError(
                    f"{shard.file}: tensor {name} is of dtype {shard.dtype}; weights must be "
                    f"one of {', '.join(FLOATS)}"
                )
            target = out
            for axis, (start, stop) in enumerate(bounds):
                if axis == self.axis and len(self.shards) > 1:
                    length = shard.shape[axis]
                    first, last = (min(max(at - before, 0), length) for at in (start, stop))
                    place = before + first - start
                    target = target[(slice(None),) * axis + (slice(place, place + last - first),)]
                    before += length
                    start, stop = first, last
                shard = shard.narrow(axis, start, stop)
            if target.size:
                shard.read_into(target, dtype)
                self._check_range(name, shard, target, dtype)
        return out

    @staticmethod
    def _check_range(
        name: str, shard: StoredTensor | SlicedTensor, values: np.ndarray, dtype: str
    ) -> None:
        """Raises UserError if the conversion to ``dtype`` has made a value infinite."""
        if _RANGES[shard.dtype] > _RANGES[dtype] and np.isinf(values).any():
            raise UserError(
                f"{shard.file}: tensor {name} of dtype {shard.dtype} holds values beyond "
                f"{np.finfo(dtype).max:.6g}, the largest of {dtype}; choose another dtype, such as "
                "bfloat16, or check the file"
            )


def contiguous_strides(shape: Shape) -> Shape:
    """Strides in elements of a contiguous tensor in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def convert(values: np.ndarray, from_dtype: str, to_dtype: str) -> np.ndarray:
    """``values`` in another floating-point dtype, rounded to nearest even.

    Args:
        from_dtype, to_dtype: names of dtypes; bfloat16 arrays hold the bits in uint16.
    """
    if from_dtype == to_dtype:
        return values
    if from_dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # JoinedTensor.read checks for overflow
        values = values.astype(STORAGE[to_dtype] if to_dtype != "bfloat16" else np.float32)
    if to_dtype != "bfloat16":
        return values
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # The addition below would turn a NaN into an infinity or a number.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _bounds(shape: Shape, slices: Slices) -> list[tuple[int, int]]:
    """(start, stop) along every axis."""
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for a tensor of shape {list(shape)}")
    bounds = []
    for axis, length in enumerate(shape):
        start, stop, step = (slices[axis] if axis < len(slices) else slice(None)).indices(length)
        if step != 1:
            raise ValueError(f"slices with a step are not supported, found {slices[axis]}")
        bounds.append((start, max(start, stop)))
    return bounds


def _read_blocks(
    file: RawIOBase, tensor: StoredTensor, out: np.ndarray, dtype: str, axis: int
) -> None:
    """Reads contiguous runs of at most _BLOCK bytes; recurses over the axes from ``axis`` on."""
    contiguous = tensor.is_contiguous()
    if contiguous and (tensor.num_bytes <= _BLOCK or axis == len(tensor.shape)):
        data = np.empty(tensor.shape, STORAGE[tensor.dtype])
        file.seek(tensor.offset)
        missing = data.reshape(-1).view(np.uint8).data
        while missing:  # one call may return fewer bytes
            count = file.readinto(missing)
            if not count:
                raise UserError(f"{tensor.file} became shorter while it was read; try again")
            missing = missing[count:]
        out[...] = convert(data, tensor.dtype, dtype)
        return
    length = tensor.shape[axis]
    step = max(1, _BLOCK * length // tensor.num_bytes) if contiguous else 1
    here = (slice(None),) * axis
    for start in range(0, length, step):
        stop = min(start + step, length)
        block = tensor.narrow(axis, start, stop)
        _read_blocks(file, block, out[(*here, slice(start, stop))], dtype, axis + (step == 1))
