"""Reads documents from Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pypkg.data.optional_packages import require
from pypkg.data.preprocess.input.documents import (
    BROKEN,
    NO_TEXT,
    NOT_UTF8,
    Document,
    Problem,
    Report,
)
from pypkg.data.preprocess.input.files import Span

_ROWS = 512  # that are read at a time
_TEXT_TYPES = {
    "string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null",
}  # fmt: skip


def read_parquet(span: Span, column: str, report: Report, replace: bool) -> Iterator[Document]:
    """Yields the documents of some row groups.

    Args:
        column: name of a column; dots separate the names of nested struct fields.
        report: called with each row that is not usable, or once if the file is not readable.
        replace: keep a row that is not UTF-8, with U+FFFD in place of invalid bytes.
    """
    path = span.file.path
    parquet = require("pyarrow.parquet", "pyarrow", path)
    import pyarrow

    try:
        with parquet.ParquetFile(path) as file:
            names, kind = _find(file.schema_arrow, column)
            if kind is None:
                there = f"the columns are {', '.join(file.schema_arrow.names)}"
                report(Problem(NO_TEXT, path, f"'{column}'; {there}", file_lost=True))
                return
            if not _holds_text(pyarrow, kind):
                detail = f"column '{column}' holds {kind}"
                report(Problem(NO_TEXT, path, detail, file_lost=True))
                return
            groups = [file.metadata.row_group(i).num_rows for i in range(span.end)]
            first = row = sum(groups[: span.start])
            rows, read = max(1, sum(groups[span.start :])), 0
            for batch in file.iter_batches(
                _ROWS, list(range(span.start, span.end)), [column], use_threads=False
            ):
                for value in _bytes(pyarrow, batch.column(names[0]), names[1:]).to_pylist():
                    row += 1
                    if value is None:
                        report(Problem(NO_TEXT, path, f"row {row} of '{column}' is null"))
                        continue
                    try:
                        text = value.decode()
                    except UnicodeDecodeError as error:
                        detail = f"row {row}: {error.reason}"
                        report(Problem(NOT_UTF8, path, detail, mended=replace))
                        if not replace:
                            continue
                        text = value.decode(errors="replace")
                    share = span.file_bytes * (row - first) // rows - read
                    read += share
                    yield Document(text, share)
    except pyarrow.ArrowException as error:
        report(Problem(BROKEN, path, str(error), file_lost=True))


def _find(schema: Any, column: str) -> tuple[list[str], Any]:
    """The path of a column, name by name, and its type; None if none or several have the name."""
    names = [column] if column in schema.names else column.split(".")
    kind: Any = None
    for depth, name in enumerate(names):
        fields = schema.names if depth == 0 else _field_names(kind)
        if fields.count(name) != 1:
            return names, None
        kind = (schema if depth == 0 else kind).field(name).type
    return names, kind


def _field_names(kind: Any) -> list[str]:
    """Names of the fields of a struct; none for another type."""
    if not str(kind).startswith("struct<"):
        return []
    return [kind.field(number).name for number in range(kind.num_fields)]


def _holds_text(pyarrow: Any, kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        return _holds_text(pyarrow, kind.value_type)
    return str(kind) in _TEXT_TYPES or pyarrow.types.is_fixed_size_binary(kind)


def _bytes(pyarrow: Any, values: Any, fields: Sequence[str]) -> Any:
    """The column as an array of bytes; ``fields`` is its path through structs."""
    from pyarrow.compute import struct_field

    if fields:
        values = struct_field(values, list(fields))
    if pyarrow.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.cast(pyarrow.large_binary())
