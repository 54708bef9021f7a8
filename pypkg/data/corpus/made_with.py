"""Which tokenizer a corpus was made with, as ``<prefix>.meta.json`` says."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

logger = logging.getLogger("pypkg")


def warn_of_other_tokenizers(prefixes: Sequence[str], entries: int, tokenizer: str) -> None:
    """Logs a warning for each corpus that a tokenizer of another size has made.

    Its ids would stand for other words, and a run that trains on them looks like any other. A
    corpus without a summary, or with one of another program, is passed over.

    Args:
        prefixes: paths of the corpora without suffixes.
        entries: size of the tokenizer of the run.
        tokenizer: its folder or file, for the warning.
    """
    for prefix in prefixes:
        try:
            with open(f"{prefix}.meta.json", encoding="utf-8") as file:
                summary = json.load(file)
            made_with, size = summary["tokenizer"], int(summary["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if size != entries:
            logger.warning(
                "%s was made with the tokenizer %s of %s entries, but that of the run, %s, has %s: "
                "its tokens would be other words. Give the tokenizer of the data in "
                "tokenizer_name_or_path, or make the data with that of the run",
                prefix,
                made_with,
                f"{size:,}",
                tokenizer,
                f"{entries:,}",
            )
