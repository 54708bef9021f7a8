"""The interface of all tokenizers, and readers of the files that they share."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files import json_files

CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
MODEL_FILE = "config.json"
_ID = re.compile(r"[0-9]{1,10}")
MAX_VOCABULARY = 2**31  # ids are stored in 32 bits with a sign


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        file: the file with the vocabulary.
        sources: every file that the ids of a text depend on, ``file`` first.
        vocab_size: largest id that can occur, plus one; added tokens count.
        bos_id, eos_id: ids of the tokens that begin and end a document, or None.
    """

    file: Path
    sources: tuple[Path, ...]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without tokens for its beginning or end."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, encoded by several threads (``RAYON_NUM_THREADS``)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """Id of a token by its text, such as ``[gMASK]``; None if there is none."""

    def vocabulary(self) -> dict[str, int]:
        """Ids of all tokens by their text."""
        raise UserError(f"the vocabulary of {self.file} cannot be listed; a tokenizer.json's can")

    def _named_id(
        self, names: Mapping[str, str], name: str, default: int | None = None
    ) -> int | None:
        """Id of the token that the files beside the vocabulary name as ``name``."""
        if name not in names:
            return default
        try:
            number = self.id_of(names[name])
        except UnicodeEncodeError:  # JSON can spell lone surrogates, which no token has
            number = None
        if number is None:
            raise UserError(
                f"{self.file} has no token '{names[name]}', which the files beside it name as "
                f"{name}"
            )
        return number


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Raises every error of a tokenizer library as a UserError that begins with ``message``.

    A panic of a Rust library is not an ``Exception``, and its class is not importable.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{message}: {error}") from error


def num_threads() -> int:
    """Threads that encode a batch: ``RAYON_NUM_THREADS``, else every core this process may use."""
    return int(os.environ.get("RAYON_NUM_THREADS") or 0) or len(os.sched_getaffinity(0))


def missing_package(file: Path, package: str) -> UserError:
    """The error for a file that only an optional package reads."""
    return UserError(
        f"{file} is read by the package {package}, which is not installed; "
        'pip install ".[tokenizers-all]" brings it'
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The contents of ``tokenizer_config.json``; empty if the file is missing."""
    return read_json(folder / CONFIG_FILE)


def read_special_names(folder: Path) -> dict[str, str]:
    """The tokens that the files name as ``bos_token`` and ``eos_token``.

    ``tokenizer_config.json`` has priority over ``special_tokens_map.json``. Both hold the
    text of the token or, in long form, a dictionary with it.
    """
    names = {}
    for file in (_SPECIAL_TOKENS_FILE, CONFIG_FILE):
        contents = read_json(folder / file)
        for name in ("bos_token", "eos_token"):
            token = contents.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names[name] = token
    return names


def read_added_tokens(folder: Path) -> dict[str, int]:
    """Ids of the tokens that are not in the vocabulary file, by text.

    The files are ``added_tokens.json`` (text to id) or, from transformers 4.34 on, under
    ``added_tokens_decoder`` in ``tokenizer_config.json`` (id to token).

    Raises:
        UserError: a file cannot be read, an id is no whole number from 0 to 2^31 - 1, or a token
            is empty.
    """
    added = dict(read_json(folder / ADDED_TOKENS_FILE))
    decoder = read_tokenizer_config(folder).get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            added[token["content"]] = int(number) if _ID.fullmatch(number) else number
    by_id: dict[int, str] = {}
    for text, number in added.items():
        if type(number) is not int or not 0 <= number < MAX_VOCABULARY:
            raise UserError(
                f"{folder}: {ADDED_TOKENS_FILE} or added_tokens_decoder of {CONFIG_FILE} gives the "
                f"token {text[:40]!r} the id {str(number)[:40]!r}; expected a whole number from 0 "
                f"to {MAX_VOCABULARY - 1}"
            )
        if not text:  # it matches everywhere, so the libraries would never reach the end of a text
            raise UserError(
                f"{folder}: {ADDED_TOKENS_FILE} or added_tokens_decoder of {CONFIG_FILE} gives the "
                f"id {number} to an empty token; expected a token of one character or more"
            )
        other = by_id.setdefault(number, text)
        if other != text:
            raise UserError(
                f"{folder}: {ADDED_TOKENS_FILE} and added_tokens_decoder of {CONFIG_FILE} give the "
                f"id {number} to {other!r} and to {text!r}; expected an id of its own for each"
            )
    return added


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing.

    Raises:
        UserError: the file is not readable, not JSON, too deeply nested or not an object, names a
            key twice, or is a link that leads nowhere.
    """
    return json_files.read_json(file) if os.path.lexists(file) else {}
