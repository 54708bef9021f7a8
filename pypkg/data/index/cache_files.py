"""A set of arrays in a folder: one ``.npy`` file for each array, and ``<name>.dsc``.

``<name>.dsc`` is a JSON description of the arrays with a checksum of each, and is written last.
Files get their final names when they are complete, so that a set with a ``.dsc`` is complete. The
name determines the contents: processes that write the same set at the same time write the same
bytes. Files are not synced to the disk, which would take seconds for a blend of many corpora. If a
crash of the machine loses part of a file, its checksum fails and the set is built again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import socket
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.console import progress
from pypkg.data.corpus.mapping import map_npy
from pypkg.files import write_file

logger = logging.getLogger("pypkg")

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Arrays = dict[str, np.ndarray]

_TEMPORARY = ".tmp"
_ABANDONED_AFTER = 3600  # seconds since the last write to a temporary file


def set_name(description: Mapping[str, Any]) -> str:
    """The name of the set with a description, which is a JSON object."""
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def array_file(folder: Path, name: str, key: str) -> Path:
    """The file of one array, with PaddleNLP's name."""
    return folder / f"{name}_{key}.npy"


def read_set(folder: Path, name: str, layout: Layout) -> Arrays | None:
    """The arrays of a set, mapped into memory; None if a file is missing or damaged.

    Args:
        layout: expected shape and dtype of each array.
    """
    try:
        description = json.loads(_description_file(folder, name).read_text("utf-8"))
        checksums = description.pop("crc32")
        expected = {key: int(checksums[key]) for key in layout}
        if set_name(description) != name:
            raise ValueError("it describes another set than its name says")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("cannot use %s: %r", _description_file(folder, name), error)
        return None
    arrays = map_arrays(folder, name, layout)
    if arrays is None:
        return None
    for key, array in arrays.items():
        progress.report(f"reading {array_file(folder, name, key).name}")
        if zlib.crc32(array.data) != expected[key]:
            logger.warning("cannot use %s: it is damaged", array_file(folder, name, key))
            return None
    return arrays


def map_arrays(folder: Path, name: str, layout: Layout) -> Arrays | None:
    """The arrays, mapped into memory; None if shape or dtype differ. Contents are not checked."""
    arrays = {}
    for key, (shape, dtype) in layout.items():
        file = array_file(folder, name, key)
        try:
            array = map_npy(file)
        except Exception as error:  # a corrupt file can make NumPy raise almost anything
            logger.warning("cannot use %s: %s", file, error)
            return None
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            logger.warning(
                "cannot use %s: it holds %s %s, expected were %s %s",
                file,
                array.dtype,
                list(array.shape),
                dtype,
                list(shape),
            )
            return None
        arrays[key] = array
    return arrays


def write_set(folder: Path, name: str, description: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes the arrays, then the description.

    Raises:
        UserError: the folder cannot be written to or is full. Files of the set are removed.
    """
    contents = {
        **description,
        "crc32": {key: zlib.crc32(array.data) for key, array in arrays.items()},
    }
    files = [array_file(folder, name, key) for key in arrays]
    # Each process has its own temporary names, because locks do not work across all machines.
    suffix = f".{socket.gethostname()}.{os.getpid()}{_TEMPORARY}"
    try:
        for file, array in zip(files, arrays.values()):
            progress.report(f"writing {file.name}")
            values = array.reshape(-1).view(np.uint8).data
            write_file(file, _npy_header(array), values, suffix=suffix, durable=False)
        text = json.dumps(contents, indent=1).encode() + b"\n"
        write_file(_description_file(folder, name), text, suffix=suffix, durable=False)
    except BaseException:
        for file in files:
            with suppress(OSError):
                file.unlink()
        raise


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of processes that ended while they wrote."""
    for file in folder.glob(f"*{_TEMPORARY}"):
        try:
            if time.time() - file.stat().st_mtime > _ABANDONED_AFTER:
                file.unlink()
        except OSError:
            continue


def _description_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.dsc"


def _npy_header(array: np.ndarray) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()
