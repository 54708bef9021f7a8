"""Detects a stored head that differs from the embedding although config.json ties the two.

Nothing here imports Paddle.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import stored_weight_map
from pypkg.models.weights.formats.tensor_files import TensorFiles

logger = logging.getLogger("pypkg.models")

_ROWS = 4096  # rows compared at a time


def as_stored(config: ModelConfig, files: TensorFiles, folder: Path) -> ModelConfig:
    """``config``, with ``tie_word_embeddings`` false if the weights hold a different head.

    Checkpoints of tied models often store the head too. If it differs from the embedding, the
    stored head is used, as in transformers 5, and a warning is logged.
    """
    if not config.tie_word_embeddings:
        return config
    untied = config.replace(tie_word_embeddings=False)
    found = files.shapes()
    names = stored_weight_map(untied, found)
    if not names.holds("lm_head.weight"):
        return config
    shape = (config.vocab_size, config.embedding_size)
    (head,), (table,) = (
        names.source_shapes(name, shape) for name in ("lm_head.weight", "embed_tokens.weight")
    )
    if not {head, table} <= found.keys() or _equal(files, head, table):
        return config
    logger.warning(
        "%s: tie_word_embeddings is true, but %s differs from %s; the stored head is used and "
        "trained on its own",
        folder,
        head,
        table,
    )
    return untied


def _equal(files: TensorFiles, first: str, second: str) -> bool:
    shape = files.shapes()[first]
    if files.shapes()[second] != shape:
        return False
    return all(
        np.array_equal(files.read(first, "float32", [rows]), files.read(second, "float32", [rows]))
        for rows in (slice(start, start + _ROWS) for start in range(0, shape[0], _ROWS))
    )
