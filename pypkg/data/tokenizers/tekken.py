"""``tekken.json`` of Mistral."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pypkg.data.tokenizers.base import MAX_VOCABULARY, read_json
from pypkg.data.tokenizers.tiktoken import RankTokenizer, check_ranks
from pypkg.errors import UserError

_FIRST_SPECIAL = ("<unk>", "<s>", "</s>")  # where the file does not list them (version 3)


class TekkenTokenizer(RankTokenizer):
    """Mistral's tokenizer since Nemo (mistral_common/tokens/tokenizers/tekken.py).

    The special tokens come first and shift the ids of all others by their number. Of the
    vocabulary as many entries are used as ``default_vocab_size`` leaves room for. Text is never
    encoded to a special token. ``id_of`` knows the special tokens that the file lists.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
            UserError: the package tiktoken is not installed, or the file is not a ``tekken.json``.
        """
        contents = read_json(file)
        try:
            config = contents["config"]
            num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
            if type(num_special) is not int or not 0 <= num_special <= size < MAX_VOCABULARY:
                raise ValueError(f"sizes {num_special} and {size}")
            ranks = _ranks(contents["vocab"][: size - num_special])
            special = {
                token["token_str"]: token["rank"] for token in contents.get("special_tokens") or ()
            }
            words = config["pattern"]
            special = special or {token: i for i, token in enumerate(_FIRST_SPECIAL)}
            if not all(type(i) is int and 0 <= i < num_special for i in special.values()):
                raise ValueError(f"special tokens whose ranks are not from 0 to {num_special - 1}")
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is not a tekken.json of Mistral: {type(error).__name__} {error}; expected "
                "'config' with pattern, default_vocab_size and default_num_special_tokens, and "
                "'vocab' with rank and token_bytes"
            ) from error
        check_ranks(file, ranks)
        super().__init__(file, ranks, words, special, special_in_text=False, shift=num_special)
        self.vocab_size = max(self.vocab_size, size)
        self.bos_id, self.eos_id = special.get("<s>"), special.get("</s>")


def _ranks(vocabulary: list[dict[str, Any]]) -> dict[bytes, int]:
    return {base64.b64decode(token["token_bytes"]): int(token["rank"]) for token in vocabulary}
