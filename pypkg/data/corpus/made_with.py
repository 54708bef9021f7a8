"""Compares the tokenizer of a run with the one that made a corpus, by ``<prefix>.meta.json``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence

from pypkg.data.tokenizers.base import Tokenizer
from pypkg.errors import UserError
from pypkg.files.checksums import bytes_digest

logger = logging.getLogger("pypkg")

# Two tokenizers that give this text the same ids are taken for one. Their files may differ.
_PROBE = (
    "The quick brown fox jumps over 13 lazy dogs; it's 3.14159 metres (2026-01-31).\n"
    "def f(x: int) -> str:\n    return {'a': x * 2, \"b\": [x, -1]}\t# naïve café, Zürich\n"
    "Быстрая лиса прыгает. 敏捷的棕色狐狸跳过懒狗。 素早い茶色の狐。 빠른 여우 الثعلب السريع 🦊\n"
    "internationalization electroencephalograph HTTPResponse __init__ https://example.org/a?b=1\n"
)


def ids_digest(tokenizer: Tokenizer) -> str:
    """Digest of the ids of a fixed text, which tells tokenizers of equal size apart.

    Empty if the tokenizer has no ids for a part of the text.
    """
    try:
        return bytes_digest(json.dumps(tokenizer.encode(_PROBE)).encode())
    except UserError:
        return ""


def warn_of_other_tokenizers(
    prefixes: Sequence[str], tokenizer: Tokenizer, source: str | os.PathLike[str]
) -> None:
    """Logs a warning for each corpus that another tokenizer has made.

    Its ids would stand for other words, and a run that trains on them looks like any other. A
    corpus without a summary, or with one of another program, is passed over.

    Args:
        prefixes: paths of the corpora without suffixes.
        tokenizer: of the run.
        source: its folder or file, for the warning.
    """
    entries, digest = tokenizer.vocab_size, ids_digest(tokenizer)
    for prefix in prefixes:
        try:
            with open(f"{prefix}.meta.json", encoding="utf-8") as file:
                summary = json.load(file)
            made_with, size = summary["tokenizer"], int(summary["vocab_size"])
            found = summary.get("ids_digest")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if size != entries:
            difference = f"of {size:,} entries, but that of the run, {source}, has {entries:,}"
        elif found and digest and found != digest:
            difference = f"but that of the run, {source}, gives the same text other ids"
        else:
            continue
        logger.warning(
            "%s was made with the tokenizer %s %s: its tokens would be other words. Give the "
            "tokenizer of the data in tokenizer_name_or_path, or make the data with that of the "
            "run",
            *(prefix, made_with, difference),
        )
