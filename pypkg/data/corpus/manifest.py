"""``<prefix>.manifest.json``: size and checksum of each file of a corpus, as they were written.

Files are listed by their suffix, so that a corpus can be renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from pypkg.files.checksums import (
    ALGORITHM,
    FileRecord,
    SealError,
    file_records,
    read_sealed_json,
    sealed_json,
)

MANIFEST_SUFFIX = ".manifest.json"
_FORMAT = 1
_REMEDY = (
    "Remove the files of the corpus and make it again, or copy it again from where it was made; "
    "if another program has made it anew, remove {file}"
)


def corpus_manifest(records: Mapping[str, FileRecord]) -> bytes:
    """The content of the manifest.

    Args:
        records: size and checksum of each file by suffix, such as ".bin".
    """
    files = {suffix: asdict(record) for suffix, record in records.items()}
    return sealed_json({"format": _FORMAT, "checksum": ALGORITHM, "files": files})


def written_digest(prefix: str) -> str:
    """Checksum of the tokens as the manifest has it; empty if a corpus has no usable manifest."""
    try:
        content = read_sealed_json(Path(prefix + MANIFEST_SUFFIX))
        return str(content["files"][".bin"]["digest"])
    except (SealError, OSError, KeyError, TypeError):
        return ""


def changed_files(prefix: str, on_read: Callable[[int], None] | None = None) -> list[str] | None:
    """The differences from the manifest, one sentence each; None if a corpus has no manifest.

    Args:
        on_read: called, from several threads, with the number of bytes of each block read.
    """
    path = Path(prefix + MANIFEST_SUFFIX)
    try:
        content = read_sealed_json(path)
        if (content["format"], content["checksum"]) != (_FORMAT, ALGORITHM):
            return [f"{path} is of a later version of this package; use that version"]
        expected = {
            Path(prefix + suffix): FileRecord(**record)
            for suffix, record in content["files"].items()
        }
    except FileNotFoundError:
        return None
    except (SealError, OSError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} cannot be used: {error}. {_REMEDY.format(file=path.name)}"]
    problems = []
    present = [file for file in expected if file.is_file()]
    try:
        found = file_records(present, on_read)
    except OSError as error:
        return [f"{error.filename or prefix} cannot be read: {error.strerror}"]
    for file, record in expected.items():
        if file not in found:
            problems.append(f"{file} is missing, which {path.name} lists")
        elif found[file].size != record.size:
            problems.append(
                f"{file} has {found[file].size:,} bytes, expected {record.size:,} as {path.name} "
                f"says. {_REMEDY.format(file=path.name)}"
            )
        elif found[file].digest != record.digest:
            problems.append(
                f"{file} has another checksum than when it was written. "
                f"{_REMEDY.format(file=path.name)}"
            )
    mask = Path(prefix + ".lsm")
    if mask not in expected and mask.exists():
        problems.append(f"{mask} is no part of the corpus that {path.name} lists; remove it")
    return problems
