"""``<prefix>.meta.json``: what preprocessing made, and whether it is still there."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pypkg.data.corpus.manifest import changed_files
from pypkg.files import write_file

logger = logging.getLogger("pypkg")


@dataclass(frozen=True)
class Summary:
    """The summary of a corpus, stored in ``<prefix>.meta.json``.

    Attributes:
        documents, sequences, tokens: their numbers in the corpus.
        text_bytes: UTF-8 bytes of its documents.
        dropped: number of documents left out, by reason.
        lengths: histogram of documents: [n, count] for documents with n to 2 n - 1 tokens.
        vocab_size, tokenizer, ids_digest: size and file of the tokenizer, and the digest of the ids
            that it gives a fixed text (corpus/made_with.py).
        dtype: dtype of the tokens in the file.
        outputs: size of each file in bytes, by name.
        seconds: duration of the run.
        fingerprint: digest of everything that the outputs depend on.
        resumed: "n of m": the number of units that an interrupted run had finished, and of all.
        mended: number of documents in which U+FFFD replaces invalid UTF-8.
        modified: time of the last change of each file in nanoseconds, by name.
        reused: whether the corpus existed before and was made in the same way.
    """

    documents: int
    sequences: int
    tokens: int
    text_bytes: int
    dropped: dict[str, int]
    lengths: list[list[int]]
    vocab_size: int
    dtype: str
    tokenizer: str
    outputs: dict[str, int]
    seconds: float
    fingerprint: str
    ids_digest: str = ""
    resumed: str = ""
    mended: int = 0
    modified: dict[str, int] = field(default_factory=dict)
    reused: bool = field(default=False, compare=False)


def write_summary(prefix: str, summary: Summary) -> None:
    """Writes ``<prefix>.meta.json``."""
    contents = asdict(summary)
    del contents["reused"]
    write_file(meta_file(prefix), json.dumps(contents, indent=2).encode() + b"\n")


def meta_file(prefix: str) -> Path:
    """The file of the summary."""
    return Path(prefix + ".meta.json")


def sizes_and_times(prefix: str) -> tuple[dict[str, int], dict[str, int]]:
    """``outputs`` and ``modified`` of :class:`Summary`, of the files as they are now."""
    stats = {file.name: file.stat() for file in (Path(prefix + ".bin"), Path(prefix + ".idx"))}
    return (
        {name: stat.st_size for name, stat in stats.items()},
        {name: stat.st_mtime_ns for name, stat in stats.items()},
    )


def previous_summary(prefix: str, fingerprint: str) -> Summary | None:
    """The summary of an earlier run, if its files exist, are whole and have the same fingerprint.

    Sizes and times of change are compared. Files with other times, such as copies, are compared
    with the checksums of the manifest.
    """
    try:
        contents = json.loads(meta_file(prefix).read_text())
        outputs, modified = sizes_and_times(prefix)
        if contents["fingerprint"] != fingerprint or contents["outputs"] != outputs:
            return None
        summary = Summary(**contents, reused=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # missing, or of another program
    if summary.modified == modified:
        return summary
    problems = changed_files(prefix)
    if problems is None and summary.modified:
        problems = [f"the files of {prefix} have changed, and it has no manifest"]
    for problem in problems or ():
        logger.warning("the corpus is made anew: %s", problem)
    if problems:
        return None
    summary = replace(summary, modified=modified)
    write_summary(prefix, summary)  # so that the next run need not read the files
    return summary
