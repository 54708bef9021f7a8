"""Models with random weights, from a Hugging Face folder, and to one."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import numpy as np
import paddle

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
from pypkg.models.weights.model_folder import (
    CONFIG_FILE,
    DEFAULT_SHARD_SIZE,
    MODEL_STEM,
    cannot_save,
    parse_size,
    publish_model,
    write_json,
)
from pypkg.models.weights.save_plan import SavePlan, TensorSet, Unit
from pypkg.models.weights.tensor_writer import FileToWrite, ThreadWriter
from pypkg.models.weights.tied_head import as_stored
from pypkg.models.weights.tp_shards import tensor_parallel_problems, tp_shard, whole_shape
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank
from pypkg.parallel.host import to_host
from pypkg.parallel.pipeline import pipeline_degree
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank

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
    files = TensorFiles(folder)
    names = stored_weight_map(config, files.shapes())
    # Before the model is made, which takes its whole memory.
    names.check(parameter_shapes(config), files.shapes(), str(folder))
    model = _build(config, dtype)
    for name, parameter in model.named_parameters():
        parameter.set_value(_read(files, names, config, name, parameter.shape, dtype))
    model.eval()
    return model


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
    folder stay.

    All processes call it and see the same ``folder``. Each writes a part of the parameters, to
    files of its own. The tensors are those that one process writes.

    Args:
        max_shard_size: bytes, or a number with a unit such as "500MB" or "5GB".

    Raises:
        UserError: the folder cannot be written to, the disk is full, ``max_shard_size`` makes no
            sense, or a parameter holds NaN or infinity. Raised on all processes.
    """
    folder = Path(folder)
    rank = mesh.current().rank
    plan = SavePlan([model_tensors(model, parse_size(max_shard_size))])
    run = from_first_rank(lambda: _begin_folder(folder))
    written = {file.name: folder / f".{file.name}.{run}.tmp" for file in plan.files}
    writer = ThreadWriter(
        [
            FileToWrite(written[file.name], file.specs, file.must_be_finite)
            for file in plan.files_of(rank)
        ]
    )

    def finish_files() -> None:
        try:
            writer.records()
        except OSError as error:
            raise cannot_save(folder, error) from error

    def publish() -> None:
        documents = {CONFIG_FILE: model_config_json(model), **plan.indices()}
        try:
            for name, content in sorted(documents.items(), reverse=True):
                written[name] = folder / f".{name}.{run}.tmp"
                write_json(written[name], content)
            publish_model(folder, written)
        except OSError as error:
            raise cannot_save(folder, error) from error

    try:
        for name, values in plan.tensors_of(rank):
            writer.put(name, values)
        from_all_ranks(finish_files)
        from_first_rank(publish)
    finally:
        writer.abandon()
        for path in written.values():
            path.unlink(missing_ok=True)


def _begin_folder(folder: Path) -> int:
    """Makes the folder; returns a number for the temporary names of this save."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_save(folder, error) from error
    return os.getpid()


def model_tensors(model: Model, max_file_size: int | None = None) -> TensorSet:
    """The parameters of a model as a Hugging Face folder holds them; all ranks have to call this.

    Args:
        max_file_size: bytes; None: one file for each rank.
    """
    config, dtype = model.config, model_dtype(model)
    names, shapes = weight_map(config), parameter_shapes(config)
    held = dict(model.named_parameters())
    places = gather.places(shapes, dict.fromkeys(held))
    units = [
        Unit(
            name,
            {
                source: TensorSpec(dtype, shape)
                for source, shape in names.source_shapes(name, shapes[name]).items()
            },
            gather.possible_writers(place),
        )
        for name, place in places.items()
    ]

    def read(name: str, writer: int) -> np.ndarray | None:
        if not gather.takes_part(places[name], writer):
            return None
        return whole_parameter(config, name, held[name], writer)

    return TensorSet(
        MODEL_STEM, units, read, names.to_checkpoint, max_file_size, must_be_finite=True
    )


def model_config_json(model: Model) -> dict[str, Any]:
    """The keys of config.json."""
    return config_to_huggingface(model.config, model_dtype(model))


def whole_parameter(
    config: ModelConfig, name: str, tensor: paddle.Tensor, writer: int
) -> np.ndarray | None:
    """A parameter, or its gradient, on the rank ``writer``; None on the others.

    All ranks that ``gather.takes_part`` names have to call this.

    Args:
        tensor: this rank's TP shard; of a parameter, ZeRO stage 3 may have sliced it.
    """
    sliced = gather.is_sliced(tensor)
    part = gather.for_tensor_group(
        tensor.fw_storage if sliced else tensor, tensor if sliced else None, writer
    )
    return None if part is None else whole_value(config, name, part, writer)


def whole_value(
    config: ModelConfig, name: str, shard: paddle.Tensor, writer: int
) -> np.ndarray | None:
    """The whole tensor of the shape of the parameter ``name``, on the rank ``writer``.

    The ranks of its tensor group have to call this; the others get None.

    Args:
        shard: this rank's TP shard of the parameter, its gradient or its optimizer state.
    """
    current, member = mesh.current(), mesh.current().coordinates(writer).tensor
    if tp_shard(config, name, current.tensor_degree, 0) is None:
        return to_host(shard) if current.tensor_rank == member else None
    whole = None
    for rank, part in enumerate(gather.at_member(shard, current.tensor, member)):
        values = to_host(part)
        if whole is None:
            shape = whole_shape(config, name, shard.shape, current.tensor_degree)
            whole = np.empty(shape, values.dtype)
        held = tp_shard(config, name, current.tensor_degree, rank)
        assert held is not None  # as on the first rank
        held.put(values, whole)
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
