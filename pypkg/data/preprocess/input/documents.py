"""A document of the input, and the problems of documents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    text: str
    file_bytes: int  # bytes read from the file for this document


@dataclass(frozen=True)
class Problem:
    """A document or file that cannot be used.

    Attributes:
        reason: a short text by which problems are counted.
        file: path of the file.
        detail: description of the problem.
        line: number of the line, from 1, counted from byte ``counted_from`` of the file.
        byte: offset in the uncompressed file.
        counted_from: see ``line``.
        file_lost: whether the documents of the file from here on cannot be read.
        mended: whether the document is used, with its invalid UTF-8 replaced.
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
        """A message with file, place and reason.

        Args:
            count: counts the line breaks of a file up to a byte. A :class:`LineCounter` is fast for
                many problems in one file.
        """
        place = ""
        if self.line is not None:
            with suppress(OSError):  # the file may have been removed
                before = (count or LineCounter())(self.file, self.counted_from)
                place = f", line {self.line + before}"
        if self.byte is not None:
            place += f" (byte {self.byte})" if place else f", byte {self.byte}"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.file}{place}: {self.reason}{detail}"


NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NO_TEXT = "no text in the field"
DOUBLED_KEY = "a field that the record names more than once"
UNREADABLE = "cannot be read"
BROKEN = "broken file, the rest of it is lost"

Report = Callable[[Problem], None]


class LineCounter:
    """Counts the line breaks in the first bytes of a file; continues after the last count."""

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
