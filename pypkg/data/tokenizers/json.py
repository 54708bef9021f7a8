"""``tokenizer.json``, read by the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pypkg.data.tokenizers.base import Tokenizer, library_errors, read_special_names
from pypkg.errors import UserError

_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_INSIDE_LETTER = {bytes([byte]) for byte in range(0x80, 0xC0)}  # of UTF-8, after its first byte


class BackendTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library."""

    def __init__(self, file: Path, backend: tokenizers.Tokenizer) -> None:
        self.file = file
        self.sources = (file,)
        self._backend = backend
        vocabulary = self.vocabulary()
        if not vocabulary:
            raise UserError(f"{file} holds a tokenizer without any token; the file is not complete")
        self.vocab_size = 1 + max(vocabulary.values())

    def encode(self, text: str) -> list[int]:
        with library_errors(f"{self.file} cannot encode a text"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self.file} cannot encode a text"):
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)


def _check_prefix(content: bytes) -> None:
    """Rejects merges that abort the library (0.23): the prefix splits a character of the merge.

    Raises:
        ValueError: there is one.
    """
    if not _PREFIX.search(content):  # nearly always, and known without parsing the file
        return
    model = json.loads(content)["model"]
    size = len(model["continuing_subword_prefix"].encode())
    for merge in model.get("merges") or ():
        right = (merge.split(" ") if isinstance(merge, str) else merge)[-1].encode()
        if len(right) < size or right[size : size + 1] in _INSIDE_LETTER:
            raise ValueError(
                f"the merge {merge!r} does not have the continuing_subword_prefix "
                f"{model['continuing_subword_prefix']!r}"
            )


class JsonTokenizer(BackendTokenizer):
    """A ``tokenizer.json`` of any model that the library knows."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the file cannot be read, or lacks a token that the files beside it name.
        """
        with library_errors(f"{file} is not a tokenizer that the tokenizers library can read"):
            _check_prefix(file.read_bytes())
            backend = tokenizers.Tokenizer.from_file(str(file))
        # A file can ask for both, which would cut off documents or lengthen them.
        backend.no_truncation()
        backend.no_padding()
        super().__init__(file, backend)
        names = read_special_names(file.parent)
        self.bos_id = self._named_id(names, "bos_token")
        self.eos_id = self._named_id(names, "eos_token")
