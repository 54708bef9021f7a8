"""The registry of model families and of known model names.

Nothing here imports Paddle or uses the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.files.paths import configs_dir, similar_folder
from pypkg.models.architecture import paddlenlp
from pypkg.models.architecture.config import ModelConfig, nearest
from pypkg.models.architecture.family import Family, differing_fields
from pypkg.models.architecture.weight_map import Shape, WeightMap

# One line per module in families/.
_MODULES = (
    "baichuan",
    "bloom",
    "chatglm",
    "chatglm2",
    "glm130b",
    "glm4",
    "gpt",
    "llama",
    "mistral",
    "opt",
    "qwen",
    "qwen2",
    "qwen3",
    "stablelm",
)
_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(\d?)(?![a-z0-9])")
_SIMILAR = 1.5  # two sizes are similar up to this ratio
_FAMILIES: tuple[Family, ...] = tuple(
    family
    for name in _MODULES
    for family in import_module(f"pypkg.models.architecture.families.{name}").FAMILIES
)


def known_models() -> list[str]:
    """The model names that the package has a configuration for, sorted."""
    return sorted(_files_by_name())


def load_config(
    name_or_folder: str | Path, allow_unknown_config: Collection[str] = ()
) -> ModelConfig:
    """The configuration of a folder with a config.json, or of a known model.

    A folder takes precedence over a name. Names are not case-sensitive.

    Args:
        name_or_folder: path of a folder, or one of ``known_models()``.
        allow_unknown_config: unknown keys of config.json to ignore; any other unknown key is an
            error.

    Raises:
        UserError: there is no such folder and no such model (the message suggests similar names),
            or config.json is invalid.
    """
    if os.path.isdir(name_or_folder):  # False, not an error, for a name too long for a path
        file = Path(name_or_folder) / "config.json"
        if not file.exists():
            raise UserError(
                f"{file} does not exist, so {str(name_or_folder)!r} is not a model. Give a folder "
                "that holds a config.json, or a name that `pypkg models` lists"
            )
        return _read_config(file, allow_unknown_config)
    if os.path.isfile(name_or_folder):
        raise UserError(
            f"{str(name_or_folder)!r} is a file; a model is a folder that holds a config.json, "
            f"which may be {str(Path(name_or_folder).parent)!r}"
        )
    known = _known_file(str(name_or_folder))
    if known is None:
        name = str(name_or_folder)
        hint = similar_folder(name) or nearest(name, _of_similar_size(name)) or "."
        raise UserError(
            f"{name!r} is neither a folder nor a known model{hint} Give the path of "
            "a folder that holds a config.json, or a name that `pypkg models` lists"
        )
    return _read_config(known)


def known_config(name: str) -> str:
    """The text of the config.json of a known model.

    Raises:
        UserError: there is no such model; the message suggests similar names.
    """
    known = _known_file(name)
    if known is None:
        hint = nearest(name, known_models()) or "."
        raise UserError(f"{name!r} is no known model{hint} `pypkg models` lists the names")
    return known.read_text(encoding="utf-8")


def _known_file(name: str) -> Path | None:
    files = {known.lower(): file for known, file in _files_by_name().items()}
    return files.get(name.lower())


def _of_similar_size(name: str) -> list[str]:
    """The known models whose names contain a similar size as ``name``, or no size.

    Names of other sizes differ from ``name`` in few characters, but are not misspellings of it.
    """
    wanted = _size(name)

    def is_similar(known: str) -> bool:
        size = _size(known)
        return not (wanted and size) or max(wanted, size) <= _SIMILAR * min(wanted, size)

    return [known for known in known_models() if is_similar(known)]


def _size(name: str) -> float:
    """Millions of parameters according to ``name``, as in llama-58m and bloom-7b1; 0: no size."""
    found = _SIZE.findall(name.lower())
    if not found:
        return 0.0
    number, unit, tenth = found[-1]
    return (float(number) + int(tenth or 0) / 10) * {"b": 1000, "m": 1}[unit]


def families() -> tuple[Family, ...]:
    """The supported families."""
    return _FAMILIES


def num_parameters(name_or_folder: str | Path) -> int:
    """Number of parameters, computed from the configuration alone.

    Args:
        name_or_folder: as in ``load_config``.
    """
    return load_config(name_or_folder).num_parameters()


def config_from_huggingface(
    keys: Mapping[str, Any], allow_unknown_config: Collection[str] = ()
) -> ModelConfig:
    """The configuration that a config.json of Hugging Face or PaddleNLP describes.

    Args:
        keys: the object in config.json.
        allow_unknown_config: unknown keys to ignore instead of raising an error.

    Raises:
        UserError: the family is not supported, a value is invalid, or a key is unknown.
    """
    if not isinstance(keys.get("architectures"), (list, type(None))):
        raise UserError(
            f"architectures must be a list of class names or null, found {keys['architectures']!r}"
        )
    if paddlenlp.describes(keys):
        config = _read_keys(paddlenlp.huggingface_keys(keys), allow_unknown_config)
        return config.replace(**paddlenlp.fields_of(keys))
    return _read_keys(keys, allow_unknown_config)


def _read_keys(keys: Mapping[str, Any], allow_unknown_config: Collection[str]) -> ModelConfig:
    for family in _FAMILIES:
        if family.recognises(keys):
            return family.read_config(keys, allow_unknown_config)
    supported = [name for family in _FAMILIES for name in family.architectures or (family.name,)]
    raise UserError(
        f"architectures {keys.get('architectures') or []} with model_type "
        f"{keys.get('model_type')!r} is not supported; supported are "
        f"{', '.join(supported)}"
    )


def config_to_huggingface(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The keys of a Hugging Face config.json for ``config`` with weights of ``dtype``.

    Raises:
        UserError: the config.json of the family cannot express ``config``.
    """
    return {**_family(config).write_config(config), "torch_dtype": dtype, "use_cache": True}


def config_key(config: ModelConfig, field: str) -> str:
    """The key of ``field``, a field of ModelConfig, in the config.json of the family."""
    return _family(config).key(field)


def config_to_paddlenlp(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The keys of a PaddleNLP config.json for ``config`` with weights of ``dtype``.

    Raises:
        UserError: PaddleNLP does not have the family, or its config.json cannot express ``config``.
    """
    family = _family(config)
    written = family.write_config(config)
    followed = {key: written[key] for key in written if key not in family.extensions.values()}
    keys = paddlenlp.keys_of(config.model_type, followed, dtype)
    restored = config_from_huggingface(keys)
    if paddlenlp.head_of(config.model_type):  # config.json does not say whether the head is tied
        restored = restored.replace(tie_word_embeddings=config.tie_word_embeddings)
    if lost := differing_fields(config, restored):
        raise UserError(f"PaddleNLP's {config.model_type} model does not support {', '.join(lost)}")
    return keys


def weight_map(config: ModelConfig) -> WeightMap:
    """The weight map of Hugging Face folders for the family of ``config``."""
    return _family(config).weight_map(config)


def stored_weight_map(config: ModelConfig, found: Mapping[str, Shape]) -> WeightMap:
    """The weight map of a checkpoint in the format of Hugging Face or PaddleNLP.

    Args:
        found: shapes of the tensors of the checkpoint by name, with or without the family's prefix.
    """
    huggingface = weight_map(config)
    if paddlenlp.is_stored_as(config, huggingface, found):
        return paddlenlp.weight_map(config, huggingface, found)
    return huggingface.fitted_to(found)


def _family(config: ModelConfig) -> Family:
    for family in _FAMILIES:
        if config.model_type == family.name:
            return family
    known = ", ".join(family.name for family in _FAMILIES)
    raise UserError(f"model_type {config.model_type!r} is not supported; use one of {known}")


def _files_by_name() -> dict[str, Path]:
    """The configuration file of every known name.

    aliases.json lists models that share their configuration with another model.
    """
    folder = configs_dir() / "models"
    files = {file.stem.replace("--", "/"): file for file in folder.glob("*.json")}
    aliases = read_json(files.pop("aliases"))
    return {**files, **{alias: files[name] for alias, name in aliases.items()}}


def _read_config(path: Path, allow_unknown_config: Collection[str] = ()) -> ModelConfig:
    keys = read_json(path)
    try:
        return config_from_huggingface(keys, allow_unknown_config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
