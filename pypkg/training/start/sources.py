"""Where a run starts from: its checkpoint, the model's configuration and weights, the tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from pypkg.config import Settings
from pypkg.data.tokenizers.load import Tokenizer, find_tokenizer, load_tokenizer
from pypkg.errors import UserError
from pypkg.models import ModelConfig, from_config, from_pretrained
from pypkg.models.architecture.registry import load_config
from pypkg.models.pretrained import Model, stored_config
from pypkg.models.weights.hub import find_weights
from pypkg.training.checkpoint.folders import checkpoints
from pypkg.training.start.start_up import folder_with_weights
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")

_VOCAB_MULTIPLE = 128


def tokenizer_source(settings: Settings) -> Path:
    """The given folder or file, or the entry of that name in the Hugging Face cache."""
    name = settings.tokenizer_name_or_path
    assert name is not None  # Settings derives it
    path = Path(name)
    if path.exists():
        return path
    try:
        return find_weights(name)
    except UserError:
        return path


def tokenizer_of(settings: Settings) -> Tokenizer | None:
    """The tokenizer; None where it is only looked for beside the model and is not there.

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


def checkpoint_to_resume(settings: Settings) -> Path | None:
    """The checkpoint that the run goes on from; None where it starts anew.

    ``resume_from_checkpoint`` wins, else it is the newest in ``output_dir``. With
    ``overwrite_output_dir`` those in ``output_dir`` are removed; one rank alone may call this.

    Raises:
        UserError: with ``ignore_load_lr_and_optim``, ``output_dir`` holds checkpoints already. The
            steps count from 0 again, so those of the new run would mix with them.
    """
    found = checkpoints(settings.output_dir)
    if found and settings.ignore_load_lr_and_optim and not settings.overwrite_output_dir:
        raise UserError(
            f"ignore_load_lr_and_optim is true, which counts steps from 0 again, but output_dir "
            f"{settings.output_dir!r} holds {found[-1][1].name} already. Set output_dir to another "
            "folder and resume_from_checkpoint to the checkpoint whose weights to take."
        )
    if settings.resume_from_checkpoint:
        return Path(settings.resume_from_checkpoint)
    if not found:
        return None
    if settings.overwrite_output_dir:
        logger.info("overwrite_output_dir: starting anew, removing %d checkpoints", len(found))
        for _, folder in found:
            shutil.rmtree(folder)
        return None
    return found[-1][1]


def best_checkpoint(settings: Settings, state: TrainerState) -> Path | None:
    """The checkpoint that the run ends with, with ``load_best_model_at_end``; else None."""
    if not settings.load_best_model_at_end or state.best_checkpoint is None:
        return None
    best = Path(settings.output_dir, state.best_checkpoint)
    if best.is_dir():
        return best
    logger.warning("the best checkpoint, %s, is gone: the run ends with the last model", best)
    return None


def model_config(settings: Settings, tokenizer: Tokenizer | None) -> ModelConfig:
    """The configuration of the model that a new run trains.

    Raises:
        UserError: it cannot be found or is contradictory.
    """
    allowed, overrides = settings.allow_unknown_config, settings.model_overrides
    if settings.continue_training:
        return stored_config(folder_with_weights(settings), allowed).replace(**overrides)
    config = load_config(settings.model_name_or_path, allowed).replace(**overrides)
    return _grown_to_fit(config, settings, tokenizer)


def load_model(
    settings: Settings, dtype: str, checkpoint: Path | None, config: ModelConfig
) -> Model:
    """This rank's model: of the checkpoint, of ``model_name_or_path``, or with random weights.

    Args:
        dtype: "float32", "float16" or "bfloat16", of the parameters.
        config: for random weights.
    """
    allowed = settings.allow_unknown_config
    if checkpoint:
        return from_pretrained(checkpoint, dtype=dtype, allow_unknown_config=allowed)
    if settings.continue_training:
        folder = folder_with_weights(settings)
        return from_pretrained(
            folder,
            dtype=dtype,
            seed=settings.seed,
            allow_unknown_config=allowed,
            **settings.model_overrides,
        )
    return from_config(config, dtype=dtype, seed=settings.seed)


def _grown_to_fit(
    config: ModelConfig, settings: Settings, tokenizer: Tokenizer | None
) -> ModelConfig:
    """Vocabulary and positions raised to what tokenizer and samples need, as PaddleNLP does."""
    needed = 0
    if tokenizer is not None:
        needed = -(-tokenizer.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
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
