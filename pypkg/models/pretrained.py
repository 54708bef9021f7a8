"""Models with random weights, from a Hugging Face folder, and to one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import paddle

from pypkg import progress
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import (
    config_to_huggingface,
    load_config,
    stored_weight_map,
    weight_map,
)
from pypkg.models.architecture.weight_map import WeightMap
from pypkg.models.decoder import Decoder
from pypkg.models.pipeline_decoder import PipelineDecoder
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.initialization import standard_deviation
from pypkg.models.weights.model_folder import CONFIG_FILE, DEFAULT_SHARD_SIZE, write_model_folder
from pypkg.models.weights.tied_head import as_stored
from pypkg.models.weights.tp_shards import tensor_parallel_problems, tp_shard, whole_shape
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.host import to_host
from pypkg.parallel.pipeline import pipeline_degree
from pypkg.parallel.tp_layers import gather_from_tensor_group, tensor_degree, tensor_rank

DTYPES = ("float32", "float16", "bfloat16")


Model = Decoder | PipelineDecoder


def from_config(config: ModelConfig, dtype: str = "float32", seed: int | None = None) -> Model:
    """A model with random weights, in train mode.

    Matrices are normal with mean 0 and the standard deviations that ``config.initialization``
    gives (initialization.py), norm weights 1, biases 0. Every parameter has its own random stream,
    given by ``seed`` and its name: the result depends on no global state and changes none. Without
    a seed it differs each time.

    Under tensor parallelism each rank draws the same whole matrices, one at a time, and keeps its
    TP shard; under pipeline parallelism it draws those of its stage alone. So the model does not
    depend on the degrees. All ranks need the same seed.

    Raises:
        UserError: ``dtype`` is not float32, float16 or bfloat16, the model cannot be divided over
            the processes, or they have no seed.
    """
    if seed is None and (tensor_degree() > 1 or pipeline_degree() > 1):
        raise UserError("seed is None, but processes that divide a model need the same; give one")
    model = _build(config, dtype)
    entropy = cast(int, np.random.SeedSequence(seed).entropy)  # the seed, or one of the system
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # norm weights and biases keep the value that they were made with
        progress.report(f"drawing {name}")
        generator = np.random.default_rng([entropy, zlib.crc32(name.encode())])
        shape = whole_shape(config, name, parameter.shape, tensor_degree())
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(standard_deviation(config, name, shape))
        if shard := tp_shard(config, name, tensor_degree(), tensor_rank()):
            values = shard.take(values)
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
    return model


def from_pretrained(
    folder: str | Path,
    dtype: str = "float32",
    *,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
    **overrides: Any,
) -> Model:
    """The model in a local folder, or in the Hugging Face cache.

    Tensors are read one at a time and converted to ``dtype``; under pipeline parallelism, only
    those of this stage, and under tensor parallelism, only what this process holds of each.

    Args:
        folder: with config.json and weights, of a Hugging Face folder or of PaddleNLP, in a format
            of ``TensorFiles``; or a name such as "bigscience/bloom-560m" in the cache, see
            ``hub.find_weights``.
        dtype: float32, float16 or bfloat16.
        download: fetch what the cache lacks; otherwise the network is never used.
        allow_unknown_config: keys of config.json that are ignored if the family does not know them.
        overrides: fields of ModelConfig that replace those of config.json.

    Returns:
        The model in eval mode.

    Raises:
        UserError: no such folder, an unsupported or contradictory configuration, a corrupt file,
            tensors that are missing, superfluous or of the wrong shape, or a model that cannot be
            divided over the processes.
    """
    folder = find_weights(folder, download)
    config = stored_config(folder, allow_unknown_config).replace(**overrides)
    read = weight_reader(folder, config, dtype)  # before the model, which takes its whole memory
    model = _build(config, dtype)
    for name, parameter in model.named_parameters():
        progress.report(f"reading {name}")
        parameter.set_value(read(name, parameter.shape))
    model.eval()
    return model


def weight_reader(
    folder: Path, config: ModelConfig, dtype: str
) -> Callable[[str, Sequence[int]], np.ndarray]:
    """A function that reads what this process holds of a parameter.

    Args:
        folder: as for ``from_pretrained``.
        config: of the model that takes the weights.

    Returns:
        The function, of a parameter's name and of the shape of this process's part.

    Raises:
        UserError: tensors are missing, superfluous or of the wrong shape, or a file is corrupt.
    """
    files = TensorFiles(folder)
    names = stored_weight_map(config, files.shapes())
    names.check(parameter_shapes(config), files.shapes(), str(folder))
    return lambda name, shape: _read(files, names, config, name, list(shape), dtype)


def stored_config(folder: Path, allow_unknown_config: Collection[str] = ()) -> ModelConfig:
    """The configuration of the weights in ``folder``.

    It is that of config.json, but untied where the weights hold a head that is not the embedding.

    Raises:
        UserError: as for ``from_pretrained``.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}; add the one of the model, or make a folder that has "
            "one with: python -m pypkg.convert import SRC DST --config NAME"
        )
    return as_stored(load_config(folder, allow_unknown_config), TensorFiles(folder), folder)


def _read(
    files: TensorFiles,
    names: WeightMap,
    config: ModelConfig,
    name: str,
    own_shape: list[int],
    dtype: str,
) -> np.ndarray:
    """What this process holds of the parameter ``name``."""
    shard = tp_shard(config, name, tensor_degree(), tensor_rank())
    if shard is None:
        sources = names.source_shapes(name, own_shape)
        return names.to_model(name, [files.read(source, dtype) for source in sources])
    shape = whole_shape(config, name, own_shape, tensor_degree())
    values = names.read_ranges(
        name, shape, shard.axis, shard.ranges, lambda source, cut: files.read(source, dtype, cut)
    )
    return shard.padded(values)


def save_pretrained(
    model: Model, folder: str | Path, max_shard_size: int | str = DEFAULT_SHARD_SIZE
) -> None:
    """Writes a Hugging Face folder: config.json and safetensors, sharded if larger than a shard.

    Every file is written under a temporary name, and renamed when all are complete; weight files
    of an earlier save that are no longer part of the model are removed then. Other files of the
    folder stay. One parameter at a time is in host memory.

    All processes call it, and the first writes the files, which are the same as those of one
    process.

    Args:
        max_shard_size: bytes, or a number with a unit such as "500MB" or "5GB".

    Raises:
        UserError: the folder cannot be written to, the disk is full, or ``max_shard_size`` makes
            no sense.
    """
    dtype = model_dtype(model)
    names = weight_map(model.config)
    wholes = gathered(model.config, dict(model.named_parameters()))
    if mesh.current().rank > 0:
        for _ in wholes:
            pass
        return
    specs = {
        source: TensorSpec(dtype, shape)
        for name, whole in parameter_shapes(model.config).items()
        for source, shape in names.source_shapes(name, whole).items()
    }
    tensors = (item for name, whole in wholes for item in names.to_checkpoint(name, whole).items())
    config = config_to_huggingface(model.config, dtype)
    try:
        write_model_folder(Path(folder), config, specs, tensors, max_shard_size)
    finally:
        for _ in wholes:  # the others hand theirs over, even if this process could not write
            pass


def gathered(
    config: ModelConfig, tensors: Mapping[str, paddle.Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Whole parameters, or their gradients, in the order of the model, one at a time.

    All processes have to go through it; see ``gather.over_stages`` for what each gets of it.

    Args:
        tensors: those of this process, by the name of the parameter.
    """
    names = list(tensors) if pipeline_degree() == 1 else list(parameter_shapes(config))
    return gather.over_stages(
        names, tensors, lambda name: whole_value(config, name, gather.unsliced(tensors[name]))
    )


def whole_value(config: ModelConfig, name: str, shard: paddle.Tensor) -> np.ndarray:
    """The whole tensor of the shape of the parameter ``name``, gathered over the tensor group.

    Args:
        shard: this rank's TP shard of the parameter, its gradient or its optimizer state.
    """
    degree = tensor_degree()
    if tp_shard(config, name, degree, 0) is None:
        return to_host(shard)
    values = [to_host(value) for value in gather_from_tensor_group(shard)]
    whole = np.empty(whole_shape(config, name, shard.shape, degree), values[0].dtype)
    for rank, value in enumerate(values):
        held = tp_shard(config, name, degree, rank)
        assert held is not None  # as on the first rank
        held.put(value, whole)
    return whole


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, in its order, without making their values.

    Shapes are those of the whole parameters, whatever a process holds of them.
    """
    _check_divisible(config)
    # Paddle's names stay free: fleet orders gradients by them, so parameters made later have to get
    # the same ones in every process, whether or not it has called this.
    with paddle.LazyGuard(), paddle.utils.unique_name.guard():
        model = Decoder(config)
    return {
        name: whole_shape(config, name, parameter.shape, tensor_degree())
        for name, parameter in model.named_parameters()
    }


def model_dtype(model: Model) -> str:
    """float32, float16 or bfloat16."""
    return str(model.parameters()[0].dtype).removeprefix("paddle.")


def _build(config: ModelConfig, dtype: str) -> Model:
    """A model of ``dtype``, or this process's stage of it, whose matrices are zero."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    _check_divisible(config)
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(getattr(paddle, dtype))
    try:
        return Decoder(config) if pipeline_degree() == 1 else PipelineDecoder(config)
    finally:
        paddle.set_default_dtype(before)


def _check_divisible(config: ModelConfig) -> None:
    if problems := tensor_parallel_problems(config, tensor_degree()):
        raise UserError("\n".join(problems))
