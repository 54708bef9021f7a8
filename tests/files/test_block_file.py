"""Large files that are written in blocks past the page cache."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from pypkg.files import block_file
from pypkg.files.block_file import BlockFile

BLOCK = 8192


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_file, "BLOCK", BLOCK)


class Writes:
    """Position, length and whether it was direct, of each write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int | None = None) -> None:
        self.found: list[tuple[int, int, bool]] = []
        pwrite = os.pwrite

        def call(descriptor: int, data: memoryview, offset: int) -> int:
            is_direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
            count = pwrite(descriptor, data[:limit], offset)
            self.found.append((offset, count, is_direct))
            return count

        monkeypatch.setattr(os, "pwrite", call)


def contents(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


def write(path: Path, data: np.ndarray, piece: int) -> None:
    file = BlockFile(path)
    try:
        for start in range(0, data.size, piece):
            part = data[start : start + piece].copy()
            file.append(part)
            part[:] = 0  # it may change
        file.finish()
    finally:
        file.close()


def no_direct_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that refuses to open files for it."""
    original = os.open

    def call(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", call)


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, BLOCK, 9 * BLOCK, 9 * BLOCK + 4097])
def test_a_file_has_the_bytes(tmp_path, monkeypatch, size, is_direct):
    """Longer than all blocks together, and with ends of every kind, over an older file."""
    if not is_direct:
        no_direct_writing(monkeypatch)
    data = contents(size)
    (tmp_path / "f").write_bytes(bytes(20 * BLOCK))
    for piece in (1000, 3 * BLOCK):
        write(tmp_path / "f", data, piece)
        assert (tmp_path / "f").read_bytes() == data.tobytes()


def test_all_but_the_end_is_written_directly(tmp_path, monkeypatch):
    writes = Writes(monkeypatch)
    write(tmp_path / "f", contents(2 * BLOCK + 4097), 1000)
    assert writes.found == [
        (0, BLOCK, True),
        (BLOCK, BLOCK, True),
        (2 * BLOCK, 4096, True),
        (2 * BLOCK + 4096, 1, False),
    ]


def test_a_file_system_that_refuses_the_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    """Also for its own reasons, such as larger sectors: here writes have an odd length."""
    writes, data = Writes(monkeypatch, limit=3000), contents(2 * BLOCK)
    write(tmp_path / "f", data, 1000)
    assert (tmp_path / "f").read_bytes() == data.tobytes()
    assert [(count, is_direct) for _, count, is_direct in writes.found] == 2 * [
        (3000, False),
        (3000, False),
        (BLOCK - 6000, False),
    ]


def test_ordinary_writes_begin_before_the_end(tmp_path, monkeypatch):
    no_direct_writing(monkeypatch)
    monkeypatch.setattr(block_file, "_WRITE_BACK", 2 * BLOCK)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: asked.append(what))
    write(tmp_path / "f", contents(5 * BLOCK), 1000)
    assert asked == [
        (0, 2 * BLOCK, os.POSIX_FADV_DONTNEED),
        (2 * BLOCK, 2 * BLOCK, os.POSIX_FADV_DONTNEED),
    ]


@pytest.mark.parametrize("blocks", [1, 20])
def test_a_full_disk_is_told(blocks):
    """At the end at the latest, and nothing waits for the blocks that are left."""
    file = BlockFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as found:
        file.append(contents(blocks * BLOCK))
        file.finish()
    assert found.value.errno == errno.ENOSPC
    file.close()


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        BlockFile(tmp_path / "missing" / "f")


def test_what_is_finished_is_on_the_disk(tmp_path, monkeypatch):
    """All writes come before the fsync."""
    writes, synced = Writes(monkeypatch), []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(len(writes.found)))
    write(tmp_path / "f", contents(7 * BLOCK), 1000)
    assert synced == [7]
