"""The tensors of a folder in any supported format, read one at a time, whole or in slices.

Arrays are NumPy arrays; bfloat16 is stored as its bits in uint16, as in Paddle. Nothing here
imports Paddle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pypkg.errors import UserError
from pypkg.files.json_files import read_json
from pypkg.models.weights.formats.opening import is_file
from pypkg.models.weights.formats.paddle import read_paddle_file
from pypkg.models.weights.formats.paddle_parts import merge_parts, part_files
from pypkg.models.weights.formats.safetensors import TensorSpec, read_safetensors
from pypkg.models.weights.formats.sat import merge_ranks, sat_files
from pypkg.models.weights.formats.stored_tensor import JoinedTensor, Shape, Slices, StoredTensor
from pypkg.models.weights.formats.torch import read_torch_file

logger = logging.getLogger("pypkg.models")
_Reader = Callable[[Path], dict[str, StoredTensor]]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# File names of Hugging Face and PaddleNLP, in the order in which they are tried.
_SINGLE_AND_INDEX: tuple[tuple[str, str, _Reader], ...] = (
    (SINGLE_FILE, INDEX_FILE, read_safetensors),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", read_torch_file),
    ("model_state.pdparams", "model_state.pdparams.index.json", read_paddle_file),
)
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# PyTorch files that trainers write beside the weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


class TensorFiles:
    """The tensors of a folder.

    The first of these that exists is read: ``model.safetensors``; the file shards that
    ``model.safetensors.index.json`` lists; ``pytorch_model.bin``; the file shards that its index
    lists; ``model_state.pdparams``; the file shards that its index lists; PaddleNLP's files of
    tensor-parallel and pipeline ranks; the rank files of SAT; the only .bin, .pt or .pth file.

    Attributes:
        files: paths of the files that hold the tensors.
        where: the folder, and its files if there are several, for messages.

    Raises:
        UserError: there are no such files, or one is corrupt, truncated or missing. The message
            names it.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors = _find(folder)
        self.files = sorted(
            {shard.file for each in self._tensors.values() for shard in each.shards}
        )
        self.where = str(folder)
        if len(self.files) > 1:
            first, *_, last = (file.name for file in self.files)
            self.where += f" ({len(self.files)} files, {first} to {last})"

    def specs(self) -> dict[str, TensorSpec]:
        """Stored dtype and shape of every tensor by name."""
        return {
            name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()
        }

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: str, slices: Slices = ()) -> np.ndarray:
        """The tensor ``name``, or a slice of it, converted to ``dtype``.

        Args:
            dtype: float32, float16, bfloat16 or float64.
            slices: one per axis, without steps; missing slices at the end select whole axes. Other
                bytes are not read.
        """
        return self._tensors[name].read(name, dtype, slices)


def _find(folder: Path) -> dict[str, JoinedTensor]:
    _log_others(folder)
    for single, index, read_file in _SINGLE_AND_INDEX:
        if is_file(folder / single):
            return _each_alone(read_file(folder / single))
        if is_file(folder / index):
            return _each_alone(read_file_shards(folder / index, read_file))
    if parts := part_files(folder):
        return merge_parts(parts)
    if ranks := sat_files(folder):
        return merge_ranks(ranks)
    others = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (*_TORCH_SUFFIXES, ".safetensors", ".pdparams")
        and not path.name.startswith(_NO_WEIGHTS)
    ]
    if len(others) == 1 and others[0].suffix in _TORCH_SUFFIXES:
        return _each_alone(read_torch_file(others[0]))
    names = ", ".join(name for pair in _SINGLE_AND_INDEX for name in pair[:2])
    also = ""
    if others:
        count = "file" if len(others) == 1 else f"{len(others)} files"
        also = (
            f", but {count} that no index lists, {others[0].name} first: get the index beside "
            "them as well, or"
        )
    raise UserError(
        f"{folder} has none of {names} or mp_rank_00_model_states.pt{also or ';'} give a folder "
        "with weights in the format of safetensors, PyTorch, Paddle or SAT"
    )


def _log_others(folder: Path) -> None:
    """Says which weights are not read where a folder has them twice, as two saves may leave."""
    names = [name for pair in _SINGLE_AND_INDEX for name in pair[:2]]
    found = [name for name in names if is_file(folder / name)]
    found += sorted(path.name for path in folder.glob("model_state.[tp]p*.pdparams"))
    if len(found) > 1 and found[0] in names:
        rest = f"{found[1]} and {len(found) - 2} others" if len(found) > 3 else ", ".join(found[1:])
        logger.info("%s: the weights are those of %s; %s is not read", folder, found[0], rest)


def _each_alone(tensors: dict[str, StoredTensor]) -> dict[str, JoinedTensor]:
    return {name: JoinedTensor((tensor,)) for name, tensor in tensors.items()}


def read_file_shards(index: Path, read_file: _Reader = read_safetensors) -> dict[str, StoredTensor]:
    """Locates the tensors of the files that an index file lists, by name.

    Raises:
        UserError: the index or a file shard is missing or damaged.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map object")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(
                f"{index}: {name} must be the name of a file beside it, found {shard!r}"
            )
    entries: dict[str, StoredTensor] = {}
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not is_file(index.parent / shard):
            raise UserError(f"{index} lists the file {shard}, which is not in {index.parent}")
        shards[shard] = read_file(index.parent / shard)
        entries.update(shards[shard])
    # Files of an earlier save may hold a tensor too; the index decides.
    entries |= {
        name: shards[shard][name] for name, shard in weight_map.items() if name in shards[shard]
    }
    if absent := [name for name in weight_map if name not in entries]:
        raise UserError(f"{index} lists the tensor {absent[0]}, which no file holds")
    return entries
