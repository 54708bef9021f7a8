"""SentencePiece models: ``tokenizer.model``, and ``ice_text.model`` of ChatGLM-6B."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pypkg.data.tokenizers.base import (
    Tokenizer,
    missing_package,
    num_threads,
    read_added_tokens,
    read_special_names,
    read_tokenizer_config,
)
from pypkg.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model and the tokens that were added beside it.

    Added tokens have ids and count in ``vocab_size``. Text is never encoded to them, even where it
    spells one.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the package sentencepiece is not installed, the file is not such a model, or
                a token that the files beside it name does not exist.
        """
        try:
            import sentencepiece
        except ImportError as error:
            raise missing_package(file, "sentencepiece") from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file} is not a SentencePiece model: {error}") from error
        self.file = file
        self.sources = (file,)
        self._added = read_added_tokens(file.parent)
        self.vocab_size = max([self._model.vocab_size(), *(i + 1 for i in self._added.values())])
        names = read_special_names(file.parent)
        self.bos_id = self._named_id(names, "bos_token", _present(self._model.bos_id()))
        self.eos_id = self._named_id(names, "eos_token", _present(self._model.eos_id()))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=num_threads())

    def decode(self, ids: Sequence[int]) -> str:
        # Control pieces have no text in the model; ids of added tokens are unknown to it.
        return self._model.decode([i for i in ids if 0 <= i < self._model.vocab_size()])

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None


class ChatGLMTokenizer(SentencePieceTokenizer):
    """``ice_text.model`` of ChatGLM-6B.

    It differs from a plain SentencePiece model (tokenization_chatglm.py of THUDM/chatglm-6b):

    - a line break is the piece ``<n>``, a tab ``<|tab|>``, and a run of 2 to 80 blanks
      ``<|blank_2|>`` to ``<|blank_80|>``;
    - ids are shifted by ``num_image_tokens`` of tokenizer_config.json: 20000 in the first release
      and if the key is missing, 0 in version 1.1;
    - documents begin with ``<sop>`` and end with ``<eop>``, unless tokenizer_config.json says
      otherwise. ``id_of`` knows ``[MASK]`` and ``[gMASK]``.
    """

    _LONGEST_BLANK = 80
    _SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

    def __init__(self, file: Path) -> None:
        config = read_tokenizer_config(file.parent)
        self._shift = config.get("num_image_tokens", 20000)
        if not isinstance(self._shift, int) or self._shift < 0:
            raise UserError(
                f"num_image_tokens in the tokenizer_config.json beside {file} is {self._shift!r}; "
                "expected a whole number from 0 on"
            )
        super().__init__(file)
        self.vocab_size = max(self.vocab_size, self._shift + self._model.vocab_size())
        names = {"bos_token": "<sop>", "eos_token": "<eop>", **read_special_names(file.parent)}
        self.bos_id = self._named_id(names, "bos_token")
        self.eos_id = self._named_id(names, "eos_token")
        self._hidden = {self.id_of(token) for token in self._SPECIAL_TOKENS}

    def encode(self, text: str) -> list[int]:
        return self._shifted(super().encode(self._with_whitespace_pieces(text)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        rows = super().encode_batch([self._with_whitespace_pieces(text) for text in texts])
        return [self._shifted(row) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode([i - self._shift for i in ids if i not in self._hidden])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_(\d+)\|>", lambda match: " " * int(match[1]), text)

    def id_of(self, token: str) -> int | None:
        number = super().id_of(token)
        return number if number is None or token in self._added else number + self._shift

    def _shifted(self, ids: list[int]) -> list[int]:
        return [i + self._shift for i in ids]

    def _with_whitespace_pieces(self, text: str) -> str:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        blanks = f" {{2,{self._LONGEST_BLANK}}}"
        return re.sub(blanks, lambda match: f"<|blank_{len(match[0])}|>", text)


def _present(number: int) -> int | None:
    """The id, or None for -1: SentencePiece returns -1 for a missing token."""
    return None if number < 0 else number
