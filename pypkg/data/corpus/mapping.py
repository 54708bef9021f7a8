"""Files mapped into memory. None of them keeps a file descriptor, so a run may map any number.

An array is read-only and stays valid as long as it is referred to. If its file is truncated
meanwhile, reading a sample raises UserError, and any other read of the lost bytes ends the process
with a message that names the file (csrc/python/data/mapped_file.cc).
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO

import numpy as np

from pypkg import _native

_LONGEST_HEADER = 1 << 16


def map_file(path: str | os.PathLike[str]) -> np.ndarray:
    """uint8 [bytes] of a file.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    return _native.map_file(os.fsencode(path))


def map_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an ``.npy`` file.

    Raises:
        OSError: the file cannot be opened or mapped.
        ValueError: it is not a whole ``.npy`` file of numbers.
    """
    contents = map_file(path)
    header = io.BytesIO(contents[:_LONGEST_HEADER].tobytes())
    shape, fortran_order, dtype = read_npy_header(header)
    data = contents[header.tell() :]
    count = int(np.prod(shape, dtype=object))
    if data.size < count * dtype.itemsize:
        raise ValueError(
            f"{dtype} of shape {shape} takes {count * dtype.itemsize} bytes, and {Path(path).name} "
            f"has {data.size} after its header"
        )
    flat = data[: count * dtype.itemsize].view(dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype; ``stream`` is at the data afterwards.

    Raises:
        ValueError: there is no header, it has an unknown version, or it promises Python objects.
    """
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the header is unknown")
    shape, fortran_order, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects")
    return shape, fortran_order, dtype
