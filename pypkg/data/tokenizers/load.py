"""Tokenizers from local files, of the kind that is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pypkg.data.tokenizers.base import Tokenizer
from pypkg.data.tokenizers.json import JsonTokenizer
from pypkg.data.tokenizers.sentencepiece import ChatGLMTokenizer, SentencePieceTokenizer
from pypkg.data.tokenizers.tiktoken import TiktokenTokenizer
from pypkg.errors import UserError

TOKENIZER_FILE = "tokenizer.json"

# Name in a Hugging Face folder and what reads it; the first that is there is taken.
_KINDS: tuple[tuple[str, Callable[[Path], Tokenizer]], ...] = (
    (TOKENIZER_FILE, JsonTokenizer),
    ("ice_text.model", ChatGLMTokenizer),
    ("tokenizer.model", SentencePieceTokenizer),
    ("spiece.model", SentencePieceTokenizer),
    ("qwen.tiktoken", TiktokenTokenizer),
)
_SUFFIXES = {".model": SentencePieceTokenizer, ".tiktoken": TiktokenTokenizer}


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer in a folder, or a tokenizer file of any name.

    A folder is looked through for ``tokenizer.json``, a SentencePiece model (``ice_text.model``,
    ``tokenizer.model``, ``spiece.model``) and ``qwen.tiktoken``, in this order. Which tokens begin
    and end a document is read from ``tokenizer_config.json`` or ``special_tokens_map.json`` beside
    the file, or is what the kind of file says.

    Raises:
        UserError: a file is missing or cannot be read, or the optional package that reads it is
            not installed; it is named.
    """
    path = Path(folder_or_file)
    file = find_tokenizer(path)
    if file is None:
        hint = ""
        if (path / "vocab.json").is_file():
            hint = (
                " There are vocab.json and merges.txt; transformers converts them: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(
            f"no tokenizer in {path}: expected one of {', '.join(name for name, _ in _KINDS)}; "
            f"give a folder that holds one, or such a file.{hint}"
        )
    kind = dict(_KINDS).get(file.name) or _SUFFIXES.get(file.suffix, JsonTokenizer)
    return kind(file)


def find_tokenizer(folder_or_file: str | os.PathLike[str]) -> Path | None:
    """The file that :func:`load_tokenizer` would read; None where there is none."""
    path = Path(folder_or_file)
    if path.is_file():
        return path
    return next((path / name for name, _ in _KINDS if (path / name).is_file()), None)


def tokenizer_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files that make up the tokenizer of a folder, to be copied with a model."""
    names = [name for name, _ in _KINDS]
    found = {*Path(folder).glob("*token*"), *(Path(folder) / name for name in names)}
    return sorted(file for file in found if file.is_file())
