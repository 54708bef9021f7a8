"""From names of files to the train, valid and test datasets."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence

import numpy as np

from pypkg.data.blend import BlendedDataset, member_samples, parse_blend, share_weights
from pypkg.data.gpt_dataset import GPTDataset
from pypkg.data.index import split_boundaries
from pypkg.data.indexed_dataset import IndexedDataset
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

SPLITS = ("train", "valid", "test")
_INDEX_SUFFIXES = (".idx", "_idx.npz")
_SUFFIXES = (*_INDEX_SUFFIXES, ".bin", "_ids.npy")

Dataset = GPTDataset | BlendedDataset


def resolve_input_dir(input_dir: str) -> list[str]:
    """The ``data_prefix`` list that the setting ``input_dir`` stands for.

    Args:
        input_dir: a folder, of which every corpus in it gets the weight 1; the prefix of one
            corpus; or weights and prefixes in turn, ``"0.3 data/a 0.7 data/b"``, in which a prefix
            with spaces stands in quotes.

    Raises:
        UserError: there is nothing of this kind.
    """
    if os.path.isdir(input_dir):
        prefixes = _prefixes_in(input_dir)
        if not prefixes:
            raise UserError(
                f"input_dir {input_dir} has no file named *.idx or *_idx.npz; make one with "
                "python -m pypkg.preprocess"
            )
        if len(prefixes) == 1:
            return prefixes
        return [part for prefix in prefixes for part in ("1.0", prefix)]
    prefix = _without_suffix(input_dir)
    if any(os.path.exists(prefix + suffix) for suffix in _INDEX_SUFFIXES):
        return [prefix]
    try:
        parts = shlex.split(input_dir)
    except ValueError:  # a quote without its partner
        parts = []
    if len(parts) < 2:
        raise UserError(
            f"input_dir is '{input_dir}', where there is neither a folder nor {prefix}.idx nor "
            f"{prefix}_idx.npz; expected a folder, the path of a corpus without .bin/.idx, or "
            "weights and paths such as '0.3 data/a 0.7 data/b'"
        )
    return [part if number % 2 == 0 else _without_suffix(part) for number, part in enumerate(parts)]


def build_train_valid_test_datasets(
    data_prefix: Sequence[str],
    splits_string: str,
    seq_length: int,
    train_valid_test_num_samples: Sequence[int],
    seed: int,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The three datasets; the samples and their order are those of PaddleNLP.

    Args:
        data_prefix: ``["path"]``, or weights and paths in turn, ``["0.3", "path a", "0.7", ...]``.
        splits_string: shares of train, valid and test, ``949,50,1``; documents in file order.
        seq_length: tokens that the model sees; a sample has one more.
        train_valid_test_num_samples: how many samples each is asked for; there may be more.
        seed: of the order of documents and samples, for each dataset anew.

    Returns:
        train, valid, test; None for one whose split holds no document or only empty ones.

    Raises:
        UserError: files, weights or split are wrong, or the train split is smaller than a sample.
    """
    if seq_length < 1 or min(train_valid_test_num_samples) < 0:
        raise UserError(
            f"seq_length is {seq_length} and the numbers of samples are "
            f"{list(train_valid_test_num_samples)}; expected at least 1 and no negative number"
        )
    blended = len(data_prefix) != 1
    weights, prefixes = parse_blend(data_prefix) if blended else ([1.0], list(data_prefix))
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    bounds = [split_boundaries(splits_string, len(corpus)) for corpus in corpora]
    datasets = []
    for split, name in enumerate(SPLITS):
        num_samples = train_valid_test_num_samples[split]
        ranges = [(bound[split], bound[split + 1]) for bound in bounds]
        present = [
            bool(np.any(corpus.sizes[first:end])) for corpus, (first, end) in zip(corpora, ranges)
        ]
        if not any(present):
            datasets.append(None)
            continue
        shares = share_weights(weights, present)
        counts = member_samples(shares, num_samples) if blended else [num_samples]
        members = []
        for corpus, (first, end), there in zip(corpora, ranges, present):
            if there:
                count = counts[len(members)]
                members.append(GPTDataset(name, corpus, first, end, count, seq_length, seed))
            else:
                logger.warning("the %s split of %s is empty: left out", name, corpus.prefix)
        datasets.append(BlendedDataset(members, shares, num_samples) if blended else members[0])
    return tuple(datasets)


def _prefixes_in(folder: str) -> list[str]:
    """Prefixes of the corpora in a folder, sorted."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot list input_dir {folder}: {error.strerror}") from error
    found = {_without_suffix(name) for name in names if name.endswith(_INDEX_SUFFIXES)}
    return [os.path.join(folder, name) for name in sorted(found)]


def _without_suffix(path: str) -> str:
    for suffix in _SUFFIXES:
        if path.endswith(suffix):
            return path[: -len(suffix)]
    return path
