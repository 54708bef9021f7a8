"""Prompts in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pypkg.errors import UserError

_SUFFIXES = (".txt", ".json", ".jsonl")


def given_prompts(words: Sequence[str]) -> list[str]:
    """``words``, or the prompts of the file if ``words`` is one name of a prompt file.

    Raises:
        UserError: as in ``read_prompts``.
    """
    if len(words) == 1 and words[0].endswith(_SUFFIXES) and "\n" not in words[0]:
        return read_prompts(words[0])
    return list(words)


def check_is_text(prompt: str) -> None:
    """
    Raises:
        UserError: the prompt holds half of a surrogate pair, which is also how Python passes on
            bytes that are not UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the prompt {prompt[:40]!a} is not text: its character {error.start + 1} is a byte "
            "that is not UTF-8, or half of a surrogate pair; expected a text"
        ) from error


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file, in order; at least one.

    A ``.json`` file holds an array, a ``.jsonl`` file JSON lines; each prompt is a text, or an
    object with a text under "prompt". In another file each line that is not empty is a prompt.

    Raises:
        UserError: the file cannot be read, or holds no prompt or something else.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        if file.suffix == ".json":
            values = json.loads(text)
        elif file.suffix == ".jsonl":
            values = [json.loads(line) for line in lines]
        else:
            values = lines
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; give a file of prompts"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not {file.suffix[1:].upper()} in UTF-8: {error}") from error
    if not isinstance(values, list) or not values:
        raise UserError(f"{file} holds no list of prompts; expected at least one text")
    return [_prompt(file, number, value) for number, value in enumerate(values, 1)]


def _prompt(file: Path, number: int, value: Any) -> str:
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(
            f"prompt {number} of {file} is {str(value)[:60]!r}; expected a text, or an object with "
            'a text under "prompt"'
        )
    check_is_text(text)
    return text
