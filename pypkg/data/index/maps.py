"""The index maps of Megatron-LM and PaddleNLP, which define the tokens of sample i.

Equal files, split, seed and sequence length give equal samples in equal order. "Documents" of
Megatron-LM and PaddleNLP are the sequences of the file. Symbols: T tokens in an epoch of the
split, s = ``seq_length``, E epochs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pypkg import _native
from pypkg.console import progress
from pypkg.errors import UserError

logger = logging.getLogger("pypkg")


def split_boundaries(splits_string: str, num_documents: int) -> list[int]:
    """The boundaries of train, valid and test in the documents.

    Args:
        splits_string: shares such as ``949,50,1``, ``949/50/1`` or ``100``; missing shares are 0.

    Returns:
        Four ascending numbers: split i holds the documents [b[i], b[i + 1]).

    Raises:
        UserError: ``splits_string`` is not one to three non-negative numbers with a positive sum.
    """
    separator = "," if "," in splits_string else "/"
    try:
        shares = [float(share) for share in splits_string.split(separator)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not 0 < sum(shares) < np.inf or min(shares) < 0:
        raise UserError(
            f"split is '{splits_string}'; expected the shares of train, valid and test separated "
            "by commas or slashes, not all zero, such as 949,50,1"
        )
    shares = [share / sum(shares) for share in shares] + [0.0] * (3 - len(shares))
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share * num_documents))
    surplus = boundaries[-1] - num_documents
    # Subtracting the surplus may give a negative number if the first split is empty.
    return [0] + [max(boundary - surplus, 0) for boundary in boundaries[1:]]


@dataclass(frozen=True)
class IndexPlan:
    """The parameters of index maps. Maps depend on them and on the sizes of the sequences.

    Attributes:
        first, end: the sequences [first, end) of the split.
        seq_length, seed: as for the dataset.
        epochs: E.
        samples: number of samples, (E * T - 1) // s.
        separate_last: whether the last epoch is shuffled separately, because the run needs less
            than 80 % of it.
        border: samples [0, border) are shuffled together, and so are samples [border, samples).
            Equal to ``samples`` unless ``separate_last``.
    """

    first: int
    end: int
    seq_length: int
    seed: int
    epochs: int
    samples: int
    separate_last: bool
    border: int

    @property
    def positions(self) -> int:
        """Length of the document index."""
        return self.epochs * (self.end - self.first)

    def layout(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each map, by PaddleNLP's name."""
        documents = np.dtype(index_dtype(max(self.positions, self.end)))
        return {
            "doc_idx": ((self.positions,), documents),
            "sample_idx": ((self.samples + 1, 2), documents),
            "shuffle_idx": ((self.samples,), np.dtype(shuffle_dtype(self.samples))),
        }


def plan_index_maps(
    sizes: np.ndarray, first: int, end: int, num_samples: int, seq_length: int, seed: int
) -> IndexPlan:
    """The plan for at least ``num_samples`` samples of the sequences [first, end).

    Args:
        sizes: int32 [sequences], number of tokens of each sequence of the file. The split has at
            least one token.
    """
    tokens = int(sizes[first:end].sum(dtype=np.int64))
    epochs = num_epochs(tokens, seq_length, num_samples)
    samples = (epochs * tokens - 1) // seq_length
    before_last = ((epochs - 1) * tokens - 1) // seq_length if epochs > 1 else 0
    separate = epochs > 1 and num_samples - before_last < int(0.80 * ((tokens - 1) // seq_length))
    border = before_last if separate else samples
    return IndexPlan(first, end, seq_length, seed, epochs, samples, separate, border)


@dataclass(frozen=True)
class IndexMaps:
    """The three arrays that define the order of samples.

    Attributes:
        document_index: int32 or int64 [E * documents], sequences in reading order.
        sample_index: int32 or int64 [samples + 1, 2], beginning of each sample: position in
            ``document_index`` and token in that sequence. int64 is used if int32 is too small.
        shuffle_index: uint32 or int64 [samples], the number of the sample drawn i-th.
    """

    document_index: np.ndarray
    sample_index: np.ndarray
    shuffle_index: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three, in the order of :meth:`IndexPlan.layout`."""
        return self.document_index, self.sample_index, self.shuffle_index

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def build_index_maps(sizes: np.ndarray, plan: IndexPlan) -> IndexMaps:
    """Builds the index maps of a plan.

    Args:
        sizes: as for :func:`plan_index_maps`.
    """
    # One generator shuffles first the documents, then the samples.
    random = np.random.RandomState(plan.seed)
    with _stage("order of %s documents", plan.positions):
        document_index = _shuffled_documents(plan, random)
    with _stage("beginnings of %s samples", plan.samples):
        sample_index = build_sample_index(sizes, document_index, plan.seq_length, plan.samples)
    with _stage("order of %s samples", plan.samples):
        shuffle_index = _shuffled_samples(plan, random)
    return IndexMaps(document_index, sample_index, shuffle_index)


@contextmanager
def _stage(what: str, count: int) -> Iterator[None]:
    """Reports progress, and logs the duration of the block if a user would notice it."""
    start = time.perf_counter()
    progress.report(f"index maps: {what}" % f"{count:,}")
    yield
    seconds = time.perf_counter() - start
    if seconds > 1:
        logger.info(f"index maps: {what}: %.1f s", f"{count:,}", seconds)


def num_epochs(tokens: int, seq_length: int, num_samples: int) -> int:
    """The smallest E >= 1 with (E * tokens - 1) // seq_length >= num_samples.

    Raises:
        ValueError: ``tokens`` is 0.
    """
    if tokens <= 0:
        raise ValueError("no number of epochs over no tokens gives a sample")
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def build_sample_index(
    sizes: np.ndarray, document_index: np.ndarray, seq_length: int, num_samples: int
) -> np.ndarray:
    """``sample_index`` of :class:`IndexMaps`, in the dtype of ``document_index``.

    Args:
        sizes: int32 [sequences], number of tokens of each sequence.
        document_index: [E * documents], sequences in reading order.
    """
    sample_index = np.empty((num_samples + 1, 2), document_index.dtype)
    _native.build_sample_index(sizes, document_index, seq_length, sample_index)
    return sample_index


def index_dtype(count: int) -> type[np.signedinteger]:
    """int32 if it can hold the numbers 0 to ``count`` - 1, else int64."""
    return np.int32 if count - 1 <= np.iinfo(np.int32).max else np.int64


def shuffle_dtype(num_samples: int) -> type[np.integer]:
    """uint32 below 2^32 - 2 samples, else int64. The limit is that of Megatron-LM."""
    return np.int64 if num_samples >= np.iinfo(np.uint32).max - 1 else np.uint32


def shuffle(array: np.ndarray, random: np.random.RandomState) -> None:
    """Shuffles ``array`` in place, with the result of ``random.shuffle`` and several times faster.

    Args:
        array: one dimension, items of 4 or 8 bytes.
    """
    state = random.get_state(legacy=False)
    generator = state["state"]
    generator["pos"] = _native.shuffle(array, generator["key"], generator["pos"])
    random.set_state(state)


def _shuffled_documents(plan: IndexPlan, random: np.random.RandomState) -> np.ndarray:
    """``document_index``: all epochs shuffled together, or the last one separately."""
    _, dtype = plan.layout()["doc_idx"]
    epoch = np.arange(plan.first, plan.end, dtype=dtype)
    documents = epoch if plan.epochs == 1 else np.tile(epoch, plan.epochs)
    border = len(documents) - len(epoch) if plan.separate_last else len(documents)
    shuffle(documents[:border], random)
    if plan.separate_last:
        shuffle(documents[border:], random)
    return documents


def _shuffled_samples(plan: IndexPlan, random: np.random.RandomState) -> np.ndarray:
    """``shuffle_index``: the samples before ``border`` shuffled, then the others."""
    shape, dtype = plan.layout()["shuffle_idx"]
    index = np.arange(shape[0], dtype=dtype)
    shuffle(index[: plan.border], random)
    if plan.separate_last:
        shuffle(index[plan.border :], random)
    return index
