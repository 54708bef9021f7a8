"""Reads documents from pieces of text files and JSON lines. ``parquet.py`` reads Parquet."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pypkg.data.optional_packages import require
from pypkg.data.preprocess.input.documents import (
    BROKEN,
    DOUBLED_KEY,
    NO_TEXT,
    NOT_JSON,
    NOT_UTF8,
    UNREADABLE,
    Document,
    Problem,
    Report,
)
from pypkg.data.preprocess.input.files import BOM, JSON_LINES, PARQUET, Span, TextFile, is_one_value
from pypkg.data.preprocess.input.parquet import read_parquet
from pypkg.errors import UserError

_READ_BYTES = 1 << 20
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # bytes that no UTF-8 has
_UTF16 = "it begins as UTF-16; convert it, for example by iconv -f UTF-16 -t UTF-8"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


class _Doubled(dict[str, Any]):
    """An object of JSON that names keys more than once; it holds their last values."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.doubled = {key for key, count in counts.items() if count > 1}


class _DoubledKey(ValueError):
    """The text of a record has two values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Doubled(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_documents(
    span: Span, json_key: str, doc_spliter: str | None, report: Report, replace: bool = False
) -> Iterator[Document]:
    """Yields the documents of a piece of a file. A byte order mark of UTF-8 is skipped.

    Args:
        json_key: field of a JSON line, or column of a Parquet file, that holds the text; dots
            separate the names of nested fields.
        doc_spliter: line between the documents of a text file; None if a file is one document.
        report: called with each document that cannot be used, and with a file that cannot be read
            to its end; it may raise.
        replace: keep a document that is not UTF-8, with U+FFFD in place of each invalid byte or
            lone surrogate; ``report`` is called too.
    """
    file = span.file
    try:
        if file.kind == PARQUET:
            yield from read_parquet(span, json_key, report, replace)
            return
        with open(file.path, "rb") as raw:
            if file.compression and not raw.peek(1):  # the libraries take it for an empty text
                raise _BrokenFrame(f"it has no byte, and is no {file.compression} file")
            lines = _Lines(raw, span, report, replace)
            if span.start == 0 and lines.peek().startswith(_UTF16_MARKS):
                report(Problem(NOT_UTF8, file.path, _UTF16, file_lost=True))
            elif file.kind == JSON_LINES:
                whole = file.may_be_one_value and span.start == 0 and is_one_value(lines.peek())
                read = _read_json_value if whole else _read_json_lines
                yield from read(lines, json_key)
            elif doc_spliter is None:
                yield from lines.document(lines.read(), None, lines.byte)
            else:
                yield from _read_separated(lines, doc_spliter.strip().encode())
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile, _BrokenFrame) as error:
        report(Problem(BROKEN, file.path, str(error), file_lost=True))
    except OSError as error:
        report(Problem(UNREADABLE, file.path, error.strerror or str(error), file_lost=True))


class _Lines:
    """Reads the lines of a span of a file and counts lines and bytes."""

    def __init__(self, raw: io.BufferedReader, span: Span, report: Report, replace: bool) -> None:
        self.span = span
        self.line = 0  # number of lines read
        self.byte = span.start  # where the last line begins
        self.replace = replace
        self._report = report
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
        for data in self._data:
            if self._end is not None and next_byte >= self._end:
                return
            for line in _lines_of(data):
                self.line += 1
                self.byte = next_byte
                next_byte += len(line)
                yield self._without_mark(line)

    def peek(self) -> bytes:
        """The next bytes of the file; the position does not move."""
        return self._data.peek(_READ_BYTES)

    def read(self) -> bytes:
        data = self._data.read() if self._end is None else self._data.read(self._end)
        return self._without_mark(data)

    def document(self, data: bytes, line: int | None, byte: int) -> Iterator[Document]:
        """Yields ``data``, which begins at this place, as a document if ``decode`` returns text."""
        text = self.decode(data, line, byte)
        if text is not None:
            yield Document(text, self.file_bytes(len(data)))

    def decode(self, data: bytes, line: int | None, byte: int) -> str | None:
        """Text of bytes that begin at this place.

        Invalid UTF-8 is reported. The result is then None or, with ``replace``, the repaired text.
        """
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if line is not None:
                line += data.count(b"\n", 0, error.start)
            self.report(NOT_UTF8, error.reason, line, byte + error.start, mended=self.replace)
        return data.decode(errors="replace") if self.replace else None

    def file_bytes(self, num_bytes: int) -> int:
        """Bytes of the (compressed) file behind the last ``num_bytes`` bytes of text."""
        if self._end is not None:
            return num_bytes
        seen, self._seen = self._seen, self._raw.tell()
        return self._seen - seen

    def report(
        self, reason: str, detail: str, line: int | None, byte: int, mended: bool = False
    ) -> None:
        self._report(
            Problem(reason, self.span.file.path, detail, line, byte, self.span.start, mended=mended)
        )

    def _without_mark(self, data: bytes) -> bytes:
        """Removes a byte order mark. JSON lines joined from several files hold several."""
        if data.startswith(BOM) and (self.byte == 0 or self.span.file.kind == JSON_LINES):
            self.byte += len(BOM)
            return data[len(BOM) :]
        return data


def _lines_of(data: bytes) -> list[bytes]:
    """Yields ``data``, one line, or its lines if the file ends lines with CR alone."""
    if b"\r" in data and not data.endswith(b"\n"):
        return data.splitlines(keepends=True)
    return [data]


def _read_separated(lines: _Lines, separator: bytes) -> Iterator[Document]:
    parts: list[bytes] = []
    first = (1, lines.byte)
    for line in lines:
        if line.strip() != separator:
            if not parts:
                first = (lines.line, lines.byte)
            parts.append(line)
        elif parts:
            yield from lines.document(b"".join(parts), *first)
            parts = []
    if parts:
        yield from lines.document(b"".join(parts), *first)


def _read_json_lines(lines: _Lines, json_key: str) -> Iterator[Document]:
    for line in lines:
        if line and not line.isspace():
            yield from _json_documents(lines, line, lines.line, json_key)


def _read_json_value(lines: _Lines, json_key: str) -> Iterator[Document]:
    """Reads a file that is not JSON lines: an array of records, or records of several lines."""
    yield from _json_documents(lines, lines.read(), None, json_key)


def _json_documents(
    lines: _Lines, data: bytes, line: int | None, json_key: str
) -> Iterator[Document]:
    """Yields the documents of a line, or of the whole file if ``line`` is None."""
    content, byte = lines.decode(data, line, lines.byte), lines.byte
    if content is None:
        return
    try:
        values = _json_values(content)
    except (ValueError, RecursionError) as error:
        lines.report(NOT_JSON, str(error), line, byte)
        return
    if line is None:
        values = [each for v in values for each in (v if isinstance(v, list) else [v])]
    num_bytes = len(data)
    for value in values:
        try:
            text = _text_of(value, json_key)
        except _DoubledKey as error:
            lines.report(DOUBLED_KEY, str(error), line, byte)
            continue
        if text is None:
            lines.report(NO_TEXT, f"'{json_key}'", line, byte)
            continue
        try:
            if not text.isascii():
                text.encode()  # a lone surrogate, which JSON can spell, is no text
        except UnicodeEncodeError as error:
            lines.report(NOT_UTF8, error.reason, line, byte, mended=lines.replace)
            if not lines.replace:
                continue
            text = _LONE_SURROGATE.sub("\ufffd", text)
        yield Document(text, lines.file_bytes(num_bytes))
        num_bytes = 0


def _json_values(content: str) -> list[Any]:
    """All JSON values in a text, in order; usually there is one."""
    try:
        return [_DECODER.decode(content)]
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    values: list[Any] = []
    place = 0
    while True:
        space = _JSON_SPACE.match(content, place)
        place = space.end() if space else place
        if place == len(content):
            return values
        value, place = _DECODER.raw_decode(content, place)
        values.append(value)


def _text_of(record: Any, json_key: str) -> str | None:
    """The field of that name; if there is none, the nested field that its dotted parts name.

    Raises:
        _DoubledKey: the record names the field, or one that it is nested in, more than once.
    """
    names = [json_key]
    if isinstance(record, dict) and json_key not in record:
        names = json_key.split(".")
    for name in names:
        if isinstance(record, _Doubled) and name in record.doubled:
            raise _DoubledKey(f"'{name}'")
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, str) else None


def _decompressed(file: TextFile, raw: io.BufferedReader) -> Any:
    if file.compression == ".gz":
        return gzip.GzipFile(fileobj=raw)
    zstandard = require("zstandard", "zstandard", file.path)
    return io.BufferedReader(_ZstdReader(zstandard, raw), _READ_BYTES)


class _BrokenFrame(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Reads Zstandard frames in sequence. Unlike the package's reader, it detects truncation."""

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
