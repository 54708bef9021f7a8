"""Several datasets drawn from by weight, in the order of Megatron-LM and PaddleNLP."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pypkg import _native
from pypkg.data.gpt_dataset import GPTDataset
from pypkg.data.indexed_dataset import IndexedDataset
from pypkg.errors import UserError

MAX_DATASETS = np.iinfo(np.int16).max


def parse_blend(data_prefix: Sequence[str]) -> tuple[list[float], list[str]]:
    """Weights, adding up to 1, and prefixes of ``["0.3", "path a", "0.7", "path b"]``.

    Raises:
        UserError: the list is not made of pairs, or a weight is no positive number.
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


def member_samples(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples that each member is built with: its share, half a percent and 20 more."""
    return [math.ceil(num_samples * weight * 1.005) + 20 for weight in weights]


class BlendedDataset:
    """``size`` samples of ``datasets``, at each step of the one that lags its weight the most.

    Attributes:
        dataset_index: int16 [size], the member that gives sample i.
        dataset_sample_index: int64 [size], which of the member's samples that is.
    """

    def __init__(self, datasets: Sequence[GPTDataset], weights: Sequence[float], size: int) -> None:
        self.datasets = list(datasets)
        shares = np.array(weights, np.float64)
        self.dataset_index, self.dataset_sample_index = _native.build_blending_indices(
            shares / shares.sum(), size
        )

    @property
    def seq_length(self) -> int:
        return self.datasets[0].seq_length

    @property
    def corpora(self) -> list[IndexedDataset]:
        return [dataset.corpus for dataset in self.datasets]

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        return {"text": self.read(np.array([sample]))[0]}

    def read(self, samples: np.ndarray) -> np.ndarray:
        """int64 [batch, seq_length + 1], the samples with the numbers ``samples`` [batch]."""
        members = self.dataset_index[samples]
        numbers = self.dataset_sample_index[samples]
        out = np.empty((len(samples), self.seq_length + 1), np.int64)
        for member in np.unique(members):
            rows = members == member
            out[rows] = self.datasets[member].read(numbers[rows])
        return out

    def document_at(self, sample: int, offset: int) -> tuple[IndexedDataset, int]:
        """The corpus, and in it the document, that token ``offset`` of a sample comes from."""
        member = self.datasets[self.dataset_index[sample]]
        return member.document_at(int(self.dataset_sample_index[sample]), offset)


def share_weights(weights: Sequence[float], present: Sequence[bool]) -> list[float]:
    """Weights of the members that are present, adding up to 1; unchanged where all are."""
    kept = [weight for weight, there in zip(weights, present) if there]
    return kept if all(present) else _normalised(kept)


def _normalised(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]
