"""``tokenizer.json``, read by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pypkg.data.tokenizers.base import Tokenizer, library_errors, read_special_names


class BackendTokenizer(Tokenizer):
    """A tokenizer of the library, wherever it comes from."""

    def __init__(self, file: Path, backend: tokenizers.Tokenizer) -> None:
        self.file = file
        self.sources = (file,)
        self._backend = backend
        self.vocab_size = 1 + max(self.vocabulary().values())

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


class JsonTokenizer(BackendTokenizer):
    """A ``tokenizer.json`` of any model that the library knows."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the file cannot be read, or lacks a token that the files beside it name.
        """
        with library_errors(f"{file} is not a tokenizer that the tokenizers library can read"):
            backend = tokenizers.Tokenizer.from_file(str(file))
        # A file can ask for both, which would cut off documents or lengthen them.
        backend.no_truncation()
        backend.no_padding()
        super().__init__(file, backend)
        names = read_special_names(file.parent)
        self.bos_id = self._named_id(names, "bos_token")
        self.eos_id = self._named_id(names, "eos_token")
