"""Tokenizers from Hugging Face folders, by the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from pypkg.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        file: the ``tokenizer.json``.
        vocab_size: largest id that can occur, plus one; added tokens count.
        bos_id, eos_id: ids of the tokens that begin and end a document, or None.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, file: Path, bos: str | None, eos: str | None
    ) -> None:
        # A file can ask for both, which would cut off documents or lengthen them.
        backend.no_truncation()
        backend.no_padding()
        self.file = file
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._id_of(bos, "bos_token")
        self.eos_id = self._id_of(eos, "eos_token")

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; none is added at its beginning or end."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, made by several threads (``RAYON_NUM_THREADS``)."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def _id_of(self, token: str | None, name: str) -> int | None:
        if token is None:
            return None
        number = self._backend.token_to_id(token)
        if number is None:
            raise UserError(
                f"{self.file} has no token '{token}', which the files beside it name as {name}"
            )
        return number


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads a folder with ``tokenizer.json``, or such a file.

    Which tokens begin and end a document is read from ``tokenizer_config.json`` or
    ``special_tokens_map.json`` beside it.

    Raises:
        UserError: a file is missing or cannot be read; it is named.
    """
    path = Path(folder_or_file)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        hint = ""
        if (file.parent / "tokenizer.model").is_file():
            hint = (
                " There is a SentencePiece model; transformers converts it: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(
            f"no tokenizer in {path}: {file} does not exist; give a folder with {TOKENIZER_FILE} "
            f"or the file.{hint}"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{file} is not a tokenizer that the tokenizers library can read: {error}"
        ) from error
    names = _read_names(file.parent / _SPECIAL_TOKENS_FILE)
    names.update(_read_names(file.parent / CONFIG_FILE))
    return Tokenizer(backend, file, names.get("bos_token"), names.get("eos_token"))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The contents of ``tokenizer_config.json``; nothing where there is none."""
    return _read_json(folder / CONFIG_FILE)


def _read_names(file: Path) -> dict[str, str]:
    """Token by name; the file has the token's text or, in long form, a dictionary with it."""
    names = {}
    for name in ("bos_token", "eos_token"):
        token = _read_json(file).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            names[name] = token
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file}: found a JSON {type(contents).__name__}, expected an object")
    return contents
