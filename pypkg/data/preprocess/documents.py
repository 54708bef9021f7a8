"""A document of the input, and what may be wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    text: str
    file_bytes: int  # of the file that were read for it


@dataclass(frozen=True)
class Problem:
    """A document that cannot be used, or a whole file.

    Attributes:
        reason: for counting.
        line: number of the line, counted from byte ``counted_from`` of the file and from 1.
        byte: offset in the (uncompressed) file.
        file_lost: all documents of the file, or those from here on, are lost.
        mended: the document is used; what is not UTF-8 in it has been replaced.
    """

    reason: str
    file: Path
    detail: str
    line: int | None = None
    byte: int | None = None
    counted_from: int = 0
    file_lost: bool = False
    mended: bool = False

    def describe(self, count: Callable[[Path, int], int] | None = None) -> str:
        """File, place and reason.

        Args:
            count: a :class:`LineCounter`, for many problems; it reads the file up to there.
        """
        place = ""
        if self.line is not None:
            with suppress(OSError):  # it may be gone by now
                before = (count or LineCounter())(self.file, self.counted_from)
                place = f", line {self.line + before}"
        if self.byte is not None:
            place += f" (byte {self.byte})" if place else f", byte {self.byte}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.file}{place}: {self.reason}{detail}"


NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_TEXT = "no text in the field"
UNREADABLE = "cannot be read"
BROKEN = "broken file, the rest of it is lost"

Report = Callable[[Problem], None]


class LineCounter:
    """Line breaks in the first bytes of files; goes on from where it counted last in a file."""

    def __init__(self) -> None:
        self._last: dict[Path, tuple[int, int]] = {}

    def __call__(self, path: Path, end: int) -> int:
        begin, count = self._last.get(path, (0, 0))
        if begin > end:
            begin, count = 0, 0
        left = end - begin
        with open(path, "rb") as data:
            data.seek(begin)
            while left > 0 and (block := data.read(min(left, _READ_BYTES))):
                count += block.count(b"\n")
                left -= len(block)
        self._last[path] = (end, count)
        return count
