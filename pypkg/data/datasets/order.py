"""The sample order of a run, as stored in its checkpoints.

The order of the samples of a corpus is built for a number of samples: PaddleNLP's "run" order for
the samples of the run, the "epoch" order for one epoch. A resumed run may need more samples,
because it has more steps or larger batches. A new order for the larger number would repeat some
documents and skip others. Instead the run consumes the old order to its end, which is a number of
whole epochs, and appends a further part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.index.maps import num_epochs

logger = logging.getLogger("pypkg")


@dataclass
class CorpusOrder:
    """The sample order of one corpus.

    Attributes:
        name: file name of the corpus, without folder and suffix.
        documents, tokens: their numbers in the split, which identify the corpus.
        parts: the number of samples that each part of the order is built for. Part k uses the
            seed of the run + k.
        first: number of samples of the corpus consumed before the current blend.
        position: number of samples of the corpus consumed so far.
    """

    name: str
    documents: int
    tokens: int
    parts: list[int]
    first: int = 0
    position: int = 0

    def is_same_corpus(self, other: CorpusOrder) -> bool:
        return (self.name, self.documents, self.tokens) == (
            other.name,
            other.documents,
            other.tokens,
        )


@dataclass
class SampleOrder:
    """The sample order of a train split.

    Attributes:
        kind: "run" or "epoch".
        split, seq_length, seed: the other settings that determine the order of a corpus.
        weights: weights of the corpora, with sum 1.
        corpora: the orders of the corpora.
        start: number of samples of the run consumed before the current blend.
    """

    kind: str
    split: str
    seq_length: int
    seed: int
    weights: list[float]
    corpora: list[CorpusOrder]
    start: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("run", "epoch"):
            raise ValueError(f"sample_order {self.kind!r} is no order of samples")

    def to_json(self, positions: Sequence[int]) -> dict[str, Any]:
        """The order as a JSON object for a checkpoint.

        Args:
            positions: number of samples consumed of each corpus.
        """
        state = asdict(self)
        for corpus, position in zip(state["corpora"], positions, strict=True):
            corpus["position"] = position
        return state

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> SampleOrder:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: a field is missing, unknown or of a value that no run has; it is named.
        """
        _check_fields("", state, _FIELDS)
        for number, corpus in enumerate(state["corpora"]):
            _check_fields(f"corpora[{number}].", corpus, _CORPUS_FIELDS)
        if len(state["weights"]) != len(state["corpora"]):
            raise ValueError(
                f"weights has {len(state['weights'])} entries, corpora {len(state['corpora'])}"
            )
        corpora = [CorpusOrder(**corpus) for corpus in state["corpora"]]
        return cls(**{**state, "corpora": corpora})

    def resume(self, earlier: SampleOrder, consumed: int) -> None:
        """Continues the order of a checkpoint that was saved after ``consumed`` samples.

        If corpora and weights are the same, the run continues the old blend. Otherwise a new blend
        begins, in which each corpus continues after its consumed samples.
        """
        changed = [
            f"{name} was {getattr(earlier, name)!r} and is {getattr(self, name)!r}"
            for name in ("kind", "split", "seq_length", "seed")
            if getattr(earlier, name) != getattr(self, name)
        ]
        if changed:
            logger.warning(
                "since the checkpoint was saved, %s: the samples are in another order now, which "
                "begins at its beginning; some documents come again earlier than they would have",
                ", ".join(changed),
            )
            self.start = consumed
            return
        before = _matched(self.corpora, earlier.corpora)
        for corpus, known in zip(self.corpora, before):
            if known is not None:
                corpus.parts, corpus.first = list(known.parts), known.first
                corpus.position = known.position
        if before == earlier.corpora and np.allclose(self.weights, earlier.weights, rtol=1e-9):
            self.start = earlier.start
            return
        self._blend_anew(earlier, before, consumed)

    def _blend_anew(
        self, earlier: SampleOrder, before: list[CorpusOrder | None], consumed: int
    ) -> None:
        self.start = consumed
        for corpus in self.corpora:
            corpus.first = corpus.position
        gone = [c.name for c in earlier.corpora if not any(c is known for known in before)]
        new = [c.name for c, known in zip(self.corpora, before) if known is None]
        logger.info(
            "the blend is another one since the checkpoint was saved (new or changed: %s; gone or "
            "changed: %s); each corpus goes on where it was",
            ", ".join(new) or "none",
            ", ".join(gone) or "none",
        )

    def provide(self, corpus: CorpusOrder, needed: int) -> None:
        """Appends parts to the order of a corpus until it has at least ``needed`` samples."""
        tokens, seq_length = corpus.tokens, self.seq_length
        in_epoch = (tokens - 1) // seq_length
        if self.kind == "epoch" and in_epoch > 0:
            corpus.parts = [1] * max(1, -(-needed // in_epoch))
            return
        if not corpus.parts:
            corpus.parts.append(needed)
        has = sum(part_length(tokens, seq_length, part) for part in corpus.parts)
        if has < needed:
            corpus.parts.append(needed - has)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_Check = tuple[Callable[[Any], bool], str]
_TEXT: _Check = (lambda value: isinstance(value, str), "a text")
_COUNT: _Check = (_is_count, "a whole number, not negative")
_FIELDS: dict[str, _Check] = {
    "kind": (lambda value: value in ("run", "epoch"), '"run" or "epoch"'),
    "split": _TEXT,
    "seq_length": (lambda value: _is_count(value) and value > 0, "a positive whole number"),
    "seed": _COUNT,
    "weights": (_is_list_of(_is_share), "a list of numbers from 0 to 1"),
    "corpora": (_is_list_of(lambda value: isinstance(value, dict)), "a list of objects"),
    "start": _COUNT,
}
_CORPUS_FIELDS: dict[str, _Check] = {
    "name": _TEXT,
    "documents": _COUNT,
    "tokens": _COUNT,
    "parts": (_is_list_of(_is_count), "a list of whole numbers"),
    "first": _COUNT,
    "position": _COUNT,
}


def _check_fields(where: str, values: Mapping[str, Any], checks: Mapping[str, _Check]) -> None:
    for name in checks.keys() ^ values.keys():
        raise ValueError(f"{where}{name} is {'unknown' if name in values else 'missing'}")
    for name, (holds, expected) in checks.items():
        if not holds(values[name]):
            raise ValueError(f"{where}{name} is {values[name]!r:.60}; expected {expected}")


def part_length(tokens: int, seq_length: int, num_samples: int) -> int:
    """Number of samples of an order built for ``num_samples``: those of whole epochs."""
    return (num_epochs(tokens, seq_length, num_samples) * tokens - 1) // seq_length


def corpus_order(corpus: IndexedDataset, first: int, end: int) -> CorpusOrder:
    """An order without parts for the sequences ``first`` to ``end`` - 1 of a corpus."""
    return CorpusOrder(
        name=Path(corpus.prefix).name,
        documents=end - first,
        tokens=int(corpus.sizes[first:end].sum(dtype=np.int64)),
        parts=[],
    )


def _matched(
    corpora: Sequence[CorpusOrder], earlier: Sequence[CorpusOrder]
) -> list[CorpusOrder | None]:
    """For each of ``corpora``, its match among ``earlier``, or None; each match is used once."""
    left = list(earlier)
    found: list[CorpusOrder | None] = []
    for corpus in corpora:
        known = next((each for each in left if each.is_same_corpus(corpus)), None)
        if known is not None:
            left.remove(known)
        found.append(known)
    return found
