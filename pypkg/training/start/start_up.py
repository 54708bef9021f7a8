"""Reads the settings of a run and reports every problem that is visible before its assembly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pypkg.config import Settings, listed
from pypkg.config.reading.parser import read_settings
from pypkg.config.support import support_problems
from pypkg.device.capabilities import probe, resolve
from pypkg.device.threads import import_paddle
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import load_config
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.model_folder import CONFIG_FILE
from pypkg.training.start.layout import layout_problems, process_problems


def load_run_settings(
    arguments: Sequence[str],
    world_size: int,
    runs_here: bool = True,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a run of ``world_size`` processes, from its command line.

    Device problems are added to other problems only, because finding them imports Paddle. Without
    another problem the assembly of the run reports what the device cannot do.

    Args:
        runs_here: whether the run uses this machine's device, so that its problems are listed too.
        defaults: values of settings that ``arguments`` may leave out, including required ones.

    Raises:
        UserError: lists all problems: those of ``load_settings`` and ``check_supported``, an
            unknown model, an invalid layout, and what the device cannot do.
    """
    settings, problems, bad = read_settings(arguments, defaults)
    problems += support_problems(settings, skip=bad)
    config = None
    if bad.isdisjoint(("model_name_or_path", "continue_training", "download")):
        try:
            config = _config(settings)
        except UserError as error:
            problems.append(str(error))
    if not bad and config is not None:
        problems += layout_problems(settings, config, world_size)
    elif not bad:
        problems += process_problems(settings, world_size)
    if not problems:
        return settings
    if runs_here and _asks_for_a_device(settings) and bad.isdisjoint(_DEVICE_SETTINGS):
        problems += _device_problems(settings)
    raise UserError(listed(list(dict.fromkeys(problems)), "problems in the settings"))


_DEVICE_SETTINGS = (
    *("device", "bf16", "fp16", "use_flash_attention", "attention_backend", "matmul_precision"),
    "ops_backend",
)


def _asks_for_a_device(s: Settings) -> bool:
    asked = (s.device == "gpu", s.bf16, s.fp16, s.use_flash_attention, s.ops_backend)
    return any(asked) or s.matmul_precision != "float32" or s.attention_backend != "auto"


def _device_problems(settings: Settings) -> list[str]:
    import_paddle()  # without its warnings; the run ends, so that its threads do not matter
    try:
        resolve(settings, probe(settings.device, settings.ops_backend))
    except UserError as error:
        return [line.removeprefix("  - ") for line in _lines(str(error))]
    return []


def _lines(message: str) -> list[str]:
    """The problems in a message of ``listed``."""
    first, *others = message.splitlines()
    return others or [first]


def _config(settings: Settings) -> ModelConfig | None:
    """The model's configuration; None if it comes with weights that are not available yet.

    Raises:
        UserError: the model is not known, or its config.json is wrong.
    """
    name = settings.model_name_or_path
    if not name or (settings.continue_training and settings.download):
        return None
    if settings.continue_training:
        folder = folder_with_weights(settings)
        if not (folder / CONFIG_FILE).is_file():
            return None  # the search for the weights reports what is missing
        name = str(folder)
    config = load_config(name, settings.allow_unknown_config)
    return config.replace(**settings.model_overrides)


def folder_with_weights(settings: Settings) -> Path:
    """The folder with the weights of a run with ``continue_training``.

    Raises:
        UserError: there are none, and ``download`` is false or fails.
    """
    try:
        return find_weights(settings.model_name_or_path, settings.download)
    except UserError as error:
        raise UserError(
            f"continue_training is true, but model_name_or_path has no weights: {error}; or set "
            "continue_training to false to start from random weights"
        ) from error
