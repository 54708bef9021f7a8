"""Weighted blends of datasets, in the sample order of Megatron-LM and PaddleNLP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from pypkg import _native
from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.datasets.base import BatchRows, Dataset
from pypkg.data.index.cache import IndexCache
from pypkg.errors import UserError

MAX_DATASETS = np.iinfo(np.int16).max


def parse_blend(data_prefix: Sequence[str]) -> tuple[list[float], list[str]]:
    """Weights, normalised to sum 1, and prefixes of ``["0.3", "path a", "0.7", "path b"]``.

    Raises:
        UserError: the list does not consist of pairs, or a weight is not a positive number.
    """
    form = "expected weight and prefix in turn, such as 0.3 data/a 0.7 data/b"
    if len(data_prefix) % 2 or not data_prefix:
        raise UserError(f"the blend {' '.join(data_prefix)!r} has {len(data_prefix)} parts; {form}")
    if len(data_prefix) // 2 > MAX_DATASETS:
        raise UserError(
            f"a blend of {len(data_prefix) // 2} datasets; at most {MAX_DATASETS} are possible. "
            "Merge some of them"
        )
    weights = []
    for text in data_prefix[::2]:
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"the blend has '{text}' where a positive weight should be; {form}")
        weights.append(weight)
    return _normalised(weights), [prefix.strip() for prefix in data_prefix[1::2]]


def blend_weights(
    corpora: Sequence[IndexedDataset], given: Sequence[float], blend_by: str, temperature: float
) -> list[float]:
    """The weights of a blend, with sum 1.

    Args:
        given: the weights of the settings.
        blend_by: "weights": the given weights; "size": proportional to the tokens of the corpora;
            "temperature": proportional to tokens ** (1 / temperature), which favours small
            corpora (temperature-scaled mixing: Raffel et al., 2020, "Exploring the Limits of
            Transfer Learning", section 3.5.2).
        temperature: see ``blend_by``.
    """
    if blend_by == "weights":
        return list(given)
    if blend_by not in ("size", "temperature"):
        raise ValueError(f"blend_by {blend_by!r} gives no weights")
    power = 1.0 if blend_by == "size" else 1.0 / temperature
    return _normalised([corpus.num_tokens**power for corpus in corpora])


def member_samples(weights: Sequence[float], num_samples: int) -> list[int]:
    """The number of samples to build of each member: its share plus half a percent plus 20."""
    return [math.ceil(num_samples * weight * 1.005) + 20 for weight in weights]


class BlendedDataset(Dataset):
    """``size`` samples of ``datasets``, drawn by weight.

    Each sample comes from the member whose number of samples so far is furthest below its weight.

    Attributes:
        dataset_index: int16 [size], the member of each sample.
        dataset_sample_index: int64 [size], the number of each sample in its member.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        size: int,
        cache: IndexCache | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.seq_length = datasets[0].seq_length
        self.corpora = [corpus for dataset in datasets for corpus in dataset.corpora]
        shares = np.array(weights, np.float64)
        shares /= shares.sum()
        build = partial(_native.build_blending_indices, shares, size)
        self.dataset_index: np.ndarray
        self.dataset_sample_index: np.ndarray
        self.dataset_index, self.dataset_sample_index = (
            build() if cache is None else cache.blending_indices(shares, size, build)
        )

    def __len__(self) -> int:
        return len(self.dataset_index)

    @property
    def samples_per_epoch(self) -> int:
        return sum(dataset.samples_per_epoch for dataset in self.datasets)

    def read_into(self, samples: np.ndarray, out: BatchRows) -> None:
        members = self.dataset_index[samples]
        numbers = self.dataset_sample_index[samples]
        for member in np.unique(members):
            own = members == member
            self.datasets[member].read_into(numbers[own], out.select(own))

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        member = self.datasets[self.dataset_index[sample]]
        return member.document_at(int(self.dataset_sample_index[sample]), offset)

    def documents(self, sample: int) -> tuple[IndexedDataset, list[int]]:
        member = self.datasets[self.dataset_index[sample]]
        return member.documents(int(self.dataset_sample_index[sample]))

    def sources(self, samples: np.ndarray) -> np.ndarray:
        return self.dataset_index[samples].astype(np.int64)

    def samples_consumed(self, count: int) -> list[int]:
        given = np.bincount(self.dataset_index[:count], minlength=len(self.datasets))
        return [
            dataset.samples_consumed(number)[0]
            for dataset, number in zip(self.datasets, given.tolist())
        ]


def share_weights(weights: Sequence[float], present: Sequence[bool]) -> list[float]:
    """The weights of the present members, normalised to sum 1; unchanged if all are present."""
    kept = [weight for weight, there in zip(weights, present) if there]
    return kept if all(present) else _normalised(kept)


def _normalised(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]
