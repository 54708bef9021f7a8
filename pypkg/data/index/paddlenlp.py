"""Index maps that PaddleNLP has written, taken if they fit the data.

PaddleNLP (paddlenlp/data/causal_dataset.py) names the files by the MD5 of a text that holds the
path of the data but nothing about their contents, and keeps them when the data change. So what
depends on the data is compared with them before the maps are used: the documents, each as often as
there are epochs, and the beginning of every sample.
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
    """The text that PaddleNLP identifies index maps by."""
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
    """The maps that PaddleNLP keeps in a folder; None where there are none that fit the data.

    Args:
        sizes: int32 [sequences] of the whole corpus.
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
    """Whether the numbers are ``first`` and the ``count`` - 1 after it, each equally often."""
    if numbers.size == 0:
        return True
    if numbers.min() < first or numbers.max() >= first + count:
        return False
    often = np.bincount((numbers - numbers.dtype.type(first)).astype(np.int64), minlength=count)
    return bool(np.all(often == numbers.size // count))
