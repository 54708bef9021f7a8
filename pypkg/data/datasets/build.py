"""Builds the train, valid and test datasets from the paths of corpora."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pypkg.data.corpus.files import INDEX_SUFFIXES, TOKEN_SUFFIXES, prefix_of
from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.datasets.base import Dataset
from pypkg.data.datasets.blend import (
    BlendedDataset,
    blend_weights,
    member_samples,
    parse_blend,
    share_weights,
)
from pypkg.data.datasets.concat import ChainedDataset, LaterDataset, WholeSplit
from pypkg.data.datasets.gpt import GPTDataset
from pypkg.data.datasets.order import CorpusOrder, SampleOrder, corpus_order
from pypkg.data.index.cache import IndexCache
from pypkg.data.index.maps import split_boundaries
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")

SPLITS = ("train", "valid", "test")


def resolve_input_dir(input_dir: str, weighted: bool = True) -> list[str]:
    """The ``data_prefix`` list that the setting ``input_dir`` stands for.

    Args:
        input_dir: a folder, whose corpora all get the weight 1; the prefix of one corpus; or
            alternating weights and prefixes, ``"0.3 data/a 0.7 data/b"``, where a prefix with
            spaces is quoted.
        weighted: whether a list has weights. With False it has only prefixes, ``"data/a data/b"``,
            which get the weight 1.

    Raises:
        UserError: ``input_dir`` is none of these.
    """
    if os.path.isdir(input_dir):
        prefixes = _prefixes_in(input_dir)
        if not prefixes:
            raise UserError(
                f"input_dir {input_dir} has no file named *.idx, *_idx.npz or *_ids.npz; make one "
                "with python -m pypkg.preprocess"
            )
        if len(prefixes) == 1:
            return prefixes
        return _equal_weights(prefixes)
    prefix = prefix_of(input_dir)
    if any(os.path.exists(prefix + suffix) for suffix in INDEX_SUFFIXES):
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
    if not weighted:
        return _equal_weights([prefix_of(part) for part in _without_weights(parts)])
    return [part if number % 2 == 0 else prefix_of(part) for number, part in enumerate(parts)]


def _equal_weights(prefixes: Sequence[str]) -> list[str]:
    return [part for prefix in prefixes for part in ("1.0", prefix)]


def _without_weights(parts: Sequence[str]) -> Sequence[str]:
    for part in parts:
        try:
            float(part)
        except ValueError:
            continue
        raise UserError(
            f"input_dir holds the weight {part}, but blend_by takes the weights from the sizes of "
            "the corpora; leave the weights out, or set blend_by to 'weights'"
        )
    return parts


@dataclass(frozen=True)
class OrderOptions:
    """Options of the sample order that PaddleNLP does not have.

    Attributes:
        kind: "run", PaddleNLP's order, or "epoch"; see the setting ``sample_order``.
        blend_by, blend_temperature: the settings of this name; see ``blend.blend_weights``.
        earlier: the order in the checkpoint from which the run resumes, or None.
        consumed: number of samples of the train split consumed before that checkpoint.
    """

    kind: str = "run"
    blend_by: str = "weights"
    blend_temperature: float = 1.0
    earlier: SampleOrder | None = None
    consumed: int = 0


def build_train_valid_test_datasets(
    data_prefix: Sequence[str],
    splits_string: str,
    seq_length: int,
    train_valid_test_num_samples: Sequence[int],
    seed: int,
    *,
    data_cache: str | None = None,
    share_folder: bool = False,
    rank: int = 0,
    local_rank: int = 0,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Builds the three datasets with the samples and the sample order of PaddleNLP.

    Args:
        data_prefix: ``["path"]``, or alternating weights and paths, ``["0.3", "path a", "0.7",
            ...]``.
        splits_string: shares of train, valid and test, ``949,50,1``, of the documents in file
            order.
        seq_length: number of tokens that the model sees; a sample has one more.
        train_valid_test_num_samples: the least number of samples of each dataset.
        seed: seed of the order of documents and samples; each dataset starts with it.
        data_cache: folder of the index maps; None: ``index-cache`` beside the data.
        share_folder: whether all machines of the run see the same folders, see
            :class:`IndexCache`.
        rank, local_rank: of this process in the run and on its machine; they decide which process
            builds the index maps.

    Returns:
        train, valid, test; None for a split without tokens.

    Raises:
        UserError: files, weights or split are wrong, or the train split is smaller than a sample.
    """
    cache = IndexCache(data_cache, share_folder, rank=rank, local_rank=local_rank)
    return build_datasets(
        data_prefix, splits_string, seq_length, train_valid_test_num_samples, seed, cache=cache
    )[0]


def build_datasets(
    data_prefix: Sequence[str],
    splits_string: str,
    seq_length: int,
    train_valid_test_num_samples: Sequence[int | None],
    seed: int,
    options: OrderOptions = OrderOptions(),
    *,
    cache: IndexCache | None = None,
) -> tuple[tuple[Dataset | None, Dataset | None, Dataset | None], SampleOrder | None]:
    """Builds the three datasets, and returns them with the order of the train split.

    Arguments and errors are those of :func:`build_train_valid_test_datasets`, except:

    Args:
        train_valid_test_num_samples: the number for the train split counts from the beginning of
            the run, also in a resumed run. None, for validation or test, stands for the whole
            split: each sample of each corpus once, regardless of the weights.
        options: options of the sample order.
        cache: reads and stores index maps; None builds them in memory.
    """
    wanted = list(train_valid_test_num_samples)
    if seq_length < 1 or any(number is not None and number < 0 for number in wanted):
        raise UserError(
            f"seq_length is {seq_length} and the numbers of samples are "
            f"{wanted}; expected at least 1 and no negative number"
        )
    blended = len(data_prefix) != 1
    weights, prefixes = parse_blend(data_prefix) if blended else ([1.0], list(data_prefix))
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    if blended:
        weights = blend_weights(corpora, weights, options.blend_by, options.blend_temperature)
    bounds = [split_boundaries(splits_string, len(corpus)) for corpus in corpora]
    datasets: list[Dataset | None] = []
    orders: list[SampleOrder | None] = []
    for split, name in enumerate(SPLITS):
        ranges = [_Range(c, bound[split], bound[split + 1]) for c, bound in zip(corpora, bounds)]
        present = [part.num_tokens > 0 for part in ranges]
        for part, there in zip(ranges, present):
            if not there and any(present):
                logger.warning("the %s split of %s is empty: left out", name, part.corpus.prefix)
        if not any(present):
            datasets.append(None)
            orders.append(None)
            continue
        ranges = [part for part, there in zip(ranges, present) if there]
        shares = share_weights(weights, present)
        order = SampleOrder(
            options.kind, splits_string, seq_length, seed, shares,
            [corpus_order(r.corpus, r.first, r.end) for r in ranges],
        )  # fmt: skip
        if name == "train" and options.earlier is not None:
            order.resume(options.earlier, options.consumed)
        number = wanted[split]
        datasets.append(
            _whole_split(name, ranges, order, cache)
            if number is None
            else _make_dataset(name, ranges, order, number, blended, cache)
        )
        orders.append(order)
    train, valid, test = datasets
    return (train, valid, test), orders[0]


@dataclass(frozen=True)
class _Range:
    """The sequences of a corpus that belong to a split."""

    corpus: IndexedDataset
    first: int
    end: int

    @property
    def num_tokens(self) -> int:
        return int(self.corpus.sizes[self.first : self.end].sum(dtype=np.int64))


def _make_dataset(
    name: str,
    ranges: Sequence[_Range],
    order: SampleOrder,
    num_samples: int,
    blended: bool,
    cache: IndexCache | None,
) -> Dataset:
    """The dataset of a split with ``num_samples`` samples from the beginning of the run."""
    wanted = max(num_samples - order.start, 0)
    counts = member_samples(order.weights, wanted) if blended else [wanted]
    members: list[Dataset] = []
    for part, corpus, count in zip(ranges, order.corpora, counts):
        order.provide(corpus, corpus.first + count)
        member = _make_member(name, part, corpus, order, cache)
        members.append(LaterDataset(member, 0, corpus.first) if corpus.first else member)
    dataset = BlendedDataset(members, order.weights, wanted, cache) if blended else members[0]
    return LaterDataset(dataset, order.start, 0) if order.start else dataset


def _whole_split(
    name: str, ranges: Sequence[_Range], order: SampleOrder, cache: IndexCache | None
) -> Dataset:
    """Every sample of a split once.

    Raises:
        UserError: no corpus has the tokens of one sample in this split.
    """
    enough = [part for part in ranges if part.num_tokens > order.seq_length]
    for part in ranges:
        if part not in enough:
            logger.warning(
                "the %s split of %s is smaller than a sample: left out", name, part.corpus.prefix
            )
    if not enough:
        raise UserError(
            f"the whole {name} split is asked for, but no corpus has {order.seq_length + 1} tokens "
            "in it, max_seq_length and one more; give it a larger share in split, or ask for a "
            "number of samples"
        )
    parts = [
        GPTDataset(
            name, part.corpus, part.first, part.end, 0, order.seq_length, order.seed,
            cache=cache, splits_string=order.split,
        )
        for part in enough
    ]  # fmt: skip
    return WholeSplit(parts)


def _make_member(
    name: str, part: _Range, corpus: CorpusOrder, order: SampleOrder, cache: IndexCache | None
) -> Dataset:
    """The samples of one corpus."""
    parts = [
        GPTDataset(
            name, part.corpus, part.first, part.end, num_samples, order.seq_length,
            (order.seed + number) % 2**32, cache=cache, splits_string=order.split,
        )
        for number, num_samples in enumerate(corpus.parts)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else ChainedDataset(parts)


def _prefixes_in(folder: str) -> list[str]:
    """Prefixes of the corpora in a folder, sorted."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot list input_dir {folder}: {error.strerror}") from error
    found = {prefix_of(name) for name in names if name.endswith(INDEX_SUFFIXES)}
    for name in sorted(names):
        if name.endswith(TOKEN_SUFFIXES) and prefix_of(name) not in found:
            logger.warning(
                "%s has no index file beside it and is left out; was its making interrupted?",
                os.path.join(folder, name),
            )
    return [os.path.join(folder, name) for name in sorted(found)]
