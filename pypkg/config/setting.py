"""What the parser, the checks and the documentation know about one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

# The meaning of a setting whose words have a table of their own in the documentation.
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
    """A dataclass field with what the parser, the checks and the documentation need to know."""
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
    """The words of ``parts``, at spaces and commas, each once: ["stage2 offload"] is two."""
    words = " ".join(parts).replace(",", " ").split()
    return tuple(dict.fromkeys(words))


def interval(strategy: str, steps: int, last: int) -> int:
    """Steps between what a strategy asks for; 0: it does not ask.

    Args:
        strategy: "no", "steps", or "epoch", which in PaddleNLP is the whole run.
        steps: the interval of "steps".
        last: steps of the whole run.

    Raises:
        KeyError: another strategy.
    """
    return {"no": 0, "steps": steps, "epoch": last}[strategy]
