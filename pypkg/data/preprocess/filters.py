"""Filters that drop or change texts before tokenization."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

EMPTY = "empty"
TOO_SHORT = "shorter than --min_doc_length"
DUPLICATE = "duplicate"

DIGEST_BYTES = 16  # among 10^12 documents, a collision has a probability below 10^-14


def text_filter(
    strip: bool, max_repeated_len: int | None, min_doc_length: int
) -> Callable[[str], tuple[str, str | None]]:
    """A function that maps a text to (the kept text, the reason if it is dropped, else None).

    Args:
        strip: remove white space from both ends.
        max_repeated_len: a character other than a line break that is repeated more often than this
            is kept once; None: no limit.
        min_doc_length: least number of characters of a text.
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

    Such a run has at least ``length`` + 1 characters. It therefore contains a character whose index
    is a multiple of ``length``, and the next character. Only these pairs are compared first.
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
    """The digest of a text, which identifies identical documents."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
