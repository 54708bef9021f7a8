"""The weights of a PaddleNLP run under tensor or pipeline parallelism: one file per rank.

``model_state.tp01_pp00.pdparams`` holds the shards of tensor-parallel rank 1 in pipeline stage 0.
For a degree of 1, that part of the file name is omitted. Tensor names are those of the whole model.
The division is that of ``_get_tensor_parallel_mappings`` in paddlenlp/transformers/*/modeling.py,
with [in, out] matrices. The rank of a column-parallel layer has a block of the columns and of the
bias. The rank of a row-parallel layer or an embedding has a block of the rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from pypkg.errors import UserError
from pypkg.models.weights.formats.paddle import read_paddle_file
from pypkg.models.weights.formats.stored_tensor import (
    JoinedTensor,
    Shape,
    SlicedTensor,
    StoredTensor,
)

_PART = r"{stem}\.(?:tp(\d+))?_?(?:pp(\d+))?\.{suffix}"
_COLUMNS = re.compile(
    r".*\.([qkv]_proj|qkv_proj|gate_proj|up_proj|w1|w2|linear1|query_key_value|dense_h_to_4h|"
    r"project_in|project_out)"
    r"\.(weight|bias)"
)
# Tensors that pack several matrices, of each of which a rank has a block. ChatGLMv2's names contain
# "encoder".
_HALVES = re.compile(r".*(\.gate_up_fused_proj|\bencoder\..*\.dense_h_to_4h)\.(weight|bias)")
_THIRDS = re.compile(r".*\.c_attn\.(weight|bias)")
_QUERY_KEY_VALUE = re.compile(r".*\bencoder\..*\.query_key_value\.(weight|bias)")
_ROWS = re.compile(r".*\.(o_proj|down_proj|out_proj|linear2|dense|dense_4h_to_h|c_proj)\.weight")
_TABLE = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings)\.weight")
_HEAD = re.compile(r"lm_head\.weight|(.*\.)?output_layer\.weight")
# Replicated on all ranks if the degree does not divide the vocabulary or the key-value heads.
_AT_TIMES_WHOLE = re.compile(
    r".*\.[kv]_proj\..*|(.*\.)?(embed_tokens|wte|word_embeddings)\..*|lm_head\..*"
)

Rank = tuple[int, int]  # tensor-parallel, pipeline


def part_files(
    folder: Path, stem: str = "model_state", suffix: str = "pdparams"
) -> dict[Rank, Path]:
    """The files of all ranks in a folder, by rank; empty if there are none.

    Args:
        stem, suffix: of the file names.

    Raises:
        UserError: the files of some ranks are missing.
    """
    pattern = re.compile(_PART.format(stem=stem, suffix=suffix))
    found: dict[Rank, Path] = {}
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and any(match.groups()):
            tp, pp = (int(number or 0) for number in match.groups())
            found[tp, pp] = path
    if found:
        tensor, stages = (max(rank[axis] for rank in found) + 1 for axis in (0, 1))
        for rank in ((tp, pp) for tp in range(tensor) for pp in range(stages)):
            if rank not in found:
                raise UserError(
                    f"{folder} lacks the {stem} file of tensor-parallel rank {rank[0]} and "
                    f"pipeline stage {rank[1]}; the highest are {tensor - 1} and {stages - 1}, "
                    "and the files of all ranks are needed"
                )
    return found


def merge_parts(parts: dict[Rank, Path]) -> dict[str, JoinedTensor]:
    """The whole tensors by name, each joined from the files of the ranks.

    Raises:
        UserError: a file cannot be read, or the ranks do not belong together.
    """
    held = {rank: read_paddle_file(path) for rank, path in sorted(parts.items())}
    table = table_shape({name: t.shape for rank in held.values() for name, t in rank.items()})
    merged: dict[str, JoinedTensor] = {}
    for stage in sorted({pp for _, pp in parts}):
        files, ranks = zip(*((parts[rank], held[rank]) for rank in held if rank[1] == stage))
        for path, rank in zip(files, ranks):
            for name in ranks[0].keys() ^ rank.keys():
                raise UserError(
                    f"{path} and {files[0]} do not belong together: only one holds {name}"
                )
        for name in ranks[0]:
            merged.setdefault(name, join_ranks(name, [rank[name] for rank in ranks], table=table))
    return merged


def table_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """Shape of the embedding, or of its shard, among tensors with ``shapes``; None: not found."""
    return next((shape for name, shape in shapes.items() if _TABLE.fullmatch(name)), None)


def join_ranks(
    name: str,
    shards: Sequence[StoredTensor | SlicedTensor],
    whole: Shape | None = None,
    table: Shape | None = None,
) -> JoinedTensor:
    """The whole tensor ``name``, or its optimizer state, joined from the shards of the ranks.

    Args:
        shards: in the order of tensor-parallel ranks.
        whole: shape of the whole tensor, if known.
        table: shape of the embedding or of its shard. A tied head has the same shape, and the total
            width of the queries of a ChatGLMv2 layer is the embedding's width.

    Raises:
        UserError: the shards do not belong together.
    """
    if len(shards) == 1 or shards[0].shape == whole:
        return JoinedTensor((shards[0],))
    axis = _divided_axis(name, shards[0].shape, whole, table)
    if axis is None:
        return JoinedTensor((shards[0],))  # replicated on every rank
    _check_same(name, shards)
    if whole is None and _AT_TIMES_WHOLE.fullmatch(name) and _are_equal(name, shards):
        return JoinedTensor((shards[0],))
    bounds = _blocks(name, shards[0], axis, len(shards), table)
    pieces = [shard.narrow(axis, *block) for block in pairwise(bounds) for shard in shards]
    return JoinedTensor(tuple(pieces), axis)


def _divided_axis(name: str, shard: Shape, whole: Shape | None, table: Shape | None) -> int | None:
    """The axis along which ranks divide a tensor; None: it is replicated."""
    if any(kind.fullmatch(name) for kind in (_COLUMNS, _HALVES, _THIRDS, _QUERY_KEY_VALUE)):
        return len(shard) - 1
    if _ROWS.fullmatch(name) or _TABLE.fullmatch(name):
        return 0
    if _HEAD.fullmatch(name):
        # [hidden, vocabulary], but [vocabulary, hidden] if it is tied to the embedding.
        is_tied = shard == table or (whole is not None and whole[-1] == shard[-1])
        return 0 if is_tied else 1
    return None


def _blocks(
    name: str, shard: StoredTensor | SlicedTensor, axis: int, ranks: int, table: Shape | None
) -> list[int]:
    """Bounds of the packed matrices of a tensor along the divided axis of a rank's shard."""
    length = shard.shape[axis]
    if _QUERY_KEY_VALUE.fullmatch(name):
        if table is None:
            raise UserError(
                f"{shard.file}: no rank has an embedding, whose width is needed to divide {name}"
            )
        query = table[-1] // ranks
        return [0, query, (query + length) // 2, length]
    parts = 2 if _HALVES.fullmatch(name) else 3 if _THIRDS.fullmatch(name) else 1
    return [length * part // parts for part in range(parts + 1)]


def _check_same(name: str, shards: Sequence[StoredTensor | SlicedTensor]) -> None:
    for shard in shards:
        if shard.shape != shards[0].shape:
            raise UserError(
                f"{shard.file} and {shards[0].file} do not belong together: {name} has shape "
                f"{list(shard.shape)} in one and {list(shards[0].shape)} in the other"
            )


def _are_equal(name: str, shards: Sequence[StoredTensor | SlicedTensor]) -> bool:
    """Whether the first two ranks hold equal tensors. It compares the first 8 rows.

    The shards of a divided tensor differ, because weights begin random.
    """
    first, second = (
        JoinedTensor((shard,)).read(name, "float32", [slice(0, 8)]) for shard in shards[:2]
    )
    return bool(np.array_equal(first, second) and first.any())
