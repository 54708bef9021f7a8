"""``tekken.json`` of Mistral."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pypkg.data.tokenizers.base import read_json
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
            ranks = _ranks(contents["vocab"][: size - num_special])
            special = {
                token["token_str"]: token["rank"] for token in contents.get("special_tokens") or ()
            }
            words = config["pattern"]
            special = special or {token: i for i, token in enumerate(_FIRST_SPECIAL)}
        except (KeyError, TypeError, ValueError) as error:
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
