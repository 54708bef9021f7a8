"""``vocab.json`` and ``merges.txt``: byte-level BPE of GPT-2 and Qwen2, without tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from pypkg.data.tokenizers.base import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    library_errors,
    read_added_tokens,
    read_json,
    read_special_names,
    read_tokenizer_config,
)
from pypkg.data.tokenizers.json import BackendTokenizer
from pypkg.data.tokenizers.tiktoken import QWEN_WORDS
from pypkg.errors import UserError

MERGES_FILE = "merges.txt"
_END = "<|endoftext|>"  # ends a document, unless the files beside name another token

# The files do not say how text is cut into words; the tokenizer's class or the model does.
_GPT2, _QWEN2 = "GPT-2", "Qwen2"
_CLASSES = {"GPT2Tokenizer": _GPT2, "GPTTokenizer": _GPT2, "Qwen2Tokenizer": _QWEN2}
_MODEL_TYPES = {
    **dict.fromkeys(("gpt2", "gpt", "opt"), _GPT2),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _QWEN2),
}


class ByteLevelTokenizer(BackendTokenizer):
    """``vocab.json`` with the ``merges.txt`` beside it.

    ``tokenizer_class`` of tokenizer_config.json, else ``model_type`` of config.json, decides how
    text is split into words. Qwen2 normalizes text to Unicode form NFC first. The text of a
    special token is encoded as that token.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: a file is missing or cannot be read, the kind is not known, or a token that
                the files name does not exist.
        """
        folder = file.parent
        config = read_tokenizer_config(folder)
        kind = _kind(file, config)
        names = read_special_names(folder)
        added = read_added_tokens(folder)
        vocabulary, merges = _read_files(file)
        vocabulary |= added
        if kind == _QWEN2:
            vocabulary.setdefault(_END, 1 + max(vocabulary.values(), default=-1))
        _check_vocabulary(file, vocabulary)
        with library_errors(f"{file} and {MERGES_FILE} beside it do not belong together"):
            backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        _set_words(backend, kind, config)
        special = [token for token in (*added, *names.values(), _END) if token in vocabulary]
        backend.add_tokens(_added_tokens(special, config))
        super().__init__(file, backend)
        beside = (folder / name for name in (CONFIG_FILE, ADDED_TOKENS_FILE, MODEL_FILE))
        self.sources = (file, folder / MERGES_FILE, *(path for path in beside if path.is_file()))
        end = self.id_of(_END)
        self.bos_id = self._named_id(names, "bos_token", end if kind == _GPT2 else None)
        self.eos_id = self._named_id(names, "eos_token", end)


def _kind(file: Path, config: dict[str, Any]) -> str:
    name = config.get("tokenizer_class")
    if isinstance(name, str) and name.removesuffix("Fast") in _CLASSES:
        return _CLASSES[name.removesuffix("Fast")]
    model_type = read_json(file.parent / MODEL_FILE).get("model_type")
    if isinstance(model_type, str) and name is None and model_type in _MODEL_TYPES:
        return _MODEL_TYPES[model_type]
    raise UserError(
        f"{file}: how its text is cut into words is not known: tokenizer_class in {CONFIG_FILE} is "
        f"{name!r}, model_type in {MODEL_FILE} is {model_type!r}; expected one of "
        f"{', '.join(_CLASSES)}. Give a tokenizer.json, or write the tokenizer_class"
    )


def _read_files(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges = file.parent / MERGES_FILE
    for part in (file, merges):
        if not part.is_file():
            raise UserError(
                f"{part} is missing; vocab.json and merges.txt make a tokenizer together"
            )
    with library_errors(f"{file} and {merges} cannot be read"):
        return models.BPE.read_file(str(file), str(merges))


def _check_vocabulary(file: Path, vocabulary: dict[str, int]) -> None:
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocabulary]
    if missing:
        raise UserError(
            f"{file} lacks {len(missing)} of the 256 letters that stand for bytes; it is not "
            "complete, or not a byte-level vocabulary"
        )
    by_id: dict[int, str] = {}
    for token, number in vocabulary.items():
        other = by_id.setdefault(number, token)
        if other != token:
            raise UserError(
                f"{file} and the added tokens beside it give the id {number} to {other!r} and to "
                f"{token!r}"
            )


def _set_words(backend: tokenizers.Tokenizer, kind: str, config: dict[str, Any]) -> None:
    backend.decoder = decoders.ByteLevel()
    if kind == _QWEN2:
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_WORDS), "isolated")
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, levels])
    else:
        prefix = config.get("add_prefix_space") is True
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)


def _added_tokens(special: list[str], config: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """The tokens that are matched before the split, as tokenizer_config.json describes them."""
    decoder = config.get("added_tokens_decoder")
    listed = decoder.values() if isinstance(decoder, dict) else ()
    described = {token.get("content"): token for token in listed if isinstance(token, dict)}
    found = []
    for content in dict.fromkeys(special):
        values = described.get(content, {})
        flags = {
            name: values.get(name) is True
            for name in ("single_word", "lstrip", "rstrip", "normalized")
        }
        is_special = values.get("special") is not False
        found.append(tokenizers.AddedToken(content, special=is_special, **flags))
    return found
