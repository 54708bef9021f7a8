"""Tensors in safetensors files, one at a time, as NumPy arrays.

The format is https://github.com/huggingface/safetensors#format: eight bytes with the length of a
JSON header, the header, then the tensors back to back. Read and written here because the
library's NumPy interface knows no bfloat16, and builds a whole file in memory to write it.
bfloat16 arrays are uint16 with the bits, as in Paddle. Nothing here imports Paddle.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pypkg.errors import UserError
from pypkg.models.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Name of a dtype in a file -> name here and in Paddle, NumPy type that carries it.
_DTYPES = {
    "F32": ("float32", np.dtype("<f4")),
    "F16": ("float16", np.dtype("<f2")),
    "BF16": ("bfloat16", np.dtype("<u2")),
    "F64": ("float64", np.dtype("<f8")),
}
_CODES = {name: code for code, (name, _) in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class _Entry:
    file: Path
    code: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


class TensorFiles:
    """The tensors of a folder, in ``model.safetensors`` or in shards listed by an index.

    Raises:
        UserError: there are no such files, or one is corrupt, truncated or missing; it is named.
    """

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        if (folder / SINGLE_FILE).is_file():
            self._entries = _read_header(folder / SINGLE_FILE)
        elif (folder / INDEX_FILE).is_file():
            self._entries = _read_shards(folder / INDEX_FILE)
        else:
            raise UserError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with weights "
                "in safetensors format"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """The tensor ``name`` converted to ``dtype`` (float32, float16 or bfloat16)."""
        entry = self._entries[name]
        if entry.code not in _DTYPES:
            raise UserError(
                f"{entry.file}: tensor {name} is of dtype {entry.code}; weights must be one of "
                f"{', '.join(_DTYPES)}"
            )
        stored_dtype, numpy_dtype = _DTYPES[entry.code]
        try:
            with open(entry.file, "rb") as file:
                file.seek(entry.offset)
                values = np.fromfile(file, numpy_dtype, entry.num_bytes // numpy_dtype.itemsize)
        except OSError as error:
            raise UserError(f"cannot read {entry.file}: {error.strerror}") from error
        return convert(values.reshape(entry.shape), stored_dtype, dtype)


def convert(values: np.ndarray, from_dtype: str, to_dtype: str) -> np.ndarray:
    """``values`` in another floating-point dtype, rounded to nearest even."""
    if from_dtype == to_dtype:
        return values
    if from_dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if to_dtype != "bfloat16":
        return values.astype(to_dtype)
    values = values.astype(np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # The addition would carry a NaN over into an infinity or a number.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def write_tensors(
    path: Path,
    dtype: str,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> int:
    """Writes one safetensors file as the tensors come, so that one at a time is in memory.

    Args:
        dtype: of all tensors.
        shapes: name and shape of every tensor, in the order in which ``tensors`` gives them.

    Returns:
        Number of bytes of tensor data.
    """
    code = _CODES[dtype]
    itemsize = _DTYPES[code][1].itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for (name, shape), (given, values) in zip(shapes.items(), tensors, strict=True):
            if given != name or values.shape != tuple(shape):
                raise ValueError(f"expected {name} {tuple(shape)}, got {given} {values.shape}")
            file.write(np.ascontiguousarray(values, _DTYPES[code][1]).data)
        file.flush()
        os.fsync(file.fileno())
    return end


def _read_shards(index: Path) -> dict[str, _Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(
                f"{index}: {name} must be the name of a file beside it, found {shard!r}"
            )
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise UserError(f"{index} lists the file {shard}, which is not in {index.parent}")
        entries.update(_read_header(index.parent / shard))
    if absent := [name for name in weight_map if name not in entries]:
        raise UserError(f"{index} lists the tensor {absent[0]}, which no file holds")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    """The entries of one file, checked to lie within it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= min(size, _MAX_HEADER) else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(text) != length or length == 0:
        raise UserError(f"{path} is truncated or not a safetensors file: it ends in its header")
    header = None
    with suppress(ValueError):
        header = json.loads(text)
    if not isinstance(header, dict):
        raise UserError(f"{path} is corrupt or not a safetensors file: its header is not JSON")
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        try:
            start, end = fields["data_offsets"]
            shape = tuple(int(length) for length in fields["shape"])
            if not 0 <= start <= end:
                raise ValueError(f"data_offsets are {start}, {end}")
            entry = _Entry(path, fields["dtype"], shape, 8 + length + start, end - start)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is corrupt: tensor {name} has no valid header") from error
        _check_entry(name, entry, size)
        entries[name] = entry
    return entries


def _check_entry(name: str, entry: _Entry, file_size: int) -> None:
    if entry.offset + entry.num_bytes > file_size:
        raise UserError(
            f"{entry.file} is truncated: tensor {name} ends at byte "
            f"{entry.offset + entry.num_bytes}, the file has {file_size}"
        )
    if entry.code in _DTYPES:
        expected = math.prod(entry.shape) * _DTYPES[entry.code][1].itemsize
        if expected != entry.num_bytes:
            raise UserError(
                f"{entry.file} is corrupt: tensor {name} of shape {list(entry.shape)} and dtype "
                f"{entry.code} takes {expected} bytes, its header says {entry.num_bytes}"
            )
