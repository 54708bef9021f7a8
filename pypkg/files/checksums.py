"""Checksums of files (XXH3 with 128 bits, as ``xxhsum -H2``), and sealed JSON files.

XXH3 is not a cryptographic hash. It detects accidents: flipped bits, lost blocks, files of another
checkpoint. It is faster than disks, so the cost of a check is reading the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pypkg.console import progress

ALGORITHM = "xxh3_128"
_Render = Callable[[Mapping[str, Any]], bytes]
_DIGEST_KEY = "digest"  # of a sealed file
_BLOCK = 4 << 20  # bytes that a thread reads at a time
_THREADS = 8  # files in flight; reading and hashing release the interpreter lock


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file when it was written.

    Attributes:
        size: bytes.
        digest: of the content, 32 hexadecimal digits.
    """

    size: int
    digest: str


class Checksum:
    """Size and digest of bytes that are written one block after another."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def update(self, block: bytes | memoryview) -> None:
        """Appends ``block``; a memoryview has to be contiguous."""
        self._hash.update(block)
        self._size += memoryview(block).nbytes

    def record(self) -> FileRecord:
        """The size and digest of everything appended so far."""
        return FileRecord(self._size, self._hash.hexdigest())


def bytes_digest(data: bytes) -> str:
    """Digest of ``data``, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def file_record(path: Path, on_read: Callable[[int], None] | None = None) -> FileRecord:
    """Reads a file and returns its size and digest.

    Args:
        on_read: called with the number of bytes of each block that was read.

    Raises:
        OSError: the file cannot be read.
    """
    checksum = Checksum()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(min(size, _BLOCK) or 1))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
            progress.report(f"reading {path.name}")
            if on_read is not None:
                on_read(count)
    return checksum.record()


def file_records(
    paths: Iterable[Path], on_read: Callable[[int], None] | None = None
) -> dict[Path, FileRecord]:
    """Size and digest of each file; several are read at a time, the largest first.

    Args:
        on_read: called, from several threads, with the number of bytes of each block read.

    Raises:
        OSError: a file cannot be read.
    """
    ordered = sorted(paths, key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        records = pool.map(lambda path: file_record(path, on_read), ordered)
        return dict(zip(ordered, records, strict=True))


class SealError(ValueError):
    """A sealed JSON file, or a line of one, differs from what was written."""


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """``content`` as a JSON file; the last key, "digest", is the digest of the file without it."""
    return _sealed(content, _rendered)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The content of a file that ``sealed_json`` rendered.

    Raises:
        SealError: the file differs from what was written.
        OSError: it cannot be read.
    """
    content = _unsealed(path.read_bytes(), _rendered)
    if content is None:
        raise SealError(f"{path} differs from what was written: its own digest does not fit")
    return content


def sealed_line(content: Mapping[str, Any]) -> bytes:
    """``content`` as a line of JSON without a newline, sealed as in ``sealed_json``.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold.
    """
    return _sealed(content, _rendered_line)


def read_sealed_line(line: bytes) -> dict[str, Any]:
    """The content of a line that ``sealed_line`` rendered.

    Raises:
        SealError: the line differs from what was written.
    """
    content = _unsealed(line, _rendered_line)
    if content is None:
        raise SealError("its own digest does not fit")
    return content


def _sealed(content: Mapping[str, Any], render: _Render) -> bytes:
    return render({**content, _DIGEST_KEY: bytes_digest(render(content))})


def _unsealed(data: bytes, render: _Render) -> dict[str, Any] | None:
    """The content from which ``_sealed`` made ``data``; None if the digest does not match."""
    try:
        content = json.loads(data)
        del content[_DIGEST_KEY]
        return content if data == _sealed(content, render) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _rendered_line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


def _rendered(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
