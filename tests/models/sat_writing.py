"""Splits a GLM-130B checkpoint into the files of tensor-parallel ranks, as SAT saves them.

Written from the description of the layout, with the whole tensors and not with the reader in mind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch_writing import write_torch_file

Tensors = Mapping[str, np.ndarray]


def part_of_rank(name: str, whole: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """What one rank has of a tensor."""
    layer, _, kind = name.rpartition(".")
    if layer.endswith("dense_h_to_4h"):
        linear, gate = np.split(whole, 2)  # each rank multiplies a part of one by that of the other
        return np.concatenate([np.split(half, ranks)[rank] for half in (linear, gate)])
    if layer.endswith(("word_embeddings", "query_key_value")):
        return np.split(whole, ranks)[rank]
    if layer.endswith(("attention.dense", "dense_4h_to_h")) and kind == "weight":
        return np.split(whole, ranks, axis=1)[rank]
    return whole


def write_ranks(folder: Path, tensors: Tensors, ranks: int) -> None:
    """mp_rank_XX_model_states.pt for every rank."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        parts = {name: part_of_rank(name, value, rank, ranks) for name, value in tensors.items()}
        write_torch_file(folder / f"mp_rank_{rank:02d}_model_states.pt", parts, "module")
