"""tiktoken rank files: ``qwen.tiktoken``, and ``tokenizer.model`` of Llama 3 and GLM-4."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from pypkg.data.tokenizers.base import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    Tokenizer,
    library_errors,
    missing_package,
    num_threads,
    read_added_tokens,
    read_special_names,
    read_tokenizer_config,
)
from pypkg.errors import UserError

# How text is cut into words. Qwen's pattern (tokenization_qwen.py of Qwen/Qwen-7B) has digits
# alone; that of Llama 3 (llama/tokenizer.py of meta-llama/llama3) and GLM-4 has up to three.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = _WORDS.format(digits=r"\p{N}")
_LLAMA3_WORDS = _WORDS.format(digits=r"\p{N}{1,3}")

# Special tokens, whose ids follow the ranks, of the same two sources.
_QWEN_END = "<|endoftext|>"
_QWEN_SPECIAL = (_QWEN_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_LLAMA3_BEGIN, _LLAMA3_END = "<|begin_of_text|>", "<|end_of_text|>"
_LLAMA3_SPECIAL = (
    *(_LLAMA3_BEGIN, _LLAMA3_END),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class RankTokenizer(Tokenizer):
    """Byte-pair encoding by rank, with the library tiktoken.

    Args:
        file: source of the ranks.
        ranks: rank by token.
        words: regular expression that splits text into words.
        special: ids of the special tokens by name.
        special_in_text: whether the text of a special token is encoded as that token.
        shift: id of rank 0.
        nfc: whether text is normalized to Unicode form NFC first.

    Raises:
        UserError: the package tiktoken is not installed, or it rejects the ranks.
    """

    def __init__(
        self,
        file: Path,
        ranks: Mapping[bytes, int],
        words: str,
        special: Mapping[str, int],
        *,
        special_in_text: bool = True,
        shift: int = 0,
        nfc: bool = False,
    ) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise missing_package(file, "tiktoken") from error
        with library_errors(f"{file} is not a tokenizer that tiktoken can use"):
            self._encoding = tiktoken.Encoding(
                file.name,
                pat_str=words,
                mergeable_ranks=dict(ranks),
                special_tokens=dict(special) if special_in_text else {},
            )
        self.file = file
        self.sources = (file,)
        self._ranks = ranks
        self._special = special
        self._shift = shift
        self._nfc = nfc
        self._text_ids = range(shift, shift + 1 + max(ranks.values()))
        self.vocab_size = 1 + max(self._text_ids[-1], *special.values())

    def encode(self, text: str) -> list[int]:
        with library_errors(f"{self.file} cannot encode a text"):
            row = self._encoding.encode(
                self._normalized(text), allowed_special="all", disallowed_special=()
            )
        return self._shifted(row)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with library_errors(f"{self.file} cannot encode a text"):
            rows = self._encoding.encode_batch(
                [self._normalized(text) for text in texts],
                num_threads=num_threads(),
                allowed_special="all",
                disallowed_special=(),
            )
        return [self._shifted(row) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i - self._shift for i in ids if i in self._text_ids])

    def id_of(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        rank = self._ranks.get(token.encode())
        return None if rank is None else rank + self._shift

    def _normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _shifted(self, row: list[int]) -> list[int]:
        return [i + self._shift for i in row] if self._shift else row


class TiktokenTokenizer(RankTokenizer):
    """A rank file of Qwen (``.tiktoken``), or of Llama 3 and GLM-4 (any other name).

    The special tokens of Qwen and Llama 3 are fixed. Those that ``tokenizer_config.json`` or
    ``added_tokens.json`` list are added; if they begin right after the ranks, as GLM-4's do, they
    are all. ``bos_id`` and ``eos_id`` are those that the files name, else ``<|endoftext|>`` ends a
    document of Qwen, and ``<|begin_of_text|>`` and ``<|end_of_text|>`` enclose one of Llama 3.

    Text is put into Unicode form NFC for Qwen, and for Llama 3 where PaddleNLP saved the
    tokenizer, whose class ``Llama3Tokenizer`` does so; Meta's and GLM-4's do not.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the package tiktoken is not installed, the file is not a rank file, or a
                token that the files beside it name does not exist.
        """
        ranks = read_ranks(file)
        first = 1 + max(ranks.values())
        is_qwen = file.suffix == ".tiktoken"
        listed = {token: i for token, i in read_added_tokens(file.parent).items() if i >= first}
        by_id: dict[int, str] = {}
        if is_qwen or first not in listed.values() or _LLAMA3_BEGIN in listed:
            by_id = dict(enumerate(_QWEN_SPECIAL if is_qwen else _LLAMA3_SPECIAL, start=first))
        by_id |= {i: token for token, i in listed.items()}
        special = {token: i for i, token in by_id.items()}
        tokenizer_class = read_tokenizer_config(file.parent).get("tokenizer_class")
        super().__init__(
            file,
            ranks,
            QWEN_WORDS if is_qwen else _LLAMA3_WORDS,
            special,
            nfc=is_qwen or tokenizer_class == "Llama3Tokenizer",
        )
        beside = (file.parent / name for name in (CONFIG_FILE, ADDED_TOKENS_FILE))
        self.sources = (file, *(path for path in beside if path.is_file()))
        names = read_special_names(file.parent)
        end = special.get(_QWEN_END if is_qwen else _LLAMA3_END)
        self.bos_id = self._named_id(names, "bos_token", special.get(_LLAMA3_BEGIN))
        self.eos_id = self._named_id(names, "eos_token", end)


def is_rank_file(file: Path) -> bool:
    """Whether the file begins with a token in base64 and its rank."""
    try:
        with file.open("rb") as opened:
            return _RANK_LINE.match(opened.read(4096)) is not None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from error


def read_ranks(file: Path) -> dict[bytes, int]:
    """Rank by token, from lines of a token in base64 and its rank.

    Raises:
        UserError: the file cannot be read, a line is not a rank, two tokens have the same one, or
            one of the 256 bytes is missing.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
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
    check_ranks(file, ranks)
    return ranks


def check_ranks(file: Path, ranks: Mapping[bytes, int]) -> None:
    """
    Raises:
        UserError: one of the 256 single bytes has no rank, or two tokens have the same one.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{file} has {len(ranks)} tokens and lacks {len(missing)} of the 256 single bytes; "
            "the file is not complete"
        )
    twice = len(ranks) - len(set(ranks.values()))
    if twice:
        raise UserError(f"{file} gives {twice} of its {len(ranks)} tokens the rank of another one")
