"""The weights of a PaddleNLP run under tensor or pipeline parallelism: a file per rank.

``model_state.tp01_pp00.pdparams`` holds the shards of tensor-parallel rank 1 in pipeline stage 0;
the part of the name for a degree of 1 is missing. Tensor names are those of the whole model. The
division follows ``_get_tensor_parallel_mappings`` in paddlenlp/transformers/*/modeling.py, where
matrices are [in, out]. A column-parallel layer has a block of the columns and of the bias. A
row-parallel layer and an embedding have a block of the rows.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pypkg.errors import UserError
from pypkg.models.weights.formats.paddle import read_paddle_file
from pypkg.models.weights.formats.stored_tensor import JoinedTensor, Shape, StoredTensor

_PART = r"{stem}\.(?:tp(\d+))?_?(?:pp(\d+))?\.{suffix}"
_COLUMNS = re.compile(
    r".*\.([qkv]_proj|qkv_proj|gate_proj|up_proj|w1|w2|linear1|query_key_value|dense_h_to_4h|"
    r"project_in|project_out)"
    r"\.(weight|bias)"
)
_HALVES = re.compile(r".*\.gate_up_fused_proj\.(weight|bias)")  # a rank has a block of each
_THIRDS = re.compile(r".*\.c_attn\.(weight|bias)")  # query, key and value, likewise
_ROWS = re.compile(r".*\.(o_proj|down_proj|out_proj|linear2|dense|dense_4h_to_h|c_proj)\.weight")
_TABLE = re.compile(r".*\.(embed_tokens|wte|word_embeddings)\.weight")
_HEAD = re.compile(r"lm_head\.weight|.*\.output_layer\.weight")
# Whole on every rank where the degree does not divide the vocabulary or the key-value heads.
_AT_TIMES_WHOLE = re.compile(r".*\.([kv]_proj|embed_tokens|wte|word_embeddings)\..*|lm_head\..*")
# Its query-key-value and gated matrices are divided in a way of their own.
_UNSUPPORTED = "chatglm_v2."

Rank = tuple[int, int]  # tensor-parallel, pipeline


def part_files(
    folder: Path, stem: str = "model_state", suffix: str = "pdparams"
) -> dict[Rank, Path]:
    """The files of all ranks in a folder; empty if there are none.

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
    table = next(
        (
            tensor.shape
            for tensors in held.values()
            for name, tensor in tensors.items()
            if _TABLE.fullmatch(name)
        ),
        None,
    )
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


def join_ranks(
    name: str,
    shards: list[StoredTensor],
    whole: Shape | None = None,
    table: Shape | None = None,
) -> JoinedTensor:
    """The whole tensor ``name``, or its optimizer state, joined from the shards of the ranks.

    Args:
        shards: in the order of tensor-parallel ranks.
        whole: shape of the whole tensor, if known.
        table: shape of the shard of the embedding on a rank, for models with a tied head.

    Raises:
        UserError: the shards do not belong together.
    """
    if len(shards) == 1 or shards[0].shape == whole:
        return JoinedTensor((shards[0],))
    if name.startswith(_UNSUPPORTED):
        raise UserError(
            f"{shards[0].file}: the tensor-parallel parts of a ChatGLMv2 model are not supported; "
            "save it with unified_checkpoint, or with tensor_parallel_degree 1"
        )
    parts = 2 if _HALVES.fullmatch(name) else 3 if _THIRDS.fullmatch(name) else 1
    if _COLUMNS.fullmatch(name) or parts > 1:
        axis = len(shards[0].shape) - 1
    elif _ROWS.fullmatch(name) or _TABLE.fullmatch(name):
        axis = 0
    elif _HEAD.fullmatch(name):
        # [hidden, vocabulary], but [vocabulary, hidden] where it is the embedding.
        is_tied = shards[0].shape == table or (
            whole is not None and whole[-1] == shards[0].shape[-1]
        )
        axis = 0 if is_tied else 1
    else:
        return JoinedTensor((shards[0],))  # every rank has the whole
    _check_same(name, shards)
    if whole is None and _AT_TIMES_WHOLE.fullmatch(name) and _are_equal(name, shards):
        return JoinedTensor((shards[0],))
    length = shards[0].shape[axis] // parts
    pieces = [
        shard.narrow(axis, part * length, (part + 1) * length)
        for part in range(parts)
        for shard in shards
    ]
    return JoinedTensor(tuple(pieces), axis)


def _check_same(name: str, shards: list[StoredTensor]) -> None:
    for shard in shards:
        if shard.shape != shards[0].shape:
            raise UserError(
                f"{shard.file} and {shards[0].file} do not belong together: {name} has shape "
                f"{list(shard.shape)} in one and {list(shards[0].shape)} in the other"
            )


def _are_equal(name: str, shards: list[StoredTensor]) -> bool:
    """Whether two ranks hold equal tensors, judged by their first rows."""
    first, second = (
        JoinedTensor((shard,)).read(name, "float32", [slice(0, 8)]) for shard in shards[:2]
    )
    return bool(np.array_equal(first, second) and first.any())
