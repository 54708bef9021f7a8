"""Locates the tensors of a safetensors file, and writes such a file tensor by tensor.

A file (https://github.com/huggingface/safetensors#format) consists of the length of a JSON header
in eight bytes, the header, and the tensors without gaps. The NumPy interface of the safetensors
library does not support bfloat16 and builds a whole file in memory, so this module reads and writes
the format itself. Nothing here imports Paddle.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pypkg.errors import UserError
from pypkg.files.json_files import unique_keys
from pypkg.models.weights.formats.opening import open_file
from pypkg.models.weights.formats.stored_tensor import (
    MAX_AXES,
    STORAGE,
    Shape,
    StoredTensor,
    contiguous_strides,
)

# dtype name in a safetensors header -> dtype name here and in Paddle.
_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _DTYPES.items()}
# PaddleNLP's files have the metadata "np" and store bfloat16 as uint16, as NumPy has no bfloat16.
_NUMPY_FORMAT = "np"
_NUMPY_BFLOAT16 = "U16"
_MAX_NUMBER = 1 << 63  # an offset or a length
_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library


class TensorSpec(NamedTuple):
    """dtype and shape of a tensor in a file."""

    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Locates the tensors of a file, by name. Only the header is read.

    In a file with the metadata ``"format": "np"``, uint16 means bfloat16.

    Raises:
        UserError: the file is corrupt or truncated, or a dtype is unknown.
    """
    header, start, size = _read_header(path)
    metadata = header.pop("__metadata__", None)
    dtypes = dict(_DTYPES)
    if isinstance(metadata, dict) and metadata.get("format") == _NUMPY_FORMAT:
        dtypes[_NUMPY_BFLOAT16] = "bfloat16"
    tensors = {}
    for name, fields in header.items():
        try:
            first, end = fields["data_offsets"]
            shape = tuple(fields["shape"])
            if len(shape) > MAX_AXES:
                raise ValueError(f"a shape of {len(shape)} axes")
            if not all(type(each) is int for each in (first, end, *shape)):
                raise TypeError(f"data_offsets {first}, {end} and shape {shape} are not integers")
            if first > end or not all(0 <= each < _MAX_NUMBER for each in (first, end, *shape)):
                raise ValueError(f"data_offsets {first}, {end} and shape {shape}")
            dtype = dtypes[fields["dtype"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is corrupt: tensor {name} has no valid header ({error})"
            ) from error
        tensor = StoredTensor(path, dtype, shape, contiguous_strides(shape), start + first)
        if tensor.offset + end - first > size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {tensor.offset + end - first}, "
                f"the file has {size}"
            )
        if tensor.num_bytes != end - first:
            raise UserError(
                f"{path} is corrupt: tensor {name} of shape {list(shape)} and dtype {dtype} takes "
                f"{tensor.num_bytes} bytes, its header says {end - first}"
            )
        tensors[name] = tensor
    _check_back_to_back(path, tensors, start, size)
    return tensors


def _check_back_to_back(
    path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int
) -> None:
    """Checks that tensors fill the file after the header, as the format requires.

    Raises:
        UserError: tensors overlap, or bytes belong to no tensor.
    """
    end, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].offset, t[1].num_bytes)):
        if tensor.offset != end:
            raise UserError(
                f"{path} is corrupt: tensor {name} begins at byte {tensor.offset}, and {before} "
                f"ends at byte {end}; tensors must follow one another without gaps. Get the file "
                "again"
            )
        end, before = end + tensor.num_bytes, f"tensor {name}"
    if end != size:
        raise UserError(
            f"{path} is corrupt: {before} ends at byte {end}, the file has {size}, and its header "
            "names no tensor in the rest. Get the file again"
        )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the offset of the first tensor, and the size of the file, both in bytes."""
    try:
        raw, size = open_file(path)
        with BufferedReader(raw) as file:
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 8 + length <= min(size, _MAX_HEADER) else b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if len(text) != length or length == 0:
        raise UserError(f"{path} is truncated or not a safetensors file: it ends in its header")
    header = None
    with suppress(ValueError, RecursionError):
        header = json.loads(text, object_pairs_hook=unique_keys)
    if not isinstance(header, dict):
        raise UserError(
            f"{path} is corrupt or not a safetensors file: its header is not JSON, or "
            "names a tensor twice"
        )
    return header, 8 + length, size


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata_format: str = "pt",
) -> int:
    """Writes one safetensors file. Only one tensor at a time has to be in memory.

    The caller syncs the file to disk and renames it, see :mod:`pypkg.files`.

    Args:
        specs: spec of each tensor by name, in the order of ``tensors``.
        tensors: (name, array) pairs.
        metadata_format: value of "format" in the metadata, which some readers require.

    Returns:
        Number of bytes of tensor data.
    """
    header, end = encoded_header(specs, metadata_format)
    with open(path, "wb") as file:
        file.write(header)
        for (name, spec), (given, values) in zip(specs.items(), tensors, strict=True):
            if given != name or values.shape != tuple(spec.shape):
                raise ValueError(f"expected {name} {spec.shape}, got {given} {values.shape}")
            file.write(np.ascontiguousarray(values, STORAGE[spec.dtype]).data)
    return end


def encoded_header(
    specs: Mapping[str, TensorSpec], metadata_format: str = "pt"
) -> tuple[bytes, int]:
    """The bytes before the tensors of a file, and the number of bytes of tensor data."""
    header: dict[str, object] = {"__metadata__": {"format": metadata_format}}
    codes = dict(_CODES)
    if metadata_format == _NUMPY_FORMAT:
        codes["bfloat16"] = _NUMPY_BFLOAT16
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.num_bytes
        header[name] = {
            "dtype": codes[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded, end
