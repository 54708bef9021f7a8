"""Writes a Hugging Face folder, config.json and safetensors files, one tensor at a time.

Nothing here imports Paddle.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.errors import UserError
from pypkg.files import publish_files
from pypkg.models.weights.formats.safetensors import TensorSpec, write_tensors
from pypkg.models.weights.formats.tensor_files import INDEX_FILE
from pypkg.models.weights.save_plan import shard_name, split_by_size

CONFIG_FILE = "config.json"
MODEL_STEM = "model"  # of the names of weight files
DEFAULT_SHARD_SIZE = "5GB"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_model_folder(
    folder: Path,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    metadata_format: str = "pt",
) -> None:
    """Writes config.json and safetensors files, with an index if there are several.

    Files have temporary names until all are complete. Then they are renamed, and weight files of
    an earlier save that do not belong to the model are removed. Other files are not changed.

    Args:
        config: the content of config.json.
        specs: spec of each tensor by name, in the order of ``tensors``.
        tensors: (name, array) pairs.
        max_shard_size: largest size of a weight file, in bytes or with a unit ("500MB", "5GB").
        metadata_format: "pt" for the layout of Hugging Face, "np" for that of PaddleNLP.

    Raises:
        UserError: the folder cannot be written, the disk is full, or ``max_shard_size`` is not a
            size.
    """
    shards = split_by_size(specs, parse_size(max_shard_size)) or [{}]
    written: dict[str, Path] = {}  # final name -> temporary file

    def temporary(name: str) -> Path:
        written[name] = folder / f".{name}.{os.getpid()}.tmp"
        return written[name]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, str] = {}
        coming = iter(tensors)
        for number, shard in enumerate(shards, start=1):
            file = shard_name(MODEL_STEM, number, len(shards))
            index.update(dict.fromkeys(shard, file))
            write_tensors(temporary(file), shard, islice(coming, len(shard)), metadata_format)
        if len(shards) > 1:
            total = sum(spec.num_bytes for spec in specs.values())
            listing = {"metadata": {"total_size": total}, "weight_map": index}
            write_json(temporary(INDEX_FILE), listing)
        write_json(temporary(CONFIG_FILE), config)
        publish_model(folder, written)
    except OSError as error:
        raise cannot_save(folder, error) from error
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def publish_model(folder: Path, written: Mapping[str, Path]) -> None:
    """Renames the files of a model to their final names, and removes those of an earlier save.

    Args:
        written: temporary path of each file by its final name.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    publish_files({path: folder / name for name, path in written.items()})
    for path in folder.iterdir():
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
            path.unlink()


def cannot_save(folder: Path, error: OSError) -> UserError:
    """The error for a ``folder`` in which a model cannot be saved."""
    return UserError(
        f"cannot save the model in {folder}: {error.strerror}; choose a folder that can be "
        "written, on a disk with free space"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, without syncing it to disk.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse_size(size: int | str) -> int:
    """The number of bytes of a size such as "500MB" or "1.5GiB".

    Raises:
        UserError: ``size`` is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    number, unit = match.groups() if match else ("0", "")
    num_bytes = int(float(number) * (_UNITS.get(unit.upper(), 0) if unit else 1))
    if num_bytes < 1:
        raise UserError(
            f"max_shard_size must be a positive number of bytes, or a size such as '5GB', found "
            f"{size!r}"
        )
    return num_bytes
