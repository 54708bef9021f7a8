"""Which files hold the text of a corpus, and the pieces that they are read in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pypkg.data.optional_packages import require
from pypkg.errors import UserError

TEXT, JSON_LINES, PARQUET = "text", "JSON lines", "Parquet"
_COMPRESSIONS = (".gz", ".zst")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_PARQUET_SUFFIX = ".parquet"

_LEAST_UNIT, _MOST_UNIT = 1 << 20, 64 << 20  # bytes of files
_UNITS = 256  # of a corpus between these


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus; ``name`` is its path below the input folder."""

    path: Path
    name: str
    size: int  # bytes
    mtime_ns: int
    kind: str  # TEXT, JSON_LINES or PARQUET
    compression: str  # "", ".gz" or ".zst"


@dataclass(frozen=True)
class Span:
    """A piece of a file that holds whole documents: bytes, or row groups of a Parquet file."""

    file: TextFile
    start: int
    end: int
    file_bytes: int  # that it takes, as a share of the file's size


# What one process tokenizes at a time, and what an interrupted run need not do again.
Unit = tuple[Span, ...]


def find_text_files(
    input_path: Path, suffixes: Sequence[str], exclude: Sequence[str]
) -> list[TextFile]:
    """The files below a folder in the order of their names, or the one file.

    Args:
        suffixes: of text files, which may be compressed (.gz, .zst); JSON lines and Parquet are
            always taken.
        exclude: names of folders that are left out, wherever they are.

    Raises:
        UserError: the path cannot be read, or there is no such file below it.
    """
    try:
        if not input_path.is_dir():
            name = input_path.name
            kind, compression = _kind(name, suffixes) or (TEXT, _compression(name))
            return [_text_file(input_path, name, kind, compression)]
        found = []
        for folder, folders, names in os.walk(input_path, onerror=_raise):
            folders[:] = [name for name in folders if name not in exclude]
            for name in names:
                path, kind = Path(folder, name), _kind(name, suffixes)
                if kind is not None and path.is_file():
                    found.append(_text_file(path, path.relative_to(input_path).as_posix(), *kind))
    except OSError as error:
        raise UserError(f"cannot read --input_path {error.filename}: {error.strerror}") from error
    if not found:
        raise UserError(
            f"--input_path {input_path} has no file ending in "
            f"{', '.join((*suffixes, *JSON_SUFFIXES, _PARQUET_SUFFIX))}; other text files are "
            "taken with --file_suffix"
        )
    return sorted(found, key=lambda file: file.name)


def plan_units(files: Sequence[TextFile], doc_spliter: str | None) -> list[Unit]:
    """Cuts the corpus into units of similar size, in order; they depend on the files alone.

    Large files are cut between documents. Compressed files and text files that are one document
    stay whole.

    Args:
        doc_spliter: line between the documents of a text file; None where a file is one document.
    """
    target = min(max(sum(file.size for file in files) // _UNITS, _LEAST_UNIT), _MOST_UNIT)
    units: list[Unit] = []
    spans: list[Span] = []
    size = 0
    for span in _spans(files, target, doc_spliter):
        if spans and size + span.file_bytes > target:
            units.append(tuple(spans))
            spans, size = [], 0
        spans.append(span)
        size += span.file_bytes
    return [*units, tuple(spans)] if spans else units


def _spans(files: Sequence[TextFile], target: int, doc_spliter: str | None) -> Iterator[Span]:
    for file in files:
        try:
            if file.kind == PARQUET:
                yield from _row_groups(file, target)
            elif file.compression or (file.kind == TEXT and doc_spliter is None):
                yield Span(file, 0, file.size, file.size)
            else:
                separator = (
                    None if file.kind == JSON_LINES else (doc_spliter or "").strip().encode()
                )
                cuts = _cuts(file, target, separator)
                for start, end in pairwise(cuts):
                    yield Span(file, start, end, end - start)
        except OSError:
            yield Span(file, 0, file.size, file.size)  # reading it tells what is wrong


def _cuts(file: TextFile, target: int, separator: bytes | None) -> list[int]:
    """Byte offsets from 0 to the size, about ``target`` apart, at which a document begins.

    Args:
        separator: line between documents; None where each line is one.
    """
    cuts = [0]
    with open(file.path, "rb") as data:
        while cuts[-1] + 2 * target < file.size:
            data.seek(cuts[-1] + target - 1)
            line = data.readline()
            while separator is not None and line:
                line = data.readline()
                if line.strip() == separator:
                    break
            if data.tell() >= file.size:
                break
            cuts.append(data.tell())
    return [*cuts, file.size]


def _row_groups(file: TextFile, target: int) -> Iterator[Span]:
    parquet = require("pyarrow.parquet", "pyarrow", file.path)
    try:
        with parquet.ParquetFile(file.path) as opened:
            metadata = opened.metadata
            sizes = [
                sum(
                    metadata.row_group(i).column(k).total_compressed_size
                    for k in range(metadata.num_columns)
                )
                for i in range(metadata.num_row_groups)
            ]
    except Exception:  # of a broken file; reading it tells what is wrong
        sizes = []
    start, size = 0, 0
    for end, group_size in enumerate(sizes, start=1):
        size += group_size
        if size >= target and end < len(sizes):
            yield Span(file, start, end, size)
            start, size = end, 0
    if start == 0:
        yield Span(file, 0, len(sizes), file.size)
    else:
        yield Span(file, start, len(sizes), size)


def _kind(name: str, suffixes: Sequence[str]) -> tuple[str, str] | None:
    compression = _compression(name)
    if name.endswith(JSON_SUFFIXES):
        return JSON_LINES, compression
    if name.endswith(_PARQUET_SUFFIX):
        return PARQUET, ""
    if name.removesuffix(compression).endswith(tuple(suffixes)):
        return TEXT, compression
    return None


def _compression(name: str) -> str:
    return next((each for each in _COMPRESSIONS if name.endswith(each)), "")


def _text_file(path: Path, name: str, kind: str, compression: str) -> TextFile:
    status = path.stat()
    return TextFile(path, name, status.st_size, status.st_mtime_ns, kind, compression)


def _raise(error: OSError) -> None:
    raise error
