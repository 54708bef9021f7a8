"""What is dropped or mended before a text is tokenized."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

EMPTY = "empty"
TOO_SHORT = "shorter than --min_doc_length"
DUPLICATE = "duplicate"

DIGEST_BYTES = 16  # two documents of 10^12 are alike by chance once in 10^14 corpora


def text_filter(
    strip: bool, max_repeated_len: int | None, min_doc_length: int
) -> Callable[[str], tuple[str, str | None]]:
    """A function that maps a text to what is kept of it, and the reason if nothing is.

    Args:
        strip: take white space off both ends.
        max_repeated_len: where one character other than a line break is repeated more than so
            often, it is kept once.
        min_doc_length: characters that a text must have.
    """
    repeated = re.compile(rf"(.)\1{{{max_repeated_len},}}") if max_repeated_len else None

    def apply(text: str) -> tuple[str, str | None]:
        if strip:
            text = text.strip()
        if repeated is not None and max_repeated_len and has_run(text, max_repeated_len):
            text = repeated.sub(r"\1", text)
        if not text:
            return text, EMPTY
        return text, TOO_SHORT if len(text) < min_doc_length else None

    return apply


def has_run(text: str, length: int) -> bool:
    """Whether one character is repeated more than ``length`` times in a row; faster than a regex.

    Such a run is ``length`` + 1 long or longer. So it covers a character whose number is a
    multiple of ``length`` together with the next one, and only there needs to be looked.
    """
    for number, (one, other) in enumerate(zip(text[::length], text[1::length])):
        if one == other:
            place = number * length
            before, after = text[max(0, place - length) : place], text[place : place + length + 1]
            equal = len(before) - len(before.rstrip(one)) + len(after) - len(after.lstrip(one))
            if equal > length:
                return True
    return False


def digest(text: str) -> bytes:
    """Fingerprint of a text, by which identical documents are found."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
