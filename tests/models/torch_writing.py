"""Writes files as torch.save does, without torch, and pickles that torch would never write."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage"}


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, dtype: str = "float32", length: int = 0) -> bytes:
    kind = b"ctorch\n" + _STORAGES[dtype].encode() + b"\n"
    return b"(" + text("storage") + kind + text(key) + text("cpu") + number(length) + b"tQ"


def tensor(
    stored: bytes, shape: tuple[int, ...], strides: tuple[int, ...], first: int = 0
) -> bytes:
    arguments = stored + number(first) + numbers(shape) + numbers(strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def write_archive(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None) -> None:
    """A file with the pickled ``content``, which lacks the start and the end of a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)


def write_torch_file(
    path: Path, tensors: Mapping[str, np.ndarray], wrapper: str | None = None
) -> None:
    """``tensors`` as a state dict, under the key ``wrapper`` if there is one."""
    items, storages = {}, {}
    for key, (name, value) in enumerate(tensors.items()):
        value = np.ascontiguousarray(value)
        strides = tuple(stride // value.itemsize for stride in value.strides)
        stored = storage(str(key), str(value.dtype), value.size)
        items[name] = tensor(stored, value.shape, strides)
        storages[str(key)] = value.tobytes()
    content = dictionary(items)
    write_archive(path, dictionary({wrapper: content}) if wrapper else content, storages)
