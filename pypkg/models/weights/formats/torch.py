"""Reads PyTorch files (.bin, .pt, .pth) without PyTorch and without executing their pickles.

Since PyTorch 1.6 such a file is an uncompressed zip archive. ``<name>/data.pkl`` is a pickle of
the object, and its tensors refer to storages ``<name>/data/<key>``, which contain only numbers
(https://github.com/pytorch/pytorch, torch/serialization.py). ``PickleReader`` reads the pickle in
bounded time and memory, as dicts, lists, plain values and stored tensors.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pypkg.errors import UserError
from pypkg.models.weights.formats.pickle_reader import (
    ORDERED_DICT,
    Call,
    PickleReader,
    Refused,
    user_errors,
)
from pypkg.models.weights.formats.stored_tensor import MAX_AXES, STORAGE, StoredTensor

_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_WRAPPERS = ("module", "state_dict", "model")  # keys under which training scripts put the weights
_MAX_PICKLE = 1 << 28  # bytes; a model of 100 000 tensors takes a tenth of it
_MAX_NUMBER = 1 << 63  # a length, stride or offset, in elements
_MAX_KEY = 100  # characters
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name and extra field
_RESAVE = "torch.save(torch.load(path, map_location='cpu', weights_only=True), path)"
_TRUSTED = (
    "load it where PyTorch is installed, with torch.load(path, map_location='cpu', "
    "weights_only=False), and torch.save its state dict alone"
)


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Locates the tensors of a state dict, by name.

    The state dict is the object in the file, or its entry "module", "state_dict" or "model".
    Entries that are not tensors are ignored.

    Raises:
        UserError: the file is damaged, has the format before PyTorch 1.6, or holds objects other
            than tensors, dicts, lists and plain values.
    """
    with user_errors(path, _TRUSTED), open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise UserError(
                f"{path} is not a zip archive, so it is damaged or was written by PyTorch "
                "before 1.6 or with _use_new_zipfile_serialization=False; write it anew where "
                f"PyTorch is installed: {_RESAVE}"
            )
        content = _unpickle(path, file)
    return _state_dict(path, content)


def _state_dict(path: Path, content: Any) -> dict[str, StoredTensor]:
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content.get(key) for key in _WRAPPERS]
    for candidate in candidates:
        if isinstance(candidate, Mapping):
            tensors = {
                name: value
                for name, value in candidate.items()
                if isinstance(name, str) and isinstance(value, StoredTensor)
            }
            if tensors:
                return tensors
    raise UserError(
        f"{path} holds no tensors by name, neither at the top nor under "
        f"{', '.join(_WRAPPERS)}; give a file that torch.save wrote from a state dict"
    )


def _unpickle(path: Path, file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip archive, but not one of PyTorch: it has no data.pkl")
        if packed := [name for name, member in members.items() if member.compress_type]:
            raise UserError(f"{path}: {packed[0]} is compressed, which PyTorch never does")
        if members[pickles[0]].file_size > _MAX_PICKLE:
            raise UserError(f"{path}: its data.pkl has more than {_MAX_PICKLE} bytes")
        folder = pickles[0].removesuffix("data.pkl")
        order = folder + "byteorder"
        if order in members and archive.read(order) != b"little":
            raise UserError(f"{path} is not of a little-endian machine; write it anew on one")
        storages = _Storages(path, file, members, folder + "data/")
        return PickleReader(archive.read(pickles[0]), _NAMES, storages.refer).load()


class _Storage(NamedTuple):
    file: Path
    dtype: str
    offset: int  # bytes from the start of the file
    num_bytes: int


class _Storages:
    """Locates storages in the archive."""

    def __init__(
        self, path: Path, file: BinaryIO, members: Mapping[str, zipfile.ZipInfo], folder: str
    ) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size
        self._members = members
        self._folder = folder
        self._offsets: dict[str, int] = {}

    def find(self, dtype: str, key: str) -> _Storage:
        member = self._members[self._folder + key]
        if key not in self._offsets:
            self._file.seek(member.header_offset)
            header = self._file.read(_LOCAL_HEADER)
            if header[:4] != b"PK\x03\x04" or len(header) != _LOCAL_HEADER:
                raise zipfile.BadZipFile(f"{member.filename} is not where the directory says")
            name_and_extra = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            start = member.header_offset + _LOCAL_HEADER + name_and_extra
            if start + member.file_size > self._size:
                raise zipfile.BadZipFile(f"{member.filename} ends beyond the end of the file")
            self._offsets[key] = start
        return _Storage(self._path, dtype, self._offsets[key], member.file_size)

    def refer(self, reference: Any) -> _Storage:
        """The storage to which a persistent reference of the pickle refers."""
        kind, storage_type, key, _location, _length = reference
        if not isinstance(key, str) or len(key) > _MAX_KEY:
            raise ValueError("a storage whose key is not a short string")
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise Refused(f"it refers to {_shown(kind)} of type {_shown(storage_type)}")
        return self.find(storage_type.dtype, key)


class _StorageType(NamedTuple):
    dtype: str


def _make_size(lengths: tuple[int, ...] = ()) -> tuple[int, ...]:
    if not isinstance(lengths, tuple):
        raise ValueError(f"a size of a {type(lengths).__name__}")
    return lengths


def _make_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _make_tensor(
    storage: _Storage, first: int, shape: tuple, strides: tuple, *_: Any
) -> StoredTensor:
    """Replaces torch._utils._rebuild_tensor_v2: returns the position of the tensor in the file."""
    if not isinstance(storage, _Storage):
        raise ValueError(f"a tensor in {_shown(storage)}")
    if len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError(f"a tensor with {len(shape)} axes and {len(strides)} strides")
    numbers = (first, *shape, *strides)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
        raise ValueError("a tensor with an invalid shape, strides or offset")
    itemsize = STORAGE[storage.dtype].itemsize
    end = first + sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
    if 0 not in shape and end * itemsize > storage.num_bytes:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
    offset = storage.offset + first * itemsize
    return StoredTensor(storage.file, storage.dtype, tuple(shape), tuple(strides), offset)


def _shown(value: Any) -> str:
    """A string unchanged; of any other value only the type, because its repr may be unbounded."""
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


_NAMES = {
    ("collections", "OrderedDict"): ORDERED_DICT,
    ("torch", "Size"): Call(_make_size),
    ("torch._utils", "_rebuild_parameter"): Call(_make_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_make_tensor),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): f"torch.{dtype}" for dtype in STORAGE},
}
