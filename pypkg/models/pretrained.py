"""Models with random weights, from a Hugging Face folder, and to one."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from pypkg.errors import UserError
from pypkg.models.config import ModelConfig
from pypkg.models.decoder import Decoder
from pypkg.models.hub_cache import find_weights
from pypkg.models.initialization import standard_deviation
from pypkg.models.model_folder import CONFIG_FILE, DEFAULT_SHARD_SIZE, write_model_folder
from pypkg.models.registry import config_to_huggingface, load_config, weight_map
from pypkg.models.safetensors_file import TensorSpec
from pypkg.models.tensor_files import TensorFiles

DTYPES = ("float32", "float16", "bfloat16")


def from_config(config: ModelConfig, dtype: str = "float32", seed: int | None = None) -> Decoder:
    """A model with random weights, in train mode.

    Matrices are normal with mean 0 and the standard deviations that ``config.initialization``
    gives (initialization.py), norm weights 1, biases 0. Every parameter has its own random stream,
    given by ``seed`` and its name: the result depends on no global state and changes none. Without
    a seed it differs each time.

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
        values *= np.float32(standard_deviation(config, name, parameter.shape))
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
    return model


def from_pretrained(folder: str | Path, dtype: str = "float32", **overrides: Any) -> Decoder:
    """The model in a local folder, or in the Hugging Face cache. The network is never asked.

    Tensors are read one at a time and converted to ``dtype``.

    Args:
        folder: with config.json and weights in safetensors, PyTorch or SAT format, see
            ``TensorFiles``; or a name such as "bigscience/bloom-560m" that was downloaded to the
            cache, see ``hub_cache``.
        dtype: float32, float16 or bfloat16.
        overrides: fields of ModelConfig that replace those of config.json.

    Returns:
        The model in eval mode.

    Raises:
        UserError: no such folder, an unsupported or contradictory configuration, a corrupt file,
            or tensors that are missing, superfluous or of the wrong shape.
    """
    folder = find_weights(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}; add the one of the model, or make a folder that has "
            "one with: python -m pypkg.convert import SRC DST --config NAME"
        )
    config = load_config(folder).replace(**overrides)
    files = TensorFiles(folder)
    names = weight_map(config).fitted_to(files.shapes())
    # Before the model is made, which takes its whole memory.
    names.check(parameter_shapes(config), files.shapes(), str(folder))
    model = _build(config, dtype)
    for name, parameter in model.named_parameters():
        sources = names.source_shapes(name, parameter.shape)
        parameter.set_value(names.to_model(name, [files.read(source, dtype) for source in sources]))
    model.eval()
    return model


def save_pretrained(
    model: Decoder, folder: str | Path, max_shard_size: int | str = DEFAULT_SHARD_SIZE
) -> None:
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
    dtype = model_dtype(model)
    names = weight_map(model.config)
    parameters = dict(model.named_parameters())
    specs = {
        source: TensorSpec(dtype, shape)
        for name, parameter in parameters.items()
        for source, shape in names.source_shapes(name, parameter.shape).items()
    }
    tensors = (
        item
        for name, parameter in parameters.items()
        for item in names.to_checkpoint(name, parameter.numpy()).items()
    )
    config = config_to_huggingface(model.config, dtype)
    write_model_folder(Path(folder), config, specs, tensors, max_shard_size)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, in its order, without making their values."""
    with paddle.LazyGuard():
        model = Decoder(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


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
