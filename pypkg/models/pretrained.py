"""Creates models with random weights, and loads and saves Hugging Face folders."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from pypkg.console import progress
from pypkg.errors import UserError
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import (
    config_to_huggingface,
    load_config,
    stored_weight_map,
    weight_map,
)
from pypkg.models.architecture.weight_map import WeightMap
from pypkg.models.building import Model, build_filled, parameter_shapes
from pypkg.models.division import division
from pypkg.models.weights.assembly import Division
from pypkg.models.weights.formats.safetensors import TensorSpec
from pypkg.models.weights.formats.tensor_files import TensorFiles
from pypkg.models.weights.hub import find_weights
from pypkg.models.weights.initialization import fill_random
from pypkg.models.weights.missing_head import stored_parameters
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
from pypkg.models.weights.tp_shards import tp_shard, whole_shape
from pypkg.parallel import mesh
from pypkg.parallel.comm import gather
from pypkg.parallel.comm.collective import from_all_ranks, from_first_rank
from pypkg.parallel.comm.slices import ReadParameter, read_elements
from pypkg.parallel.host_memory import to_host
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


def from_config(config: ModelConfig, dtype: str = "float32", seed: int | None = None) -> Model:
    """A model with random weights, in train mode.

    Matrices are normal with mean 0 and the standard deviation of ``config.initialization``
    (initialization.py); norm weights are 1 and biases 0. An element depends only on ``seed``, the
    name of its parameter and its index in the whole parameter. The weights are therefore the same
    under every parallel layout, and each rank computes only its part. No global random state is
    used.

    Args:
        dtype: float32, float16 or bfloat16.
        seed: the same on all ranks. None: a random seed; only in a run of one process.

    Raises:
        UserError: ``dtype`` is not one of these, the model cannot be divided over the ranks, or
            ``seed`` is None in a run of several processes.
    """
    return build_filled(config, dtype, random_weights(config, seed))


def random_weights(config: ModelConfig, seed: int | None = None) -> ReadParameter:
    """The weights of ``from_config``, as a function that fills one parameter at a time.

    Arguments and errors are those of ``from_config``.
    """
    if seed is None and mesh.current().world_size > 1:
        raise UserError(
            "seed is None, but all ranks that hold parts of a model need the same seed; give one"
        )
    known_seed = secrets.randbits(64) if seed is None else seed

    def read(
        name: str, shape: Sequence[int], out: Tensor, elements: tuple[int, int] | None = None
    ) -> None:
        if len(shape) > 1:  # norm weights and biases keep their initial value
            _draw(out, config, name, shape, known_seed, elements)

    return read


def _draw(
    out: Tensor,
    config: ModelConfig,
    name: str,
    own_shape: Sequence[int],
    seed: int,
    elements: tuple[int, int] | None,
) -> None:
    """Overwrites ``out`` with random initial values of the matrix ``name``; see ReadParameter."""
    progress.report(f"drawing {name}")
    degree, rank = tensor_degree(), tensor_rank()
    start = elements[0] if elements else 0
    fill_random(out, config, name, seed, own_shape, degree=degree, rank=rank, start=start)


def from_pretrained(
    folder: str | Path,
    dtype: str = "float32",
    *,
    seed: int = 0,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
    **overrides: Any,
) -> Model:
    """Loads the model in a local folder or in the Hugging Face cache.

    Tensors are read one at a time and converted to ``dtype``. A rank reads only the tensors of its
    pipeline stage, and of each tensor only its TP shard.

    Args:
        folder: path of a folder with config.json and weights in a format of ``TensorFiles``, of
            Hugging Face or PaddleNLP; or a name such as "bigscience/bloom-560m" in the cache, see
            ``hub.find_weights``.
        dtype: float32, float16 or bfloat16.
        seed: for a head that the weights do not contain, such as those of a ``LlamaModel``. It is
            initialized as in ``from_config``, and a warning is logged.
        download: whether to download files that the cache lacks; False: the network is not used.
        allow_unknown_config: unknown keys of config.json to ignore instead of raising an error.
        overrides: fields of ModelConfig that replace those of config.json.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: the folder does not exist; the configuration is unsupported or contradictory; a
            file is corrupt; tensors are missing, superfluous or have the wrong shape; or the model
            cannot be divided over the processes.
    """
    options: dict[str, Any] = {"seed": seed, "download": download, **overrides}
    config, read = stored_weights(
        folder, dtype, allow_unknown_config=allow_unknown_config, **options
    )
    model = build_filled(config, dtype, read)
    model.eval()
    return model


def stored_weights(
    folder: str | Path,
    dtype: str = "float32",
    *,
    seed: int = 0,
    download: bool = False,
    allow_unknown_config: Collection[str] = (),
    **overrides: Any,
) -> tuple[ModelConfig, ReadParameter]:
    """The configuration of ``from_pretrained``, and a function that reads one parameter at a time.

    Arguments and errors are those of ``from_pretrained``.
    """
    folder = find_weights(folder, download)
    config = stored_config(folder, allow_unknown_config).replace(**overrides)
    return config, weight_reader(folder, config, dtype, seed)


def weight_reader(folder: Path, config: ModelConfig, dtype: str, seed: int = 0) -> ReadParameter:
    """A function that reads this rank's part of a parameter.

    Args:
        folder: with weights, as in ``from_pretrained``.
        config: of the model to fill.
        dtype: float32, float16 or bfloat16.
        seed: as in ``from_pretrained``.

    Raises:
        UserError: tensors are missing, superfluous or of the wrong shape, or a file is corrupt.
    """
    files = TensorFiles(folder)
    names = stored_weight_map(config, files.shapes())
    needed = stored_parameters(folder, names, parameter_shapes(config), files.shapes())
    names.check(needed, files.shapes(), files.where)

    def read(
        name: str, shape: Sequence[int], out: Tensor, elements: tuple[int, int] | None = None
    ) -> None:
        if name not in needed:
            _draw(out, config, name, shape, seed, elements)
            return
        progress.report(f"reading {name}")
        out.set_value(_read(files, names, config, name, list(shape), dtype, elements))

    return read


def stored_config(folder: Path, allow_unknown_config: Collection[str] = ()) -> ModelConfig:
    """The configuration of the model in ``folder``: that of config.json.

    The head counts as untied if the weights contain a head that differs from the embedding.

    Raises:
        UserError: as in ``from_pretrained``.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} has no {CONFIG_FILE}; add the one of the model, or create a folder that has "
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
    elements: tuple[int, int] | None,
) -> np.ndarray:
    """The values for ``ReadParameter``. Only the bytes of the rows that are needed are read."""
    shard = tp_shard(config, name, tensor_degree(), tensor_rank())
    if shard is None and elements is None:
        sources = names.source_shapes(name, own_shape)
        return names.to_model(name, [files.read(source, dtype) for source in sources])
    whole = whole_shape(config, name, own_shape, tensor_degree())

    def read_cut(cut: Sequence[slice]) -> np.ndarray:
        return names.read_slices(
            name, whole, cut, lambda source, stored: files.read(source, dtype, stored)
        )

    def read_rows(rows: tuple[int, int] | None) -> np.ndarray:
        if shard is not None:
            return shard.read(read_cut, rows)
        return read_cut(() if rows is None else (slice(*rows),))

    return read_rows(None) if elements is None else read_elements(read_rows, own_shape, elements)


def save_pretrained(
    model: Model, folder: str | Path, max_shard_size: int | str = DEFAULT_SHARD_SIZE
) -> None:
    """Writes a Hugging Face folder: config.json and one or more safetensors files.

    Files have temporary names until all are complete. Then they are renamed, and weight files of
    an earlier save that do not belong to the model are removed. Other files are not changed.

    Every rank must call this and see the same ``folder``. Each rank writes some of the parameters,
    to its own files. The tensors are the same under every parallel layout.

    Args:
        model: the model, or this rank's part of it.
        folder: created if missing.
        max_shard_size: largest size of a weight file, in bytes or with a unit ("500MB", "5GB").

    Raises:
        UserError: on every rank, if the folder cannot be written, the disk is full,
            ``max_shard_size`` is not a size, or a parameter holds NaN or infinity.
    """
    folder, rank = Path(folder), mesh.current().rank
    plan = SavePlan([model_tensors(model, parse_size(max_shard_size))])
    run = from_first_rank(lambda: _begin_folder(folder))
    written = {file.name: folder / f".{file.name}.{run}.tmp" for file in plan.files}
    own, units = plan.files_of(rank), plan.units()
    writer = ThreadWriter(
        [FileToWrite(written[file.name], file.specs) for file in own],
        [unit for unit in units if unit.writer == rank],
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
        for unit, part in plan.parts_of(rank, units):
            writer.put(unit, part)
        from_all_ranks(finish_files)
        from_first_rank(publish)
    finally:
        writer.abandon()
        for path in written.values():
            path.unlink(missing_ok=True)


def _begin_folder(folder: Path) -> int:
    """Creates the folder; returns a number for the temporary file names of this save."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_save(folder, error) from error
    return os.getpid()


def model_tensors(model: Model, max_file_size: int | None = None) -> TensorSet:
    """The parameters of a model as the tensors of a Hugging Face folder.

    Every rank must call this.

    Args:
        max_file_size: largest size of a file in bytes; None: one file for each rank.
    """
    config, dtype = model.config, model_dtype(model)
    names, shapes = weight_map(config), parameter_shapes(config)
    held = dict(model.named_parameters())
    places = gather.places(shapes, dict.fromkeys(held))

    def part(name: str) -> np.ndarray:
        tensor = held[name]
        return to_host(tensor.fw_storage if gather.is_sliced(tensor) else tensor)

    def unit(name: str, found: Sequence[gather.Place]) -> Unit:
        shape = shapes[name]
        specs = {
            source: TensorSpec(dtype, stored)
            for source, stored in names.source_shapes(name, shape).items()
        }
        of_rank = _division(config, name, held[name]) if name in held else None
        ranks, *copies = map(gather.possible_writers, found)
        return Unit(name, shape, specs, ranks, of_rank, copies)

    def read(name: str, writer: int) -> np.ndarray | None:
        if not gather.takes_part(writer):
            return None
        return whole_parameter(config, name, held[name], writer)

    units = [unit(name, found) for name, found in places.items()]
    return TensorSet(MODEL_STEM, units, read, names.to_checkpoint, max_file_size, part)


def _division(config: ModelConfig, name: str, tensor: paddle.Tensor) -> Division | None:
    is_sliced = gather.is_sliced(tensor)
    held = tensor.fw_storage if is_sliced else tensor
    return division(config, name, tensor.shape, held.size * held.element_size(), is_sliced)


def model_config_json(model: Model) -> dict[str, Any]:
    """The content of config.json for ``model``."""
    return config_to_huggingface(model.config, model_dtype(model))


def whole_parameter(
    config: ModelConfig, name: str, tensor: paddle.Tensor, writer: int
) -> np.ndarray | None:
    """The whole parameter ``name``, or its gradient, on the rank ``writer``; None on the others.

    All ranks with ``gather.takes_part(writer)`` must call this.

    Args:
        tensor: this rank's TP shard, or in ZeRO stage 3 a parameter that holds a slice of it.
    """
    sliced = gather.is_sliced(tensor)
    part = gather.for_tensor_group(
        tensor.fw_storage if sliced else tensor, tensor if sliced else None, writer
    )
    return None if part is None else whole_value(config, name, part, writer)


def whole_value(
    config: ModelConfig, name: str, shard: paddle.Tensor, writer: int
) -> np.ndarray | None:
    """The whole tensor in the shape of the parameter ``name`` on the rank ``writer``.

    The ranks of the writer's tensor group must call this; the other ranks get None.

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


def model_dtype(model: Model) -> str:
    """The dtype of the parameters: float32, float16 or bfloat16."""
    return str(model.parameters()[0].dtype).removeprefix("paddle.")
