"""Any weights that can be read, to a Hugging Face folder; with more rows for tokens if asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.conversion.destination import copy_companions, new_folder
from pypkg.conversion.generation import with_end, write_generation_config
from pypkg.errors import UserError
from pypkg.models.architecture.config import read_json
from pypkg.models.architecture.registry import (
    config_from_huggingface,
    config_to_huggingface,
    load_config,
    weight_map,
)
from pypkg.models.pretrained import parameter_shapes
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.stored_tensor import convert
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.model_folder import CONFIG_FILE, DEFAULT_SHARD_SIZE, write_model_folder
from pypkg.models.weights.tied_head import as_stored

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, 4
_VOCAB_KEYS = ("vocab_size", "padded_vocab_size")
_ROWS = 1024  # of a table that are averaged at once


@dataclass(frozen=True)
class Converted:
    """What was written."""

    family: str
    vocab_size: int
    specs: dict[str, TensorSpec]
    left_out: list[str]  # tensors that are no parameters
    copied: list[str]  # files beside the weights
    folder: Path


def convert_model(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    config: str | Path | None = None,
    overwrite: bool = False,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
) -> Converted:
    """Writes the model in ``source`` as a Hugging Face folder, tensor by tensor.

    The folder holds config.json, safetensors (with an index if there are several), and the
    tokenizer's and other files of ``source``. If config.json names no end of text, that of the
    tokenizer is written there; generation_config.json is made if ``source`` has none.

    Args:
        source: a folder with weights in safetensors, PyTorch or SAT format, one of our
            checkpoints, or the name of a model in the Hugging Face cache.
        dtype: float32, float16 or bfloat16; None keeps what each tensor has.
        config: a folder whose config.json and files are taken for what ``source`` lacks or in
            place of its config.json, or the name of a known model.
        download: fetch what the Hugging Face cache lacks of ``source``.
        allow_unknown_config: keys of config.json that are ignored if the family does not know
            them. They are written as they are.

    Raises:
        UserError: ``source`` cannot be read or its tensors do not fit its configuration;
            ``destination`` is not empty and ``overwrite`` is false, or cannot be written.
    """
    folder = find_weights(source, download)
    keys = _config_keys(folder, config)
    more = [Path(config)] if config is not None and Path(config).is_dir() else []
    plan = _Plan(folder, keys, dtype, allow_unknown_config=allow_unknown_config)
    return plan.write([folder, *more], Path(destination), max_shard_size, overwrite)


def resize_vocabulary(
    source: str | Path,
    destination: str | Path,
    vocab_size: int,
    multiple: int = 1,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
) -> Converted:
    """Writes ``source`` with more rows in its embedding and its head.

    A new row is the mean of the old ones, so that new tokens start as an average token.

    Args:
        vocab_size: rows wanted, raised to a multiple of ``multiple`` so that tensor parallelism
            can divide them.

    Raises:
        UserError: as for ``convert_model``; the result would have fewer rows than ``source``.
    """
    if vocab_size < 1 or multiple < 1:
        raise UserError(
            f"vocab_size ({vocab_size}) and multiple ({multiple}) must be positive numbers"
        )
    folder = find_weights(source, download)
    keys = _config_keys(folder, None)
    rows = -(-vocab_size // multiple) * multiple
    before = config_from_huggingface(keys, allow_unknown_config).vocab_size
    if rows < before:
        raise UserError(
            f"{folder} has a vocabulary of {before}, which cannot shrink to {rows}: rows that a "
            f"tokenizer may use would be lost; give a vocab_size of at least {before}"
        )
    changed = {key: rows for key in _VOCAB_KEYS if keys.get(key) == before}
    plan = _Plan(folder, keys, None, {**keys, **changed}, allow_unknown_config)
    return plan.write([folder], Path(destination), max_shard_size, overwrite)


class _Plan:
    """Which tensors are read and what they become; made from headers alone.

    Args:
        keys: of the config.json that describes what is stored.
        new_keys: of the one to write, if it is another.
    """

    def __init__(
        self,
        folder: Path,
        keys: Mapping[str, Any],
        dtype: str | None,
        new_keys: Mapping[str, Any] | None = None,
        allow_unknown_config: Collection[str] = (),
    ) -> None:
        self._files, self._keys = TensorFiles(folder), dict(new_keys or keys)
        described = config_from_huggingface(keys, allow_unknown_config)
        stored_config = as_stored(described, self._files, folder)
        tied = stored_config.tie_word_embeddings
        if stored_config != described and "tie_word_embeddings" in keys:
            self._keys["tie_word_embeddings"] = tied
        new_config = config_from_huggingface(self._keys, allow_unknown_config)
        self._config = new_config.replace(tie_word_embeddings=tied)
        found = self._files.specs()
        written = weight_map(self._config)
        stored = weight_map(stored_config).fitted_to(found)
        stored.check(parameter_shapes(stored_config), self._files.shapes(), str(folder))
        if dtype:
            self._keys[next((key for key in _DTYPE_KEYS if key in keys), _DTYPE_KEYS[-1])] = dtype
        self._source: dict[str, str] = {}  # name to write -> name to read
        self._specs: dict[str, TensorSpec] = {}
        for name, shape in parameter_shapes(self._config).items():
            new = written.source_shapes(name, shape)
            for (target, target_shape), source in zip(
                new.items(), stored.source_shapes(name, shape), strict=True
            ):
                self._source[target] = source
                self._specs[target] = TensorSpec(dtype or found[source].dtype, target_shape)
        self._left_out = sorted(found.keys() - set(self._source.values()))

    def write(
        self, companions: list[Path], destination: Path, max_shard_size: int | str, overwrite: bool
    ) -> Converted:
        """Writes the folder, with the files beside the weights of the folders ``companions``."""
        keys, config = with_end(self._keys, self._config, companions)
        with new_folder(destination, companions[0], overwrite) as folder:
            write_model_folder(folder, keys, self._specs, self._tensors(), max_shard_size)
            copied = [name for each in companions for name in copy_companions(each, folder)]
            write_generation_config(folder, config)
        return Converted(
            config.model_type,
            config.vocab_size,
            self._specs,
            self._left_out,
            sorted(copied),
            destination,
        )

    def _tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for target, source in self._source.items():
            spec = self._specs[target]
            values = self._files.read(source, spec.dtype)
            if values.shape != spec.shape:
                values = self._grown(source, values, spec)
            yield target, values

    def _grown(self, source: str, values: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """``values`` with rows of their mean added, up to the shape of ``spec``."""
        rows = len(values)
        total = np.zeros(values.shape[1:], np.float64)
        for start in range(0, rows, _ROWS):
            block = self._files.read(source, "float32", [slice(start, start + _ROWS)])
            total += block.sum(axis=0, dtype=np.float64)
        grown = np.empty(spec.shape, values.dtype)
        grown[:rows] = values
        grown[rows:] = convert((total / rows).astype(np.float32), "float32", spec.dtype)
        return grown


def _config_keys(folder: Path, config: str | Path | None) -> dict[str, Any]:
    """The keys of the config.json that describes ``folder``."""
    if config is not None and not Path(config).is_dir():
        return config_to_huggingface(load_config(config))
    described = folder if config is None else Path(config)
    if not (described / CONFIG_FILE).is_file():
        raise UserError(
            f"{described} has no {CONFIG_FILE}; give --config with a folder that has one, or with "
            "the name of a known model, such as THUDM/glm-130b for its SAT checkpoint"
        )
    return read_json(described / CONFIG_FILE)
