"""The sources of a run: configuration and weights of the model, and tokenizer."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pypkg.config import Settings
from pypkg.data.tokenizers.load import Tokenizer, find_tokenizer, load_tokenizer
from pypkg.errors import UserError
from pypkg.models import ModelConfig
from pypkg.models.architecture.registry import load_config
from pypkg.models.building import Model, build_filled, build_without_memory
from pypkg.models.pretrained import random_weights, stored_config, stored_weights
from pypkg.models.weights.hub import find_weights
from pypkg.parallel.comm.slices import ReadParameter
from pypkg.training.start.start_up import folder_with_weights

logger = logging.getLogger("pypkg")

_VOCAB_MULTIPLE = 128


def tokenizer_source(settings: Settings) -> Path:
    """The given folder or file, or the entry of that name in the Hugging Face cache."""
    name = settings.tokenizer_name_or_path
    assert name is not None  # Settings derives it
    path = Path(name)
    if os.path.exists(path):  # False, not an error, for a name too long for a path
        return path
    try:
        return find_weights(name)
    except UserError:
        return path


def tokenizer_of(settings: Settings) -> Tokenizer | None:
    """The tokenizer; None if the settings name none and the model's folder has none.

    Raises:
        UserError: it cannot be read, or it is missing and ``sample_tokens`` needs it.
    """
    source = tokenizer_source(settings)
    beside_model = settings.tokenizer_name_or_path == settings.model_name_or_path
    if not beside_model or find_tokenizer(source) is not None:
        return load_tokenizer(source)
    if settings.sample_tokens > 0:
        raise UserError(
            f"tokenizer_name_or_path is {str(source)!r}, where there is no tokenizer, but "
            f"sample_tokens ({settings.sample_tokens}) needs it. Give the folder of a tokenizer, "
            "or set sample_tokens to 0."
        )
    logger.info("no tokenizer in %s: checkpoints will hold no tokenizer", source)
    return None


def model_config(settings: Settings, tokenizer: Tokenizer | None) -> ModelConfig:
    """The configuration of the model that a new run trains.

    Raises:
        UserError: it cannot be found or is inconsistent.
    """
    allowed, overrides = settings.allow_unknown_config, settings.model_overrides
    if settings.continue_training:
        return stored_config(folder_with_weights(settings), allowed).replace(**overrides)
    config = load_config(settings.model_name_or_path, allowed).replace(**overrides)
    return _grown_to_fit(config, settings, tokenizer)


def load_model(
    settings: Settings, dtype: str, checkpoint: Path | None, config: ModelConfig, filled: bool
) -> tuple[Model, ReadParameter | None]:
    """This rank's model: of the checkpoint, of ``model_name_or_path``, or with random weights.

    Args:
        dtype: "float32", "float16" or "bfloat16", of the parameters.
        config: configuration of a model with random weights.
        filled: whether the parameters get their values before this returns.

    Returns:
        The model and None if ``filled``. Otherwise the model, whose parameters have no memory yet,
        and the function that reads their values.
    """
    allowed = settings.allow_unknown_config
    if checkpoint:
        config, read = stored_weights(checkpoint, dtype, allow_unknown_config=allowed)
    elif settings.continue_training:
        config, read = stored_weights(
            folder_with_weights(settings),
            dtype,
            seed=settings.seed,
            allow_unknown_config=allowed,
            **settings.model_overrides,
        )
    else:
        read = random_weights(config, settings.seed)
    return (
        (build_filled(config, dtype, read), None)
        if filled
        else (build_without_memory(config, dtype), read)
    )


def grown_vocab_size(tokenizer: Tokenizer) -> int:
    """The vocabulary size that fits the tokenizer, rounded up to a multiple of 128."""
    return -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def _grown_to_fit(
    config: ModelConfig, settings: Settings, tokenizer: Tokenizer | None
) -> ModelConfig:
    """``config`` with vocab_size and max_position_embeddings raised where they are too small."""
    needed = 0
    if tokenizer is not None:
        needed = grown_vocab_size(tokenizer)
    changes = {
        name: value
        for name, value in (
            ("vocab_size", needed),
            ("max_position_embeddings", settings.max_seq_length),
        )
        if value > getattr(config, name)
    }
    for name, value in changes.items():
        logger.info("%s is raised from %d to %d", name, getattr(config, name), value)
    return config.replace(**changes)
