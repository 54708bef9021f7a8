"""PyTorch's .bin, .pt and .pth files, read without PyTorch and without trusting them.

Since PyTorch 1.6 such a file is an uncompressed zip archive: ``<name>/data.pkl`` is a pickle of
the object, and its tensors refer to storages ``<name>/data/<key>``, which hold nothing but
numbers (https://github.com/pytorch/pytorch, torch/serialization.py). A pickle is a program. The
one that runs here can make dicts, lists, plain values, and tensors that say where in the file
they lie; whatever else it asks for is refused.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from pypkg.errors import UserError
from pypkg.models.weights.formats.stored_tensor import STORAGE, StoredTensor

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
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name and extra field
_RESAVE = "torch.save(torch.load(path, map_location='cpu', weights_only=True), path)"


class _Refused(Exception):
    """The pickle asks for something that is neither a tensor nor a plain value."""


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a state dict lie, by name.

    The state dict is the object in the file, or its entry "module", "state_dict" or "model".
    Entries of the state dict that are no tensors are left out.

    Raises:
        UserError: the file is damaged, of the format before PyTorch 1.6, or holds anything but
            tensors, dicts, lists and plain values.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise UserError(
                    f"{path} is not a zip archive, so it is damaged or was written by PyTorch "
                    "before 1.6 or with _use_new_zipfile_serialization=False; write it anew where "
                    f"PyTorch is installed: {_RESAVE}"
                )
            content = _unpickle(path, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _Refused as error:
        raise UserError(
            f"{path} was not loaded: {error}. Only tensors, dicts, lists and plain values are, as "
            "anything else in a pickle may run code. If you trust its origin, load it where "
            "PyTorch is installed, with torch.load(path, map_location='cpu', weights_only=False), "
            "and torch.save its state dict alone"
        ) from error
    except Exception as error:  # a damaged or hostile archive or pickle can fail in any way
        raise UserError(
            f"{path} is damaged or truncated ({error or type(error).__name__}); get it again"
        ) from error
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
        with archive.open(pickles[0]) as stream:
            storages = _Storages(path, file, members, folder + "data/")
            return _Unpickler(stream, storages).load()


class _Storage(NamedTuple):
    file: Path
    dtype: str
    offset: int  # bytes from the start of the file
    num_bytes: int


class _Storages:
    """Finds the bytes of a storage in the archive."""

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


class _Callable:
    """What a pickle may call. Without attributes, so that it cannot be changed by one either."""

    __slots__ = ()


class _StorageType(NamedTuple):
    dtype: str


class _MakeSize(_Callable):
    __slots__ = ()

    def __call__(self, lengths: tuple[int, ...] = ()) -> tuple[int, ...]:
        return tuple(lengths)


class _MakeParameter(_Callable):
    __slots__ = ()

    def __call__(self, tensor: StoredTensor, *_: Any) -> StoredTensor:
        return tensor


class _MakeTensor(_Callable):
    """In place of torch._utils._rebuild_tensor_v2: a tensor that says where it lies."""

    __slots__ = ()

    def __call__(
        self, storage: _Storage, first: int, shape: tuple, strides: tuple, *_: Any
    ) -> StoredTensor:
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor in {storage!r}")
        numbers = (first, *shape, *strides)
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {first}")
        itemsize = STORAGE[storage.dtype].itemsize
        end = first + sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
        if 0 not in shape and end * itemsize > storage.num_bytes:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        offset = storage.offset + first * itemsize
        return StoredTensor(storage.file, storage.dtype, tuple(shape), tuple(strides), offset)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], storages: _Storages) -> None:
        super().__init__(stream, encoding="utf-8")
        self._storages = storages
        self._allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): _MakeSize(),
            ("torch._utils", "_rebuild_parameter"): _MakeParameter(),
            ("torch._utils", "_rebuild_tensor_v2"): _MakeTensor(),
            **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
            **{("torch", dtype): f"torch.{dtype}" for dtype in STORAGE},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise _Refused(f"it asks for {module}.{name}")
        return self._allowed[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _location, _length = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise _Refused(f"it refers to a {kind!r} of type {storage_type!r}")
        return self._storages.find(storage_type.dtype, key)
