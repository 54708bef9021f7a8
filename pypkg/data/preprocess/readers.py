"""Documents from pieces of text files, JSON lines and Parquet."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypkg.data.optional_packages import require
from pypkg.data.preprocess.files import JSON_LINES, PARQUET, Span, TextFile
from pypkg.errors import UserError

_READ_BYTES = 1 << 20
_PARQUET_ROWS = 512


@dataclass(frozen=True)
class Document:
    text: str
    file_bytes: int  # of the file that were read for it


@dataclass(frozen=True)
class Problem:
    """A document that cannot be used.

    Attributes:
        reason: for counting.
        line: number of the line, counted from byte ``counted_from`` of the file and from 1.
        byte: offset in the (uncompressed) file.
    """

    reason: str
    file: Path
    detail: str
    line: int | None = None
    byte: int | None = None
    counted_from: int = 0

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


def read_documents(
    span: Span, json_key: str, doc_spliter: str | None, report: Report
) -> Iterator[Document]:
    """The documents of a piece of a file.

    Args:
        json_key: field of a JSON line, or column of a Parquet file, that holds the text.
        doc_spliter: line between the documents of a text file; None where a file is one document.
        report: called with each document that cannot be used; it may raise.
    """
    file = span.file
    try:
        if file.kind == PARQUET:
            yield from _read_parquet(span, json_key, report)
            return
        with open(file.path, "rb") as raw:
            lines = _Lines(raw, span)
            if file.kind == JSON_LINES:
                yield from _read_json_lines(lines, json_key, report)
            elif doc_spliter is None:
                yield from _read_whole(lines, report)
            else:
                yield from _read_separated(lines, doc_spliter.strip().encode(), report)
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, _BrokenFrame) as error:
        report(Problem(BROKEN, file.path, str(error)))
    except OSError as error:
        report(Problem(UNREADABLE, file.path, error.strerror or str(error)))


class _Lines:
    """Reads lines of a span, keeping count of where it is."""

    def __init__(self, raw: io.BufferedReader, span: Span) -> None:
        self.span = span
        self.path = span.file.path
        self.line = 0  # number of lines read
        self.byte = span.start  # where the last line begins
        self._raw = raw
        self._seen = span.start
        if span.file.compression:
            self._data = _decompressed(span.file, raw)
            self._end = None
        else:
            raw.seek(span.start)
            self._data = raw
            self._end = span.end

    def __iter__(self) -> Iterator[bytes]:
        next_byte = self.byte
        for line in self._data:
            if self._end is not None and next_byte >= self._end:
                return
            self.line += 1
            self.byte = next_byte
            next_byte += len(line)
            yield line

    def read(self) -> bytes:
        return self._data.read() if self._end is None else self._data.read(self._end)

    def file_bytes(self, num_bytes: int) -> int:
        """What ``num_bytes`` of text, just read, took of the file."""
        if self._end is not None:
            return num_bytes
        seen, self._seen = self._seen, self._raw.tell()
        return self._seen - seen

    def problem(self, reason: str, detail: str, line: int | None, byte: int) -> Problem:
        return Problem(reason, self.path, detail, line, byte, self.span.start)


def _read_whole(lines: _Lines, report: Report) -> Iterator[Document]:
    data = lines.read()
    try:
        yield Document(data.decode(), lines.file_bytes(len(data)))
    except UnicodeDecodeError as error:
        report(lines.problem(NOT_UTF8, error.reason, None, error.start))


def _read_separated(lines: _Lines, separator: bytes, report: Report) -> Iterator[Document]:
    parts: list[bytes] = []
    first = (1, lines.byte)

    def document() -> Iterator[Document]:
        data = b"".join(parts)
        try:
            yield Document(data.decode(), lines.file_bytes(len(data)))
        except UnicodeDecodeError as error:
            line = first[0] + data.count(b"\n", 0, error.start)
            report(lines.problem(NOT_UTF8, error.reason, line, first[1] + error.start))

    for line in lines:
        if line.strip() != separator:
            if not parts:
                first = (lines.line, lines.byte)
            parts.append(line)
        elif parts:
            yield from document()
            parts = []
    if parts:
        yield from document()


def _read_json_lines(lines: _Lines, json_key: str, report: Report) -> Iterator[Document]:
    for line in lines:
        if line.isspace():
            continue
        try:
            text = json.loads(line.decode())[json_key]
            if not isinstance(text, str):
                raise TypeError
            if not text.isascii():
                text.encode()  # a lone surrogate, which JSON can spell, is no text
        except (KeyError, TypeError, IndexError):
            reason, detail, byte = NO_TEXT, f"'{json_key}'", lines.byte
        except UnicodeDecodeError as error:
            reason, detail, byte = NOT_UTF8, error.reason, lines.byte + error.start
        except UnicodeError as error:
            reason, detail, byte = NOT_UTF8, error.reason, lines.byte
        except (ValueError, RecursionError) as error:
            reason, detail, byte = NOT_JSON, str(error), lines.byte
        else:
            yield Document(text, lines.file_bytes(len(line)))
            continue
        report(lines.problem(reason, detail, lines.line, byte))


def _read_parquet(span: Span, column: str, report: Report) -> Iterator[Document]:
    parquet = require("pyarrow.parquet", "pyarrow", span.file.path)
    import pyarrow

    path = span.file.path
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                report(Problem(NO_TEXT, path, f"'{column}'; the columns are {', '.join(names)}"))
                return
            metadata = file.metadata
            row = sum(metadata.row_group(i).num_rows for i in range(span.start))
            groups = range(span.start, span.end)
            rows = max(1, sum(metadata.row_group(i).num_rows for i in groups))
            first, read = row, 0
            for batch in file.iter_batches(
                _PARQUET_ROWS, list(groups), [column], use_threads=False
            ):
                values = batch.column(0)
                if not _holds_text(pyarrow, values.type):
                    report(Problem(NO_TEXT, path, f"column '{column}' holds {values.type}"))
                    return
                for value in values.cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    try:
                        text = value.decode()
                    except AttributeError:
                        report(Problem(NO_TEXT, path, f"row {row} of '{column}' is null"))
                    except UnicodeDecodeError as error:
                        report(Problem(NOT_UTF8, path, f"row {row}: {error.reason}"))
                    else:
                        share = span.file_bytes * (row - first) // rows - read
                        read += share
                        yield Document(text, share)
    except pyarrow.ArrowException as error:
        report(Problem(BROKEN, path, str(error)))


def _holds_text(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return any(
        check(kind)
        for check in (types.is_string, types.is_large_string, types.is_binary, types.is_null,
                      types.is_large_binary)
    )  # fmt: skip


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


def _decompressed(file: TextFile, raw: io.BufferedReader) -> Any:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    zstandard = require("zstandard", "zstandard", file.path)
    return io.BufferedReader(_ZstdReader(zstandard, raw), _READ_BYTES)


class _BrokenFrame(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Zstandard frames one after another; unlike the package's reader it sees a truncated one."""

    def __init__(self, zstandard: Any, raw: io.BufferedReader) -> None:
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._raw = raw
        self._frame: Any = None  # the one that is being read
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_READ_BYTES // 8)
            if not self._input:
                if self._frame is not None:
                    raise _BrokenFrame("it ends in the middle of a Zstandard frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise _BrokenFrame(str(error)) from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
