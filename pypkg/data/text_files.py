"""Documents from text files and JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pypkg.errors import UserError

_JSON_SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class TextFile:
    """A file of the corpus; ``name`` is its path below the input folder."""

    path: Path
    name: str
    size: int  # bytes
    mtime_ns: int

    @property
    def is_compressed(self) -> bool:
        return self.name.endswith(".gz")


@dataclass(frozen=True)
class Document:
    text: str
    num_bytes: int  # of the text in UTF-8
    read_bytes: int  # of the file, with what surrounds the text there


def find_text_files(
    input_path: Path, suffixes: Sequence[str], exclude: Sequence[str]
) -> list[TextFile]:
    """The files below a folder in the order of their names, or the one file.

    Args:
        suffixes: of text files; ``.jsonl`` and ``.jsonl.gz`` are always taken.
        exclude: names of folders that are left out, wherever they are.

    Raises:
        UserError: the path cannot be read, or there is no such file below it.
    """
    wanted = (*suffixes, *_JSON_SUFFIXES)
    try:
        if not input_path.is_dir():
            return [_text_file(input_path, input_path.name)]
        found = []
        for folder, folders, names in os.walk(input_path, onerror=_raise):
            folders[:] = [name for name in folders if name not in exclude]
            for name in names:
                path = Path(folder, name)
                if name.endswith(wanted) and path.is_file():
                    found.append(_text_file(path, path.relative_to(input_path).as_posix()))
    except OSError as error:
        raise UserError(f"cannot read --input_path {error.filename}: {error.strerror}") from error
    if not found:
        raise UserError(
            f"--input_path {input_path} has no file ending in {', '.join(wanted)}; other text "
            "files are taken with --file_suffix"
        )
    return sorted(found, key=lambda file: file.name)


def read_documents(
    files: Sequence[TextFile], json_key: str, report: Callable[[str], None]
) -> Iterator[Document]:
    """The documents of the files: a whole text file, or the field of each JSON line.

    Args:
        json_key: field that holds the text.
        report: called with a description of each document that cannot be used; it may raise.
    """
    for file in files:
        try:
            if file.name.endswith(_JSON_SUFFIXES):
                yield from _read_json_lines(file, json_key, report)
            else:
                data = file.path.read_bytes()
                yield Document(data.decode(), len(data), len(data))
        except OSError as error:
            report(f"{file.path}: cannot be read: {error.strerror or error}")
        except (EOFError, zlib.error) as error:
            report(f"{file.path}: broken compressed file, the rest of it is lost: {error}")
        except UnicodeDecodeError as error:
            report(f"{file.path}: not UTF-8 at byte {error.start}")


def _read_json_lines(
    file: TextFile, json_key: str, report: Callable[[str], None]
) -> Iterator[Document]:
    with (gzip.open if file.is_compressed else open)(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                text = json.loads(line.decode())[json_key]
                if not isinstance(text, str):
                    raise TypeError
                num_bytes = len(text.encode())
            except (KeyError, TypeError, IndexError):
                report(f"{file.path}, line {number}: no text in field '{json_key}'")
            except UnicodeError as error:
                report(f"{file.path}, line {number}: not UTF-8: {error.reason}")
            except (ValueError, RecursionError) as error:
                report(f"{file.path}, line {number}: not JSON: {error}")
            else:
                yield Document(text, num_bytes, len(line))


def _text_file(path: Path, name: str) -> TextFile:
    status = path.stat()
    return TextFile(path, name, status.st_size, status.st_mtime_ns)


def _raise(error: OSError) -> None:
    raise error
