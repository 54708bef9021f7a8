"""Families by the names in config.json, and models by the names people know them under.

Nothing here imports Paddle or reaches for the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pypkg.errors import UserError
from pypkg.models.config import ModelConfig, nearest, read_json
from pypkg.models.families import llama
from pypkg.models.weights import WeightMap
from pypkg.paths import configs_dir

_FAMILIES = (llama,)


def known_models() -> list[str]:
    """The names that resolve to a shipped configuration, sorted."""
    return sorted(path.stem.replace("--", "/") for path in _models_dir().glob("*.json"))


def load_config(name_or_folder: str | Path) -> ModelConfig:
    """The configuration of a known model, or of a folder that holds a config.json.

    A folder wins over a name; the case of a name does not matter.

    Raises:
        UserError: neither is there (the nearest known names are listed), or config.json is wrong.
    """
    if Path(name_or_folder).is_dir():
        return _read_config(Path(name_or_folder) / "config.json")
    names = {name.lower(): name for name in known_models()}
    name = names.get(str(name_or_folder).lower())
    if name is None:
        known = list(names.values())
        hint = nearest(str(name_or_folder), known) or f"; known are {', '.join(known)}"
        raise UserError(
            f"{str(name_or_folder)!r} is neither a folder nor a known model{hint} "
            "(or give the path of a folder that holds a config.json)"
        )
    return _read_config(_models_dir() / f"{name.replace('/', '--')}.json")


def num_parameters(name_or_folder: str | Path) -> int:
    """Number of parameters, computed from the configuration without making any weight."""
    return load_config(name_or_folder).num_parameters()


def config_from_huggingface(keys: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the keys of a config.json describe.

    Raises:
        UserError: the family is not supported, or a value is wrong.
    """
    architectures = keys.get("architectures") or []
    for family in _FAMILIES:
        if keys.get("model_type") == family.MODEL_TYPE or any(
            name in family.ARCHITECTURES for name in architectures
        ):
            return family.read_config(keys)
    supported = ", ".join(name for family in _FAMILIES for name in family.ARCHITECTURES)
    raise UserError(
        f"architectures {architectures} with model_type {keys.get('model_type')!r} is not "
        f"supported; supported are {supported}"
    )


def config_to_huggingface(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The keys of a config.json that describes ``config`` with weights of ``dtype``."""
    family = _family(config)
    return {
        "architectures": [family.ARCHITECTURES[0]],
        "model_type": family.MODEL_TYPE,
        **family.write_config(config),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def weight_map(config: ModelConfig) -> WeightMap:
    """The weight map of the family that ``config`` belongs to."""
    return _family(config).weight_map(config)


def _family(config: ModelConfig) -> ModuleType:
    for family in _FAMILIES:
        if config.model_type == family.MODEL_TYPE:
            return family
    known = ", ".join(family.MODEL_TYPE for family in _FAMILIES)
    raise UserError(f"model_type {config.model_type!r} is not supported; use one of {known}")


def _models_dir() -> Path:
    return configs_dir() / "models"


def _read_config(path: Path) -> ModelConfig:
    keys = read_json(path)
    try:
        return config_from_huggingface(keys)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
