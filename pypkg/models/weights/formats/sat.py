"""Checkpoints of SwissArmyTransformer, the format of GLM-130B: one file per tensor-parallel rank.

``mp_rank_XX_model_states.pt`` holds the shards of rank XX in the layout of
https://github.com/THUDM/SwissArmyTransformer (sat/mpu/layers.py), where matrices are [out, in]. A
column-parallel layer (parallel over outputs) has a block of the rows of the whole matrix, a
row-parallel layer a block of its columns. The rows of a gated layer are two halves of equal
length, and a rank has a block of each half.
"""

from __future__ import annotations

import re
from pathlib import Path

from pypkg.errors import UserError
from pypkg.models.weights.formats.stored_tensor import JoinedTensor, StoredTensor
from pypkg.models.weights.formats.torch import read_torch_file

_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LATEST = "latest"  # a file with the name of the folder of the newest iteration

_ROWS = re.compile(r".*(word_embeddings\.weight|query_key_value\.(weight|bias))")
_GATED_ROWS = re.compile(r".*mlp\.dense_h_to_4h\.(weight|bias)")
_COLUMNS = re.compile(r".*(attention\.dense|mlp\.dense_4h_to_h)\.weight")


def sat_files(folder: Path) -> list[Path]:
    """The rank files of a checkpoint, in the order of ranks; empty for another format.

    Raises:
        UserError: the files of some ranks are missing.
    """
    try:
        if (folder / _LATEST).is_file():
            iteration = (folder / _LATEST).read_text(encoding="utf-8").strip()
            if iteration and Path(iteration).name == iteration and (folder / iteration).is_dir():
                folder = folder / iteration
        found = {
            int(match.group(1)): path
            for path in folder.iterdir()
            if (match := _RANK_FILE.fullmatch(path.name))
        }
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    if absent := sorted(set(range(max(found, default=-1))) - set(found)):
        raise UserError(
            f"{folder} lacks mp_rank_{absent[0]:02d}_model_states.pt; its highest rank is "
            f"{max(found)}, and the files of all ranks from 0 on are needed"
        )
    return [found[rank] for rank in sorted(found)]


def merge_ranks(files: list[Path]) -> dict[str, JoinedTensor]:
    """The whole tensors by name, each joined from the files of the ranks. No tensor is read.

    Raises:
        UserError: a file cannot be read, or the ranks do not belong together.
    """
    ranks = [read_torch_file(path) for path in files]
    for path, rank in zip(files, ranks):
        for name in ranks[0].keys() ^ rank.keys():
            raise UserError(f"{path} and {files[0]} do not belong together: only one holds {name}")
    return {name: _merge(name, [rank[name] for rank in ranks]) for name in ranks[0]}


def _merge(name: str, shards: list[StoredTensor]) -> JoinedTensor:
    axis = 1 if _COLUMNS.fullmatch(name) else 0
    if not (_COLUMNS.fullmatch(name) or _ROWS.fullmatch(name) or _GATED_ROWS.fullmatch(name)):
        _check_same(name, shards, None)
        return JoinedTensor((shards[0],))  # replicated on every rank
    _check_same(name, shards, axis)
    if _GATED_ROWS.fullmatch(name):
        if odd := [shard for shard in shards if shard.shape[0] % 2]:
            raise UserError(
                f"{odd[0].file}: {name} of shape {list(odd[0].shape)} is a gated layer, whose "
                "number of rows must be even"
            )
        halves = [shard.shape[0] // 2 for shard in shards]
        shards = [shard.narrow(0, 0, half) for shard, half in zip(shards, halves)] + [
            shard.narrow(0, half, 2 * half) for shard, half in zip(shards, halves)
        ]
    return JoinedTensor(tuple(shards), axis)


def _check_same(name: str, shards: list[StoredTensor], axis: int | None) -> None:
    """Raises UserError unless the shapes are equal, except along the joined axis."""

    def fixed(shard: StoredTensor) -> tuple:
        return tuple(length for at, length in enumerate(shard.shape) if at != axis)

    for shard in shards:
        if len(shard.shape) <= (axis or 0) or fixed(shard) != fixed(shards[0]):
            raise UserError(
                f"{shard.file} and {shards[0].file} do not belong together: {name} has shape "
                f"{list(shard.shape)} in one and {list(shards[0].shape)} in the other"
            )
