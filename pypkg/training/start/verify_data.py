"""Verification of the corpora of a run, for the setting ``verify_data``."""

from __future__ import annotations

import logging
import time

from pypkg.config import Settings
from pypkg.config.reading.parser import listed
from pypkg.data.corpus.manifest import MANIFEST_SUFFIX, changed_files
from pypkg.data.datasets.build import resolve_input_dir
from pypkg.errors import UserError
from pypkg.training.start.read_progress import read_progress

logger = logging.getLogger("pypkg")


def verify_corpora(settings: Settings) -> None:
    """Compares every corpus of ``input_dir`` with its manifest. One rank calls this.

    Raises:
        UserError: lists all files that differ.
    """
    started = time.monotonic()
    weighted = settings.blend_by == "weights"
    parts = resolve_input_dir(settings.input_dir, weighted=weighted)
    prefixes = parts if len(parts) == 1 else parts[1::2]  # weights and prefixes in turn
    problems: list[str] = []
    for prefix in prefixes:
        changed = changed_files(prefix, read_progress(prefix))
        if changed is None:
            logger.warning(
                "verify_data: %s has no %s, so it cannot be verified", prefix, MANIFEST_SUFFIX
            )
        problems += changed or ()
    if problems:
        raise UserError(listed(problems, "problems with the corpora (verify_data)"))
    logger.info(
        "verify_data: no corpus of %d is damaged, in %.1f s",
        *(len(prefixes), time.monotonic() - started),
    )
