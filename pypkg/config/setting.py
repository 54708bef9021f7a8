"""Metadata of a setting, for the parser, the checks and the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

# Help of a setting whose words are explained in a separate table of the documentation.
SEE_BELOW = "words that are explained in docs/configuration.md"


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    required: bool = False,
) -> Any:
    """A dataclass field with the metadata of a setting.

    Args:
        help: its meaning, a phrase for docs/configuration.md and the command line.
        choices: allowed values; None: any.
        at_least, above, at_most, below: limits of a number, or of each number of a list.
        required: whether it has to be given.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "required": required,
    }
    return field(default=default, metadata=metadata)


def split_words(parts: Sequence[str]) -> tuple[str, ...]:
    """Splits ``parts`` at spaces and commas, without duplicates: ["stage2 offload"] is 2 words."""
    words = " ".join(parts).replace(",", " ").split()
    return tuple(dict.fromkeys(words))


def interval(strategy: str, steps: int, last: int) -> int:
    """Number of steps between evaluations or checkpoints; 0: never.

    Args:
        strategy: "no", "steps", or "epoch", which in PaddleNLP means the whole run.
        steps: the result for "steps".
        last: number of steps of the whole run.

    Raises:
        KeyError: the strategy is unknown.
    """
    return {"no": 0, "steps": steps, "epoch": last}[strategy]
