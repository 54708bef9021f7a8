"""Models with random weights, from a Hugging Face folder, and to one."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from pypkg.errors import UserError
from pypkg.models.config import ModelConfig
from pypkg.models.decoder import Decoder
from pypkg.models.registry import config_to_huggingface, load_config, weight_map
from pypkg.models.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles, write_tensors

DTYPES = ("float32", "float16", "bfloat16")
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def from_config(config: ModelConfig, dtype: str = "float32", seed: int | None = None) -> Decoder:
    """A model with random weights, in train mode.

    Matrices are normal with mean 0 and standard deviation ``config.initializer_range``, norm
    weights 1, biases 0. Every parameter has its own random stream, given by ``seed`` and its
    name: the result depends on no global state and changes none. Without a seed it differs each
    time.

    Raises:
        UserError: ``dtype`` is not float32, float16 or bfloat16.
    """
    model = _build(config, dtype)
    entropy = np.random.SeedSequence(seed).entropy
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # norm weights and biases keep the value that they were made with
        generator = np.random.default_rng([entropy, zlib.crc32(name.encode())])
        values = generator.standard_normal(parameter.shape, dtype=np.float32)
        values *= np.float32(config.initializer_range)
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
    return model


def from_pretrained(folder: str | Path, dtype: str = "float32", **overrides: Any) -> Decoder:
    """The model in a Hugging Face folder: config.json and safetensors, single or sharded.

    Tensors are read one at a time and converted to ``dtype``.

    Args:
        dtype: float32, float16 or bfloat16.
        overrides: fields of ModelConfig that replace those of config.json.

    Returns:
        The model in eval mode.

    Raises:
        UserError: no such folder, an unsupported or contradictory configuration, a corrupt file,
            or tensors that are missing, superfluous or of the wrong shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; weights are read from a local folder that holds "
            "config.json and safetensors files"
        )
    config = load_config(folder).replace(**overrides)
    files = TensorFiles(folder)
    names = weight_map(config)
    model = _build(config, dtype)
    parameters = dict(model.named_parameters())
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    names.check(shapes, files.shapes(), str(folder))
    for name, parameter in parameters.items():
        sources = names.source_shapes(name, parameter.shape)
        parameter.set_value(names.to_model(name, [files.read(source, dtype) for source in sources]))
    model.eval()
    return model


def save_pretrained(model: Decoder, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
    """Writes a Hugging Face folder: config.json and safetensors, sharded if larger than a shard.

    Every file is written under a temporary name, and renamed when all are complete; weight files
    of an earlier save that are no longer part of the model are removed then. Other files of the
    folder stay. One parameter at a time is in host memory.

    Args:
        max_shard_size: bytes, or a number with a unit such as "500MB" or "5GB".

    Raises:
        UserError: the folder cannot be written to, the disk is full, or ``max_shard_size`` makes
            no sense.
    """
    folder = Path(folder)
    written: dict[str, Path] = {}  # final name -> temporary file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_files(model, folder, _parse_size(max_shard_size), written)
        for name, temporary in written.items():
            os.replace(temporary, folder / name)
        for path in folder.iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                path.unlink()
    except OSError as error:
        raise UserError(
            f"cannot save the model in {folder}: {error.strerror}; choose a folder that can be "
            "written to and has room"
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def model_dtype(model: Decoder) -> str:
    """float32, float16 or bfloat16."""
    return str(model.head_weight.dtype).removeprefix("paddle.")


def _build(config: ModelConfig, dtype: str) -> Decoder:
    """A model of ``dtype`` whose matrices are zero."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        return Decoder(config)
    finally:
        paddle.set_default_dtype(before)


def _write_files(
    model: Decoder, folder: Path, max_shard_size: int, written: dict[str, Path]
) -> None:
    def temporary(name: str) -> Path:
        written[name] = folder / f".{name}.{os.getpid()}.tmp"
        return written[name]

    dtype = model_dtype(model)
    names = weight_map(model.config)
    parameters = dict(model.named_parameters())
    shards = _plan_shards(parameters, max_shard_size)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else _shard_name(number, len(shards))
        shapes: dict[str, tuple[int, ...]] = {}
        for name in shard:
            shapes.update(names.source_shapes(name, parameters[name].shape))
        index.update(dict.fromkeys(shapes, file))

        def tensors(shard: list[str] = shard) -> Iterator[tuple[str, np.ndarray]]:
            for name in shard:
                yield from names.to_checkpoint(name, parameters[name].numpy()).items()

        total += write_tensors(temporary(file), dtype, shapes, tensors())
    if len(shards) > 1:
        _write_json(temporary(INDEX_FILE), {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(temporary("config.json"), config_to_huggingface(model.config, dtype))


def _plan_shards(parameters: dict[str, paddle.Tensor], max_size: int) -> list[list[str]]:
    """Names of the parameters of each shard, in the order of the model."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in parameters.items():
        num_bytes = parameter.size * parameter.element_size()
        if shards[-1] and size + num_bytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _parse_size(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = match.group(2).upper() if match else None
    if unit == "":
        num_bytes = int(float(match.group(1)))
    elif unit in _UNITS:
        num_bytes = int(float(match.group(1)) * _UNITS[unit])
    else:
        num_bytes = 0
    if num_bytes < 1:
        raise UserError(
            f"max_shard_size must be a positive number of bytes or such as '5GB', found {size!r}"
        )
    return num_bytes
