"""A tokenizer without files."""

from __future__ import annotations

from pathlib import Path

from pypkg.data.tokenizers.base import Tokenizer


class Bytes(Tokenizer):
    """A token for each byte of UTF-8; 256 ends a document, and is special."""

    def __init__(self, bos_id: int | None = None) -> None:
        self.file = Path("bytes.json")
        self.vocab_size, self.bos_id, self.eos_id = 257, bos_id, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        return bytes(each for each in ids if each < 256).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return None
