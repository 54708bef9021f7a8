"""Large files that are written once, in blocks, past the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BLOCK = 2 << 20  # bytes of a write, a multiple of the alignment; the fastest of 1 to 16 MiB
_BLOCKS = 4  # that are being filled or written
_ALIGNMENT = 4096  # of addresses, offsets and lengths; no disk has larger sectors
_WRITE_BACK = 32 << 20  # bytes after which the kernel is asked to write back its pages


class BlockFile:
    """A file that a thread writes, block by block, while the next block is filled.

    The blocks go to the disk directly (O_DIRECT). New pages of the page cache would cost the CPU
    more time than the blocks do, and displace others. A file system that has no direct writing gets
    ordinary writes.

    Raises:
        OSError: by each method, if a block cannot be written.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)
        memory = np.frombuffer(mmap.mmap(-1, _BLOCKS * BLOCK), np.uint8)  # aligned to pages
        self._blocks = deque(memory.reshape(_BLOCKS, BLOCK))
        self._used = 0  # bytes of the first block, which is being filled
        self._handed = self._asked = 0  # bytes of the file
        self._writes: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pypkg-disk")

    def append(self, data: np.ndarray) -> None:
        """Appends ``data``, contiguous uint8; it may change afterwards."""
        while data.size:
            count = min(data.size, BLOCK - self._used)
            np.copyto(self._blocks[0][self._used : self._used + count], data[:count])
            self._used += count
            data = data[count:]
            if self._used == BLOCK:
                self._hand_over()

    def finish(self) -> None:
        """Waits until the file is on the disk."""
        self._hand_over()
        while self._writes:
            self._writes.popleft().result()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Ends the thread. Without ``finish`` a part of the file may be missing."""
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def _hand_over(self) -> None:
        """Starts to write the first block, and waits until the next one is free."""
        block = self._blocks[0][: self._used]
        self._writes.append(self._pool.submit(self._write, block, self._handed))
        self._handed, self._used = self._handed + self._used, 0
        self._blocks.rotate(-1)
        if len(self._writes) == _BLOCKS:
            self._writes.popleft().result()

    def _write(self, block: np.ndarray, offset: int) -> None:
        end = offset + block.size
        while block.size:  # a call may write fewer bytes than it gets
            aligned = block.size - block.size % _ALIGNMENT
            if not aligned:  # the end of the file
                self._write_through_cache()
            try:
                count = os.pwrite(self._descriptor, block[: aligned or block.size].data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._write_through_cache():
                    raise
                continue
            block, offset = block[count:], offset + count
        if end - self._asked >= _WRITE_BACK and not self._is_direct():
            # Otherwise the disk is idle until the fsync at the end.
            length = end - self._asked
            os.posix_fadvise(self._descriptor, self._asked, length, os.POSIX_FADV_DONTNEED)
            self._asked = end

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def _write_through_cache(self) -> bool:
        """Makes the remaining writes ordinary ones; returns whether they were direct."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)
