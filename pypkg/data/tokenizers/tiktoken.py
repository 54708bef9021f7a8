"""tiktoken rank files: Qwen's ``qwen.tiktoken``."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from pypkg.data.tokenizers.base import Tokenizer, missing_package, num_threads
from pypkg.errors import UserError

# How Qwen cuts text into words, and its special tokens, whose ids follow the ranks
# (tokenization_qwen.py of Qwen/Qwen-7B).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"
_SPECIAL_TOKENS = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class TiktokenTokenizer(Tokenizer):
    """Qwen's tokenizer.

    As in the original, text is put into Unicode form NFC first, and a special token that stands
    in it becomes that token. ``eos_id`` is ``<|endoftext|>``; there is no ``bos_id``.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the package tiktoken is not installed, or the file is no rank file.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise missing_package(file, "tiktoken") from error
        ranks = _read_ranks(file)
        first = 1 + max(ranks.values())
        self._special = {token: first + i for i, token in enumerate(_SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            file.name, pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=self._special
        )
        self._ranks = ranks
        self._first_special = first
        self.file = file
        self.vocab_size = first + len(_SPECIAL_TOKENS)
        self.bos_id = None
        self.eos_id = self._special[_END]

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoding.encode_batch(
            [unicodedata.normalize("NFC", text) for text in texts],
            num_threads=num_threads(),
            allowed_special="all",
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i for i in ids if i < self._first_special])

    def id_of(self, token: str) -> int | None:
        return self._special.get(token, self._ranks.get(token.encode()))


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Rank by token, from lines of a token in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{file}: line {number} is not a tiktoken rank: found {line[:60]!r}, expected a "
                "token in base64 and its rank"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{file} has {len(ranks)} tokens and lacks {len(missing)} of the 256 single bytes; "
            "the file is not complete"
        )
    return ranks
