"""Converts weights of all readable formats to a Hugging Face folder, and enlarges vocabularies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.conversion.destination import copy_companions, new_folder
from pypkg.conversion.generation import with_end, write_generation_config
from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.models.architecture import paddlenlp
from pypkg.models.architecture.registry import (
    config_from_huggingface,
    config_to_huggingface,
    config_to_paddlenlp,
    load_config,
    stored_weight_map,
    weight_map,
)
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.stored_tensor import convert
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.missing_head import lacks_head
from pypkg.models.weights.model_folder import CONFIG_FILE, DEFAULT_SHARD_SIZE, write_model_folder
from pypkg.models.weights.tied_head import as_stored

_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, 4
_VOCAB_KEYS = ("vocab_size", "padded_vocab_size")
_METADATA = {"huggingface": "pt", "paddlenlp": "np"}  # "format" in a safetensors file
_TABLE = "embed_tokens.weight"
_ROWS = 1024  # rows of the embedding that are read at a time to compute their mean


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        family: ``model_type`` of the model.
        vocab_size: rows of the written embedding.
        specs: dtype and shape of each written tensor, by name.
        left_out: stored tensors that are not parameters and were not written.
        copied: names of the copied files, such as those of the tokenizer.
        folder: the destination.
    """

    family: str
    vocab_size: int
    specs: dict[str, TensorSpec]
    left_out: list[str]
    copied: list[str]
    folder: Path


def convert_model(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    config: str | Path | None = None,
    layout: str = "huggingface",
    overwrite: bool = False,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
) -> Converted:
    """Writes the model in ``source`` as a Hugging Face folder, parameter by parameter.

    The folder holds config.json, safetensors (with an index if there are several files), and copies
    of the tokenizer's and other files of ``source``. If config.json has no eos_token_id, that of
    the tokenizer is added. generation_config.json is created if ``source`` has none.

    Args:
        source: a folder with weights in a format of ``TensorFiles``, with the tensor names of
            Hugging Face or PaddleNLP; a checkpoint of a run; or the name of a model in the Hugging
            Face cache.
        destination: the folder to write.
        dtype: float32, float16 or bfloat16; None: each tensor keeps its dtype.
        max_shard_size: largest weight file, in bytes or as text such as "5GB".
        config: a folder whose config.json replaces that of ``source``, and whose tokenizer and
            other files are copied if ``source`` lacks them; or the name of a known model.
        layout: "huggingface", or "paddlenlp" for a folder that PaddleNLP loads.
        overwrite: whether to replace a ``destination`` that is not empty.
        download: whether to download files of ``source`` that the Hugging Face cache lacks.
        allow_unknown_config: keys of config.json to ignore although the family does not know them.
            They are written unchanged.

    Raises:
        UserError: ``source`` cannot be read or its tensors do not fit its configuration;
            ``destination`` is not empty and ``overwrite`` is false, or cannot be written;
            PaddleNLP does not have the model.
    """
    folder = find_weights(source, download)
    keys = _config_keys(folder, config)
    more = [Path(config)] if config is not None and Path(config).is_dir() else []
    plan = _Plan(folder, keys, dtype, None, layout, allow_unknown_config)
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

    Each new row is the mean of the old rows.

    Args:
        vocab_size: number of rows, rounded up to a multiple of ``multiple``.
        multiple: 1, or a number such as 128 so that tensor parallelism can divide the rows.

    The other arguments are those of ``convert_model``.

    Raises:
        UserError: as in ``convert_model``; or the result would have fewer rows than ``source``.
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
    plan = _Plan(folder, keys, None, {**keys, **changed}, allow_unknown_config=allow_unknown_config)
    return plan.write([folder], Path(destination), max_shard_size, overwrite)


class _Plan:
    """Maps the stored tensors to the tensors to write. Its construction only reads headers.

    Args:
        folder: of the stored weights.
        keys: content of the config.json that describes the stored weights.
        dtype: to write; None: that of each stored tensor.
        new_keys: content of the config.json to write, if it differs.
        layout: to write, as in ``convert_model``.
    """

    def __init__(
        self,
        folder: Path,
        keys: Mapping[str, Any],
        dtype: str | None,
        new_keys: Mapping[str, Any] | None = None,
        layout: str = "huggingface",
        allow_unknown_config: Collection[str] = (),
    ) -> None:
        self._files, self._keys = TensorFiles(folder), dict(new_keys or keys)
        self._found = self._files.specs()
        self._layout = layout
        described = config_from_huggingface(keys, allow_unknown_config)
        stored_config = as_stored(described, self._files, folder)
        tied = stored_config.tie_word_embeddings
        if stored_config != described and "tie_word_embeddings" in keys:
            self._keys["tie_word_embeddings"] = tied
        new_config = config_from_huggingface(self._keys, allow_unknown_config)
        self._config = new_config.replace(tie_word_embeddings=tied)
        shapes = self._files.shapes()
        self._stored = stored_weight_map(stored_config, shapes)
        needed = parameter_shapes(stored_config)
        if lacks_head(keys, self._stored, needed, shapes):
            raise UserError(
                f"{folder} holds a model without its head, which every written model has. Give it "
                "as model_name_or_path with continue_training: that run starts with a random head, "
                "and its checkpoints contain the head"
            )
        self._stored.check(needed, shapes, self._files.where)
        self._written = weight_map(self._config)
        self._second_head = ""  # name of a second copy of a tied embedding, or empty
        if layout == "paddlenlp":
            self._second_head = paddlenlp.head_of(self._config.model_type) if tied else ""
            self._written = paddlenlp.weight_map(self._config, self._written)
            self._keys = config_to_paddlenlp(self._config, dtype or self._first_dtype())
        elif paddlenlp.describes(keys):
            self._keys = config_to_huggingface(self._config, dtype or self._first_dtype())
        elif dtype:
            self._keys[next((key for key in _DTYPE_KEYS if key in keys), _DTYPE_KEYS[-1])] = dtype
        # Whether stored tensors are written unchanged, possibly under other names.
        self._is_copied = layout == "huggingface" and not paddlenlp.is_stored_as(
            stored_config, weight_map(stored_config), shapes
        )
        if new_keys is not None and not self._is_copied:
            raise UserError(
                f"{folder} has PaddleNLP's names; convert it to a Hugging Face folder first: "
                "python -m pypkg.convert import SRC DST"
            )
        self._shapes = parameter_shapes(self._config)
        self._specs, self._left_out = self._planned(dtype)

    def _planned(self, dtype: str | None) -> tuple[dict[str, TensorSpec], list[str]]:
        """The tensors to write, in order, and the names of the stored ones that are left out."""
        specs: dict[str, TensorSpec] = {}
        used: set[str] = set()
        for name, shape in self._shapes.items():
            sources = list(self._stored.source_shapes(name, shape))
            used.update(sources)
            kept = self._found[sources[0]].dtype
            for target, target_shape in self._written.source_shapes(name, shape).items():
                specs[target] = TensorSpec(dtype or kept, target_shape)
        if self._second_head:
            (table,) = self._written.source_shapes(_TABLE, self._shapes[_TABLE])
            specs[self._second_head] = specs[table]
        return specs, sorted(self._found.keys() - used)

    def _first_dtype(self) -> str:
        return next(iter(self._found.values())).dtype

    def write(
        self, companions: list[Path], destination: Path, max_shard_size: int | str, overwrite: bool
    ) -> Converted:
        """Writes the folder.

        Args:
            companions: folders from which tokenizer and other files are copied; the first one with
                a file counts.
        """
        keys, config = with_end(self._keys, self._config, companions)
        with new_folder(destination, companions[0], overwrite) as folder:
            write_model_folder(
                folder,
                keys,
                self._specs,
                self._tensors(),
                max_shard_size,
                _METADATA[self._layout],
            )
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
        for name, shape in self._shapes.items():
            sources = self._stored.source_shapes(name, shape)
            targets = self._written.source_shapes(name, shape)
            if self._is_copied:
                for target, source in zip(targets, sources, strict=True):
                    yield target, self._read_whole(source, self._specs[target])
                continue
            dtype = self._specs[next(iter(targets))].dtype
            values = [self._files.read(source, dtype) for source in sources]
            whole = self._stored.to_model(name, values)
            yield from self._written.to_checkpoint(name, whole).items()
        if self._second_head:
            (table,) = self._stored.source_shapes(_TABLE, self._shapes[_TABLE])
            yield self._second_head, self._files.read(table, self._specs[self._second_head].dtype)

    def _read_whole(self, source: str, spec: TensorSpec) -> np.ndarray:
        values = self._files.read(source, spec.dtype)
        return values if values.shape == spec.shape else self._grown(source, values, spec)

    def _grown(self, source: str, values: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """``values`` extended to the shape of ``spec`` by rows that are the mean of all rows."""
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
