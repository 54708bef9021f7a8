"""The end-of-text token in config.json and generation_config.json of a converted model.

Without it, a program that loads the model generates up to its length limit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pypkg.data.tokenizers.load import find_tokenizer, load_tokenizer
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import config_key

logger = logging.getLogger("pypkg.conversion")

GENERATION_FILE = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_end(
    keys: Mapping[str, Any], config: ModelConfig, folders: Sequence[Path]
) -> tuple[dict[str, Any], ModelConfig]:
    """``keys`` of config.json and their ``config``, with the tokenizer's eos_token_id if missing.

    Args:
        folders: searched for a tokenizer; the first one found is used. A warning is logged if it
            cannot be read.
    """
    if config.eos_token_id is not None:
        return dict(keys), config
    try:
        found = next((folder for folder in folders if find_tokenizer(folder)), None)
        end = load_tokenizer(found).eos_id if found else None
    except UserError as error:
        logger.warning(
            "config.json has no eos_token_id, and the tokenizer cannot be read: %s", error
        )
        return dict(keys), config
    if end is None:
        return dict(keys), config
    return {**keys, config_key(config, "eos_token_id"): end}, config.replace(eos_token_id=end)


def write_generation_config(folder: Path, config: ModelConfig) -> None:
    """Writes the token ids of ``config`` as generation_config.json.

    An existing file is not changed. No file is written if ``config`` has no eos_token_id.
    """
    file = folder / GENERATION_FILE
    if config.eos_token_id is None or file.exists():
        return
    ids = {name: getattr(config, name) for name in _TOKEN_IDS}
    named = {name: value for name, value in ids.items() if value is not None}
    file.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
