"""tiktoken rank files: ``qwen.tiktoken``, and ``tokenizer.model`` of Llama 3 and GLM-4."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pypkg.data.tokenizers.base import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    Tokenizer,
    library_errors,
    missing_package,
    num_threads,
    read_added_tokens,
    read_json,
    read_special_names,
    read_tokenizer_config,
)
from pypkg.errors import UserError

# How text is cut into words. Qwen's pattern (tokenization_qwen.py of Qwen/Qwen-7B) has digits
# alone; that of Llama 3 (llama/tokenizer.py of meta-llama/llama3) and GLM-4
# (tokenization_chatglm.py of THUDM/glm-4-9b-chat) has up to three.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = _WORDS.format(digits=r"\p{N}")
_LLAMA3_WORDS = _WORDS.format(digits=r"\p{N}{1,3}")

# Special tokens, whose ids follow the ranks, of the same sources.
_TEXT_END = "<|endoftext|>"
_QWEN_SPECIAL = (_TEXT_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_GLM4_SPECIAL = (
    *(_TEXT_END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
_LLAMA3_BEGIN, _LLAMA3_END = "<|begin_of_text|>", "<|end_of_text|>"
_LLAMA3_SPECIAL = (
    *(_LLAMA3_BEGIN, _LLAMA3_END),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)

# A rank file does not say how text is cut into words, but its length says whose it is. Files that
# other patterns belong to, by their number of ranks.
_OTHER_PATTERNS = {
    50_256: "r50k_base of OpenAI",
    50_280: "p50k_base of OpenAI",
    100_256: "cl100k_base of OpenAI",
    199_998: "o200k_base of OpenAI",
    200_000: "Llama 4",
}

# Meta's code for Llama 3 encodes a text in pieces: of at most 400,000 characters, and of at most
# 25,000 characters in a row that are all blank or all not.
_LONGEST_PIECE = 400_000
_LONGEST_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")
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
        in_pieces: whether a long text is encoded in pieces, as Meta's code for Llama 3 does.

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
        in_pieces: bool = False,
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
        self._in_pieces = in_pieces
        self._text_ids = range(shift, shift + 1 + max(ranks.values()))
        self.vocab_size = 1 + max(self._text_ids[-1], *special.values())

    def encode(self, text: str) -> list[int]:
        with library_errors(f"{self.file} cannot encode a text"):
            rows = [
                self._encoding.encode(piece, allowed_special="all", disallowed_special=())
                for piece in self._pieces(text)
            ]
        return self._joined(rows)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [self._pieces(text) for text in texts]
        with library_errors(f"{self.file} cannot encode a text"):
            rows = iter(
                self._encoding.encode_batch(
                    [piece for of_text in pieces for piece in of_text],
                    num_threads=num_threads(),
                    allowed_special="all",
                    disallowed_special=(),
                )
            )
        return [self._joined([next(rows) for _ in of_text]) for of_text in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([i - self._shift for i in ids if i in self._text_ids])

    def id_of(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        rank = self._ranks.get(token.encode())
        return None if rank is None else rank + self._shift

    def _pieces(self, text: str) -> list[str]:
        """``text`` as it is handed to tiktoken."""
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        return _cut(text) if self._in_pieces else [text]

    def _joined(self, rows: list[list[int]]) -> list[int]:
        row = rows[0] if len(rows) == 1 else [i for part in rows for i in part]
        return [i + self._shift for i in row] if self._shift else row


def _cut(text: str) -> list[str]:
    """The pieces in which Meta's code for Llama 3 encodes ``text``."""
    if len(text) <= _LONGEST_RUN:
        return [text]
    pieces = []
    for first in range(0, len(text), _LONGEST_PIECE):
        part = text[first : first + _LONGEST_PIECE]
        begin = 0
        for run in _RUNS.finditer(part):
            for end in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                pieces.append(part[begin:end])
                begin = end
        pieces.append(part[begin:])
    return pieces


@dataclass(frozen=True)
class _Kind:
    """The properties of a tokenizer that its rank file does not hold."""

    words: str
    special: tuple[str, ...]
    end: str
    begin: str | None = None
    nfc: bool = False
    in_pieces: bool = False


_QWEN = _Kind(QWEN_WORDS, _QWEN_SPECIAL, end=_TEXT_END, nfc=True)
_GLM4 = _Kind(_LLAMA3_WORDS, _GLM4_SPECIAL, end=_TEXT_END)
_META = _Kind(_LLAMA3_WORDS, _LLAMA3_SPECIAL, _LLAMA3_END, _LLAMA3_BEGIN, in_pieces=True)
_PADDLENLP = _Kind(_LLAMA3_WORDS, _LLAMA3_SPECIAL, _LLAMA3_END, _LLAMA3_BEGIN, nfc=True)


class TiktokenTokenizer(RankTokenizer):
    """A rank file of Qwen (``.tiktoken``), or of Llama 3 or GLM-4 (any other name).

    It is GLM-4's if ``tokenizer_class`` of ``tokenizer_config.json`` is ``ChatGLM4Tokenizer`` or
    ``model_type`` of ``config.json`` is ``chatglm``. The special tokens of the three are fixed.
    Those that ``tokenizer_config.json`` or ``added_tokens.json`` list are added; if they begin
    right after the ranks and name no ``<|begin_of_text|>``, they are all. ``bos_id`` and ``eos_id``
    are those that the files name, else ``<|endoftext|>`` ends a document of Qwen and GLM-4, and
    ``<|begin_of_text|>`` and ``<|end_of_text|>`` enclose one of Llama 3.

    Text is put into Unicode form NFC for Qwen, and for Llama 3 where PaddleNLP saved the
    tokenizer, whose class ``Llama3Tokenizer`` does so; Meta's and GLM-4's do not. Meta's code
    encodes a long text in pieces.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the package tiktoken is not installed, the file is not a rank file of
                these models, or a token that the files beside it name does not exist.
        """
        ranks = read_ranks(file)
        if len(ranks) in _OTHER_PATTERNS:
            raise UserError(
                f"{file} has the {len(ranks)} ranks of {_OTHER_PATTERNS[len(ranks)]}, whose way of "
                "cutting text into words is not known here; expected a file of Qwen, Llama 3 or "
                "GLM-4. Use the tokenizer.json of that tokenizer"
            )
        kind = _kind(file)
        first = 1 + max(ranks.values())
        listed = {token: i for token, i in read_added_tokens(file.parent).items() if i >= first}
        by_id: dict[int, str] = {}
        if kind in (_QWEN, _GLM4) or first not in listed.values() or _LLAMA3_BEGIN in listed:
            by_id = dict(enumerate(kind.special, start=first))
        by_id |= {i: token for token, i in listed.items()}
        special = {token: i for i, token in by_id.items()}
        super().__init__(file, ranks, kind.words, special, nfc=kind.nfc, in_pieces=kind.in_pieces)
        files = [CONFIG_FILE, ADDED_TOKENS_FILE, *([MODEL_FILE] if kind is _GLM4 else [])]
        beside = (file.parent / name for name in files)
        self.sources = (file, *(path for path in beside if path.is_file()))
        names = read_special_names(file.parent)
        self.bos_id = self._named_id(names, "bos_token", special.get(kind.begin or ""))
        self.eos_id = self._named_id(names, "eos_token", special.get(kind.end))


def _kind(file: Path) -> _Kind:
    tokenizer_class = read_tokenizer_config(file.parent).get("tokenizer_class")
    model_type = read_json(file.parent / MODEL_FILE).get("model_type")
    if file.suffix == ".tiktoken":
        return _QWEN
    if tokenizer_class == "ChatGLM4Tokenizer" or model_type == "chatglm":
        return _GLM4
    return _PADDLENLP if tokenizer_class == "Llama3Tokenizer" else _META


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
            code, rank = line.split()
            token = base64.b64decode(code, validate=True)
            if token in ranks:
                raise ValueError("the token occurs twice")
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{file}: line {number} is not a tiktoken rank: found {line[:60]!r}, expected a "
                "token in base64 that no line before has, and its rank"
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
