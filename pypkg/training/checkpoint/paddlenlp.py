"""Reads checkpoints of PaddleNLP's trainer. Version 3 writes optimizer state in two formats:

- ``optimizer.pdopt``, a pickle, or one such file per rank
  (``optimizer.tp00_pp01_shard00.pdopt``). The state has Paddle's names of the parameters; the
  weight file of the same rank maps them to the names in the model. With ``split_param``, a file
  holds flat slices of parameters, padded with zeros
  (paddle/distributed/fleet/utils/tensor_fusion_helper.py, ``ShardingGradView``).
- ``optimizer-00001-of-00002.safetensors`` with an index (``unified_checkpoint``): whole parameters
  under names such as ``llama.norm.weight/moment1_0``. Master weights of 16-bit models are in
  ``master_weights-*.safetensors``, under the names of the parameters.

``scheduler.pdparams`` is not read, because the learning rate here is a function of the step.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.files.links import files_named
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import stored_weight_map
from pypkg.models.building import parameter_shapes
from pypkg.models.weights.formats.opening import is_file
from pypkg.models.weights.formats.paddle import PARAMETER_NAMES, read_paddle_object
from pypkg.models.weights.formats.paddle_parts import Rank, join_ranks, part_files, table_shape
from pypkg.models.weights.formats.stored_tensor import (
    JoinedTensor,
    Shape,
    SlicedTensor,
    Slices,
    StoredTensor,
)
from pypkg.models.weights.formats.tensor_files import TensorFiles, read_file_shards
from pypkg.training.state import TrainerState

logger = logging.getLogger("pypkg")

_MASTER_WEIGHT = "master_weight"  # name of the state in this package
_MASTER_WEIGHTS = "master_weights"  # key of a dict in a .pdopt
_UNIFIED, _UNIFIED_MASTER = (
    f"{name}.safetensors.index.json" for name in ("optimizer", "master_weights")
)
_MASTER_FILES = "master_weights-*.safetensors"
_WEIGHTS = "model_state.pdparams"
_OPTIMIZER_FILE = re.compile(r"optimizer(?:\.(?:tp(\d+))?_?(?:pp(\d+))?_?(?:shard(\d+))?)?\.pdopt")
_ACCUMULATOR = re.compile(
    r"(.+?)(?:_fp32_master_0)?_(moment1|moment2|beta1_pow_acc|beta2_pow_acc)_0"
)

# (name of a stored tensor of the model, name of a state tensor in this package)
_Key = tuple[str, str]


def is_trainer_state(content: Any) -> bool:
    """Whether the content of a trainer_state.json is PaddleNLP's."""
    return isinstance(content, dict) and "log_history" in content


def trainer_state(content: Mapping[str, Any], file: Path, seq_length: int) -> TrainerState:
    """The state that PaddleNLP's trainer_state.json describes.

    Args:
        file: for error messages.
        seq_length: tokens of a sample.

    Raises:
        UserError: it lacks the number of steps or samples, or one of them is invalid.
    """

    def counted(key: str) -> int:
        number = content.get(key)
        if type(number) is not int or not 0 <= number < 2**63:
            raise UserError(
                f"{file}: {key} must be a number of at least 0 and at most 2^63 - 1, found "
                f"{number!r}. Resume from another checkpoint, or set ignore_load_lr_and_optim to "
                "take only its weights."
            )
        return number

    samples = counted("consumed_samples")
    return TrainerState(
        global_step=counted("global_step"),
        consumed_samples=samples,
        consumed_tokens=samples * seq_length,
    )


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a folder holds optimizer state of PaddleNLP."""
    if is_file(checkpoint / _UNIFIED):  # this package's index has the same name
        names = read_json(checkpoint / _UNIFIED).get("weight_map")
        return not isinstance(names, dict) or any("/" in name for name in names)
    return bool(_optimizer_files(checkpoint))


class OptimizerState:
    """AdamW's state of whole parameters, in the layout of this package's models.

    The construction reads only the headers of safetensors and the structure of pickles.

    Args:
        checkpoint: a folder for which ``has_optimizer`` is true.
        config: of the model.

    Raises:
        UserError: files are missing, damaged, or do not belong together.
    """

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        self._checkpoint = checkpoint
        self._weights = TensorFiles(checkpoint)
        self._shapes = parameter_shapes(config)
        self._is_tied = config.tie_word_embeddings
        self._map = stored_weight_map(config, self._weights.shapes())
        is_unified = is_file(checkpoint / _UNIFIED)
        self._tensors = _unified(checkpoint) if is_unified else self._of_ranks()
        self._has_master = any(state == _MASTER_WEIGHT for _, state in self._tensors)
        self._master_read = False

    def read(self, key: str, cut: Sequence[slice] = ()) -> np.ndarray:
        """A state tensor or a part of it, float32, in the model's layout.

        For master weights of a float32 run, it reads the weights.

        Args:
            key: ``<parameter>.<state name>``.
            cut: slices of the axes, from the first on; only the selected elements are read.

        Raises:
            UserError: the state is missing, has another shape, or holds NaN or infinity.
        """
        values = self._values(key, cut)
        if values.size and not np.isfinite([values.min(), values.max()]).all():
            raise UserError(
                f"{self._checkpoint}: {key} holds values that are NaN or infinite. Resume from an "
                "older checkpoint, or set ignore_load_lr_and_optim to take only the weights."
            )
        return values

    def _values(self, key: str, cut: Sequence[slice]) -> np.ndarray:
        """``read`` without the check of the values."""
        parameter, _, state = key.rpartition(".")
        sources = self._map.source_shapes(parameter, self._shapes[parameter])
        self._master_read |= state == _MASTER_WEIGHT
        if state == _MASTER_WEIGHT and not self._has_master:
            return self._read(parameter, cut, self._weights.read)
        stored = {source: self._find(parameter, source, state) for source in sources}
        if state.endswith("_pow_acc"):
            (source, tensor), *_ = stored.items()
            if math.prod(tensor.shape) != 1:
                raise self._of_another_shape(state, source, tensor, (1,))
            return tensor.read(source, "float32").reshape(1)
        for source, shape in sources.items():
            if stored[source].shape != shape:
                raise self._of_another_shape(state, source, stored[source], shape)
        return self._read(
            parameter, cut, lambda source, dtype, of: stored[source].read(source, dtype, of)
        )

    def _of_another_shape(
        self, state: str, source: str, found: JoinedTensor, expected: Shape
    ) -> UserError:
        return UserError(
            f"{self._checkpoint}: {state} of {source} has shape {list(found.shape)}, expected "
            f"{list(expected)}; it is of another model. Set ignore_load_lr_and_optim to take only "
            "the weights."
        )

    def _read(
        self, parameter: str, cut: Sequence[slice], read: Callable[[str, str, Slices], np.ndarray]
    ) -> np.ndarray:
        shape = self._shapes[parameter]
        if not cut:
            sources = self._map.source_shapes(parameter, shape)
            return self._map.to_model(parameter, [read(each, "float32", ()) for each in sources])
        return self._map.read_slices(
            parameter, shape, cut, lambda source, of: read(source, "float32", of)
        )

    def log_unread(self) -> None:
        """Logs a warning if master weights were not read because the resumed run is in float32."""
        if self._has_master and not self._master_read:
            logger.warning(
                "%s holds float32 master weights of a run in 16 bits; this run is in float32 and "
                "starts from the 16-bit weights",
                self._checkpoint,
            )

    def _find(self, parameter: str, source: str, state: str) -> JoinedTensor:
        # A tied head is the embedding under a second name; its state has one of the two names.
        is_tied = self._is_tied and parameter == "embed_tokens.weight"
        for name in (source, "lm_head.weight") if is_tied else (source,):
            if (name, state) in self._tensors:
                return self._tensors[name, state]
        raise UserError(
            f"{self._checkpoint} holds no {state} of {source}: its optimizer state is of another "
            "model or not complete. Set ignore_load_lr_and_optim to take only the weights."
        )

    def _of_ranks(self) -> dict[_Key, JoinedTensor]:
        """The state in the .pdopt files of all ranks, joined to whole tensors."""
        weight_files = part_files(self._checkpoint) or {(0, 0): self._checkpoint / _WEIGHTS}
        files: dict[Rank, list[Path]] = {rank: [] for rank in weight_files}
        for path, rank in _optimizer_files(self._checkpoint):
            if rank not in weight_files:
                raise UserError(f"{path} has no file of weights of the same rank beside it")
            files[rank].append(path)
        held = {rank: _of_rank(files[rank], weight_files[rank]) for rank in weight_files}
        shapes = self._weights.shapes()
        table = table_shape(shapes)
        whole: dict[_Key, JoinedTensor] = {}
        for stage in {pp for _, pp in held}:
            ranks = [held[rank] for rank in sorted(held) if rank[1] == stage]
            for name, state in ranks[0]:
                shards = [rank[name, state] for rank in ranks if (name, state) in rank]
                expected = shapes.get(name)
                if state.endswith("_pow_acc"):
                    expected = shards[0].shape
                whole[name, state] = join_ranks(name, shards, expected, table)
        return whole


def _optimizer_files(checkpoint: Path) -> list[tuple[Path, Rank]]:
    """The .pdopt files with their (TP rank, stage), in the order of sharding ranks."""
    found = []
    for path in checkpoint.iterdir():
        if match := _OPTIMIZER_FILE.fullmatch(path.name):
            tp, pp, shard = (int(number or 0) for number in match.groups())
            found.append((shard, path, (tp, pp)))
    return [(path, rank) for _, path, rank in sorted(found)]


def _of_rank(paths: Iterable[Path], weights: Path) -> dict[_Key, StoredTensor | SlicedTensor]:
    """The state of one tensor-parallel rank of one pipeline stage, by names in the model.

    Args:
        paths: the .pdopt files of the rank, in the order of sharding ranks.
        weights: the weight file of the rank, which has the names and shapes.
    """
    held = read_paddle_object(weights) if weights.is_file() else {}
    names: dict[str, list[str]] = {}  # Paddle's name -> names in the model, two for a tied head
    for name, of_paddle in _dict_of(held, PARAMETER_NAMES).items():
        names.setdefault(str(of_paddle), []).append(name)
    found: dict[_Key, list[StoredTensor]] = {}
    for path in paths:
        if not names:
            raise UserError(
                f"{path} uses Paddle's names of the parameters, and {weights} does not map them to "
                "names in the model. Save with unified_checkpoint, or set "
                "ignore_load_lr_and_optim to take only the weights."
            )
        for (of_paddle, state), value in _accumulators(read_paddle_object(path)):
            for name in names.get(of_paddle, ()):
                found.setdefault((name, state), []).append(value)
    return {key: _unsliced(key, values, held.get(key[0])) for key, values in found.items()}


def _unsliced(key: _Key, values: list[StoredTensor], parameter: Any) -> StoredTensor | SlicedTensor:
    """The state ``key`` of ``parameter``, joined if each sharding rank holds a flat slice."""
    name, state = key
    if state.endswith("_pow_acc") or not isinstance(parameter, StoredTensor):
        return values[-1]
    shape = parameter.shape
    _check_equal(key, [value for value in values if value.shape == shape])
    if values[-1].shape == shape or any(len(value.shape) != 1 for value in values):
        return values[-1]
    length = sum(value.shape[0] for value in values)
    if length < math.prod(shape):
        raise UserError(
            f"{values[0].file}: {state} of {name} has shape {[length]}, expected {list(shape)}. "
            "Sharding stage 1 with split_param writes slices of parameters, and the file of a "
            "sharding rank is missing. Set ignore_load_lr_and_optim to take only the weights."
        )
    return SlicedTensor.of(values, shape)


def _check_equal(key: _Key, whole: Sequence[StoredTensor]) -> None:
    """Raises UserError if the files of several ranks hold different states of one parameter."""
    name, state = key
    for value in whole[1:]:
        first, other = (JoinedTensor((each,)).read(name, "float32") for each in (whole[0], value))
        if not np.array_equal(first, other, equal_nan=True):
            raise UserError(
                f"{whole[0].file} and {value.file} hold different {state} of {name}: one of them "
                "is left from another save. Move it away."
            )


def _dict_of(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _accumulators(content: Mapping[str, Any]) -> Iterable[tuple[_Key, StoredTensor]]:
    for name, value in content.items():
        if isinstance(value, StoredTensor) and (match := _ACCUMULATOR.fullmatch(name)):
            yield (match.group(1), match.group(2)), value
    for name, value in _dict_of(content, _MASTER_WEIGHTS).items():
        if isinstance(value, StoredTensor):
            yield (name, _MASTER_WEIGHT), value


def _unified(checkpoint: Path) -> dict[_Key, JoinedTensor]:
    found: dict[_Key, JoinedTensor] = {}
    for name, tensor in read_file_shards(checkpoint / _UNIFIED).items():
        parameter, _, state = name.rpartition("/")
        found[parameter, state.removesuffix("_0")] = JoinedTensor((tensor,))
    if is_file(checkpoint / _UNIFIED_MASTER):
        for name, tensor in read_file_shards(checkpoint / _UNIFIED_MASTER).items():
            found[name, _MASTER_WEIGHT] = JoinedTensor((tensor,))
    elif files := files_named(checkpoint, [_MASTER_FILES]):
        raise UserError(f"{files[0]} is there, but {_UNIFIED_MASTER}, which lists it, is missing")
    return found
