"""Index maps written by PaddleNLP, used if they match the data.

PaddleNLP (paddlenlp/data/causal_dataset.py) names the files by the MD5 of a text. The text has the
path of the data and nothing about their contents, so that PaddleNLP keeps old maps when the data
change. Before maps are used, the parts that depend on the data are checked: each document must
occur once per epoch, and every sample must begin at the right token.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from pypkg.data.index.cache_files import array_file, map_arrays
from pypkg.data.index.maps import IndexMaps, IndexPlan, build_sample_index

logger = logging.getLogger("pypkg")


def paddlenlp_description(
    prefix: str, name: str, num_samples: int, plan: IndexPlan, splits_string: str
) -> str:
    """The text by which PaddleNLP identifies index maps."""
    return (
        "GPT Dataset\n\n"
        f"Data prefix {prefix}\n"
        f"Dataset name {name}\n"
        f"Number of samples {num_samples}\n"
        f"Sequence length {plan.seq_length}\n"
        f"Random seed {plan.seed}\n"
        f"Split {splits_string}\n"
    )


def read_paddlenlp_maps(
    folder: Path, description: str, sizes: np.ndarray, plan: IndexPlan
) -> IndexMaps | None:
    """The maps that PaddleNLP has written to a folder; None if there are none or they do not match.

    Args:
        folder: the folder of the maps.
        description: result of ``paddlenlp_description``.
        sizes: int32 [sequences], number of tokens of each sequence of the corpus.
    """
    name = hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()
    layout = plan.layout()
    files = [folder / f"{name}.dsc", *(array_file(folder, name, key) for key in layout)]
    if not all(file.is_file() for file in files):
        return None
    arrays = map_arrays(folder, name, layout)
    if arrays is None:
        return None
    maps = IndexMaps(*arrays.values())
    if not _fits(maps, sizes, plan):
        logger.warning(
            "%s was made from other data than there are now, or is damaged; it is not used",
            array_file(folder, name, "*"),
        )
        return None
    logger.info("index maps of PaddleNLP, checked against the data: %s", folder / name)
    return maps


def _fits(maps: IndexMaps, sizes: np.ndarray, plan: IndexPlan) -> bool:
    documents = plan.end - plan.first
    last_epoch = (plan.epochs - 1) * documents if plan.separate_last else plan.positions
    return (
        _is_shuffled(maps.document_index[:last_epoch], plan.first, documents)
        and _is_shuffled(maps.document_index[last_epoch:], plan.first, documents)
        and _is_shuffled(maps.shuffle_index[: plan.border], 0, plan.border)
        and _is_shuffled(maps.shuffle_index[plan.border :], plan.border, plan.samples - plan.border)
        and np.array_equal(
            build_sample_index(sizes, maps.document_index, plan.seq_length, plan.samples),
            maps.sample_index,
        )
    )


def _is_shuffled(numbers: np.ndarray, first: int, count: int) -> bool:
    """Whether ``numbers`` are [first, first + count), each number equally often."""
    if numbers.size == 0:
        return True
    if numbers.min() < first or numbers.max() >= first + count:
        return False
    often = np.bincount((numbers - numbers.dtype.type(first)).astype(np.int64), minlength=count)
    return bool(np.all(often == numbers.size // count))
