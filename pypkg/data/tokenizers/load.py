"""Loads a tokenizer from local files; the kind of file decides the class."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from pypkg.data.tokenizers.base import MAX_VOCABULARY, Tokenizer
from pypkg.data.tokenizers.byte_level import MERGES_FILE, ByteLevelTokenizer
from pypkg.data.tokenizers.json import JsonTokenizer
from pypkg.data.tokenizers.sentencepiece import ChatGLMTokenizer, SentencePieceTokenizer
from pypkg.data.tokenizers.tekken import TekkenTokenizer
from pypkg.data.tokenizers.tiktoken import TiktokenTokenizer, is_rank_file
from pypkg.errors import UserError
from pypkg.files.links import files_named

logger = logging.getLogger("pypkg")

TOKENIZER_FILE = "tokenizer.json"
_VOCABULARY = "vocab.json"


def _read_model(file: Path) -> Tokenizer:
    """``tokenizer.model`` is a SentencePiece model or, of Llama 3 and GLM-4, a rank file."""
    return TiktokenTokenizer(file) if is_rank_file(file) else SentencePieceTokenizer(file)


# Name, or pattern of names, in a folder and what reads it; the first that is there is taken.
_KINDS: tuple[tuple[str, Callable[[Path], Tokenizer]], ...] = (
    (TOKENIZER_FILE, JsonTokenizer),
    ("ice_text.model", ChatGLMTokenizer),
    ("tokenizer.model", _read_model),
    ("sentencepiece.bpe.model", SentencePieceTokenizer),  # PaddleNLP's name for LLaMA
    ("spiece.model", SentencePieceTokenizer),
    ("tekken.json", TekkenTokenizer),
    ("tokenizer.model.v*", SentencePieceTokenizer),  # Mistral's, by version
    ("qwen.tiktoken", TiktokenTokenizer),
    (_VOCABULARY, ByteLevelTokenizer),
)
_SUFFIXES = {".model": _read_model, ".tiktoken": TiktokenTokenizer}


def load_tokenizer(folder_or_file: str | os.PathLike[str]) -> Tokenizer:
    """Reads the tokenizer in a folder, or a tokenizer file of any name.

    docs/data.md lists the kinds of files that are searched for in a folder, in order. If the folder
    holds several kinds, the log names the one that is read. ``tokenizer_config.json`` or
    ``special_tokens_map.json`` beside the file name the tokens that begin and end a document;
    without these, the kind of file determines them.

    Raises:
        UserError: a file is missing or cannot be read, or the optional package that reads it is
            not installed; it is named.
    """
    path = Path(folder_or_file)
    if os.path.isfile(path):  # False, not an error, for a name too long for a path
        return _read(path)
    found = _found(path)
    if not found:
        missing = "" if os.path.exists(path) else ", which is not there"
        raise UserError(
            f"no tokenizer in {path}{missing}: expected one of "
            f"{', '.join(name for name, _ in _KINDS)} (with {MERGES_FILE}); give a folder that "
            "holds one, or such a file. Tokenizers are not downloaded"
        )
    file, *others = found
    if others:
        names = ", ".join(other.name for other in others)
        logger.info("tokenizer: %s is read; %s beside it: not read", file, names)
    return _read(file)


def find_tokenizer(folder_or_file: str | os.PathLike[str]) -> Path | None:
    """The file that :func:`load_tokenizer` would read; None if there is none."""
    path = Path(folder_or_file)
    if os.path.isfile(path):
        return path
    return next(iter(_found(path)), None)


def _found(folder: Path) -> list[Path]:
    """The vocabulary files of ``folder``, one of each kind, in order of priority."""
    found = []
    for pattern, _ in _KINDS:
        files = files_named(folder, [pattern])
        if pattern == _VOCABULARY and not files_named(folder, [MERGES_FILE]):
            continue  # another kind of vocabulary
        if files:
            found.append(max(files, key=_version))
    return found


def _version(file: Path) -> list[int]:
    """The numbers in a name such as ``tokenizer.model.v3``."""
    return [int(number) for number in re.findall(r"\d+", file.name)]


def _read(file: Path) -> Tokenizer:
    """Reads the file.

    Raises:
        UserError: as ``load_tokenizer``, or an id is negative or does not fit into the 32 bits of
            a corpus.
    """
    tokenizer = _reader(file)(file)
    if tokenizer.vocab_size > MAX_VOCABULARY:
        raise UserError(
            f"the largest token id of {file} is {tokenizer.vocab_size - 1}; expected at most "
            f"{MAX_VOCABULARY - 1}. The file is damaged"
        )
    return tokenizer


def _reader(file: Path) -> Callable[[Path], Tokenizer]:
    for pattern, reader in _KINDS:
        if file.match(pattern):
            return reader
    return _SUFFIXES.get(file.suffix, JsonTokenizer)


def tokenizer_files(folder_or_file: str | os.PathLike[str]) -> list[Path]:
    """The files of the tokenizer in a folder, which are copied with a model; or the file itself."""
    folder = Path(folder_or_file)
    if os.path.isfile(folder):
        return [folder]
    return files_named(folder, ("*token*", MERGES_FILE, *(name for name, _ in _KINDS)))
