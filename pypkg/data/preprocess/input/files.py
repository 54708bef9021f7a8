"""Finds the text files of a corpus, and divides them into units."""

from __future__ import annotations

import errno
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from pypkg.data.optional_packages import require
from pypkg.errors import UserError

TEXT, JSON_LINES, PARQUET = "text", "JSON lines", "Parquet"
_COMPRESSIONS = (".gz", ".zst")
_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_JSON_SUFFIX = ".json"
_PARQUET_SUFFIX = ".parquet"
BOM = b"\xef\xbb\xbf"  # the byte order mark of UTF-8

logger = logging.getLogger("pypkg")

_LEAST_UNIT, _MOST_UNIT = 1 << 20, 64 << 20  # bytes of a unit
_UNITS = 256  # number of units, if their sizes are between these limits
_HEAD_BYTES = 1 << 16  # bytes that identify the form of a file
_NAMED = 3  # number of files that the log names for one reason


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus; ``name`` is its path below the input folder."""

    path: Path
    name: str
    size: int  # bytes
    mtime_ns: int
    kind: str  # TEXT, JSON_LINES or PARQUET
    compression: str  # "", ".gz" or ".zst"

    @property
    def may_be_one_value(self) -> bool:
        """Whether the file may be one JSON value; :func:`is_one_value` examines its contents."""
        return self.name.lower().removesuffix(self.compression).endswith(_JSON_SUFFIX)


@dataclass(frozen=True)
class Span:
    """A piece of a file that holds whole documents: bytes, or row groups of a Parquet file."""

    file: TextFile
    start: int
    end: int
    file_bytes: int  # bytes of the file that belong to this span


# The spans that one process tokenizes as a unit. A resumed run skips finished units.
Unit = tuple[Span, ...]


@dataclass
class TextFiles:
    """The files found below a folder.

    Attributes:
        files: files to read, sorted by name.
        left_out: names of files and folders that are not read, by reason, without those of
            ``--exclude``.
    """

    files: list[TextFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def log_left_out(self) -> None:
        for reason, names in sorted(self.left_out.items()):
            shown = ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            logger.info("left out %s %s: %s", f"{len(names):,}", reason, shown)


def find_text_files(input_path: Path, suffixes: Sequence[str], exclude: Sequence[str]) -> TextFiles:
    """Finds the files below a folder, or the one given file.

    Suffixes are not case-sensitive. Links are followed, and each folder is read once. Hidden files
    and folders, whose names begin with a dot, are left out.

    Args:
        input_path: a folder or a file.
        suffixes: of text files, which may be compressed (.gz, .zst). JSON lines and Parquet files
            are always found.
        exclude: names, paths below ``input_path`` or patterns (``*.bak``) of files and folders that
            are left out.

    Raises:
        UserError: a file or folder cannot be read, a link is broken, or no file is found.
    """
    found = TextFiles()
    try:
        if not input_path.is_dir():
            name = input_path.name
            kind, compression = _kind(name, suffixes) or (TEXT, _compression(name))
            found.files = [_text_file(input_path, name, kind, compression)]
            return found
        for path, name in _walk(input_path, exclude, found.left_out):
            kind_found = _kind(name, suffixes)
            if path.is_file():
                if kind_found is None:
                    found.left_out[_unknown_suffix(name)].append(name)
                else:
                    found.files.append(_text_file(path, name, *kind_found))
            elif path.is_symlink() and not path.exists():
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, which does not exist; repair or "
                    f"remove it, or leave it out with --exclude {path.name}"
                )
            else:
                found.left_out["that are no files, but devices or the like"].append(name)
    except OSError as error:
        raise UserError(f"cannot read --input_path {error.filename}: {error.strerror}") from error
    if not found.files:
        found.log_left_out()
        taken = ", ".join((*suffixes, *_LINES_SUFFIXES, _JSON_SUFFIX, _PARQUET_SUFFIX))
        raise UserError(
            f"--input_path {input_path} has no file ending in {taken}; other text files are taken "
            "with --file_suffix"
        )
    if any(file.kind == TEXT and file.may_be_one_value for file in found.files):
        logger.warning("--file_suffix names .json: such files are read as plain text, not as JSON")
    found.files.sort(key=lambda file: file.name)
    return found


def _walk(
    top: Path, exclude: Sequence[str], left_out: dict[str, list[str]]
) -> Iterator[tuple[Path, str]]:
    """Yields (path, name below ``top``) of each file; linked folders follow after all others."""

    def kept(name: str) -> bool:
        base = os.path.basename(name)
        if any(p in (base, name) or fnmatchcase(base, p) or fnmatchcase(name, p) for p in exclude):
            return False
        if base.startswith("."):
            left_out["hidden files and folders, whose names begin with a dot"].append(name)
        return not base.startswith(".")

    seen: set[tuple[int, int]] = set()
    starts = [top]
    for start in starts:  # the list grows in the loop
        for folder, folders, names in os.walk(start, onerror=_raise):
            below = Path(folder).relative_to(top)
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                left_out["links to folders that are read already"].append(below.as_posix())
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in sorted(folders) if kept((below / name).as_posix())]
            starts += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            for name in names:
                if kept((below / name).as_posix()):
                    yield Path(folder, name), (below / name).as_posix()


def is_one_value(head: bytes) -> bool:
    """Whether a ``.json`` file with these first bytes is one JSON value instead of JSON lines.

    Such a file begins with an array, or with a record whose first line is only a brace.
    """
    first, line_break, _ = head.removeprefix(BOM).lstrip().partition(b"\n")
    return first.startswith(b"[") or (first.strip() == b"{" and bool(line_break))


def check_unchanged(files: Sequence[TextFile]) -> None:
    """Checks that the files have not changed since they were found.

    Raises:
        UserError: a file has another size or modification time, so that parts may be missing.
    """
    for file in files:
        try:
            status = file.path.stat()
            unchanged = (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns)
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{file.path} changed while it was read, so that no corpus is written; run the "
                "command again when the input is complete"
            )


def plan_units(files: Sequence[TextFile], doc_spliter: str | None) -> list[Unit]:
    """Divides the corpus into units of similar size, in order; only the files determine them.

    Large files are divided between documents. Compressed files, and text files that are one
    document, are not divided.

    Args:
        doc_spliter: line between the documents of a text file; None: a file is one document.
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
            elif _stays_whole(file, doc_spliter):
                yield Span(file, 0, file.size, file.size)
            else:
                separator = (
                    None if file.kind == JSON_LINES else (doc_spliter or "").strip().encode()
                )
                cuts = _cuts(file, target, separator)
                for start, end in pairwise(cuts):
                    yield Span(file, start, end, end - start)
        except OSError:
            yield Span(file, 0, file.size, file.size)  # the reader reports the error


def _stays_whole(file: TextFile, doc_spliter: str | None) -> bool:
    if file.compression or (file.kind == TEXT and doc_spliter is None):
        return True
    if file.kind == JSON_LINES and file.may_be_one_value:
        with open(file.path, "rb") as data:
            return is_one_value(data.read(_HEAD_BYTES))
    return False


def _cuts(file: TextFile, target: int, separator: bytes | None) -> list[int]:
    """Byte offsets of document starts, about ``target`` apart, with 0 and the size of the file.

    Args:
        separator: line between documents; None: each line is a document.
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
    except Exception:  # a broken file; the reader reports the error
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
    plain = name.lower().removesuffix(compression)
    as_text = plain.endswith(tuple(suffix.lower() for suffix in suffixes))
    if plain.endswith(_LINES_SUFFIXES) or (plain.endswith(_JSON_SUFFIX) and not as_text):
        return JSON_LINES, compression
    if name.lower().endswith(_PARQUET_SUFFIX):
        return PARQUET, ""
    return (TEXT, compression) if as_text else None


def _compression(name: str) -> str:
    return next((each for each in _COMPRESSIONS if name.lower().endswith(each)), "")


def _unknown_suffix(name: str) -> str:
    """The group of left-out files that this one belongs to, for the log."""
    compression = _compression(name)
    suffix = Path(name.lower().removesuffix(compression)).suffix + compression
    if not suffix:
        return "files without a suffix"
    return f"files that end in {suffix}, which --file_suffix does not name"


def _text_file(path: Path, name: str, kind: str, compression: str) -> TextFile:
    status = path.stat()
    if not os.access(path, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return TextFile(path, name, status.st_size, status.st_mtime_ns, kind, compression)


def _raise(error: OSError) -> None:
    raise error
