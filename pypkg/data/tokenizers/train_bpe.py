"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pypkg.data.tokenizers.base import CONFIG_FILE, read_tokenizer_config
from pypkg.data.tokenizers.load import TOKENIZER_FILE
from pypkg.errors import UserError
from pypkg.files import write_file

logger = logging.getLogger("pypkg")

_UNKNOWN, _BEGIN, _END = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_MARK = "pypkg_training"  # in tokenizer_config.json: which training made the tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, fingerprint: str) -> int:
    """Trains a byte-level BPE tokenizer and writes it as a Hugging Face folder.

    The same texts give the same tokenizer, byte for byte.

    Args:
        vocab_size: number of ids; 3 are special tokens and 256 are bytes.
        fingerprint: digest of the texts and settings; :func:`is_trained` compares it.

    Returns:
        The number of ids, which is below ``vocab_size`` if the text is short; a warning says so.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            "the text gives a tokenizer of %s entries, fewer than the %s asked for",
            backend.get_vocab_size(),
            vocab_size,
        )
    contents = backend.to_str(pretty=True).encode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _UNKNOWN,
        "bos_token": _BEGIN,
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        _MARK: {"fingerprint": fingerprint, "sha256": hashlib.sha256(contents).hexdigest()},
    }
    # The mark first: a folder that holds a tokenizer without it belongs to someone else.
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2).encode() + b"\n")
    write_file(folder / TOKENIZER_FILE, contents)
    entries: int = backend.get_vocab_size()
    return entries


def is_trained(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds the tokenizer that was trained with this fingerprint.

    Raises:
        UserError: it holds a tokenizer that was not trained here.
    """
    file = folder / TOKENIZER_FILE
    if not file.exists():
        return False
    mark = read_tokenizer_config(folder).get(_MARK)
    if not isinstance(mark, dict):
        raise UserError(
            f"{file} exists and was not made by --train_tokenizer, which would overwrite it; "
            "leave out --train_tokenizer to use it, or name another folder"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return mark.get("fingerprint") == fingerprint and mark.get("sha256") == digest
