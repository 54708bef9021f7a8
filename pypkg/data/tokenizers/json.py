"""``tokenizer.json``, read by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from pypkg.data.tokenizers.base import Tokenizer, read_special_names
from pypkg.errors import UserError


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of any model that the library knows."""

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the file cannot be read, or lacks a token that the files beside it name.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"{file} is not a tokenizer that the tokenizers library can read: {error}"
            ) from error
        # A file can ask for both, which would cut off documents or lengthen them.
        backend.no_truncation()
        backend.no_padding()
        self.file = file
        self._backend = backend
        self.vocab_size = 1 + max(self.vocabulary().values())
        names = read_special_names(file.parent)
        self.bos_id = self._named_id(names, "bos_token")
        self.eos_id = self._named_id(names, "eos_token")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)
