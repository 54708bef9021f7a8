"""The loss of a model on whole corpora, each token predicted once."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from pypkg.console.progress import report
from pypkg.data.loading.objectives import IGNORED_LABEL
from pypkg.inference.corpora import Corpus
from pypkg.inference.windows import Batch, Window, Windowing
from pypkg.models.building import Model
from pypkg.models.decoder import Decoder
from pypkg.parallel import mesh
from pypkg.parallel.comm.collective import from_all_ranks

logger = logging.getLogger("pypkg")

LOG_SECONDS = 10.0  # between two log lines of progress


@dataclass(frozen=True)
class Measured:
    """The loss of a model on a corpus.

    Attributes:
        name: name of the corpus.
        documents, tokens: numbers of documents and tokens; each token is predicted once.
        text_bytes: as in ``Corpus``.
        nats: sum of the cross entropies of all tokens.
    """

    name: str
    documents: int
    tokens: int
    text_bytes: int | None
    nats: float

    @property
    def loss(self) -> float:
        """Mean cross entropy of a token, in nats."""
        return self.nats / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """The figures by name. bits_per_byte is None if the number of bytes is unknown."""
        bits_per_byte = None
        if self.text_bytes:
            bits_per_byte = self.nats / math.log(2) / self.text_bytes
        return {
            "corpus": self.name,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": bits_per_byte,
        }


def total(measured: Sequence[Measured]) -> Measured:
    """The sums over all corpora."""
    sizes = [each.text_bytes for each in measured]
    known = [size for size in sizes if size is not None]
    return Measured(
        "total",
        sum(each.documents for each in measured),
        sum(each.tokens for each in measured),
        sum(known) if len(known) == len(sizes) else None,
        math.fsum(each.nats for each in measured),
    )


def evaluate(
    model: Model, corpora: Sequence[Corpus], windowing: Windowing, batch_size: int
) -> list[Measured]:
    """Measures the loss on each corpus. All ranks must call this with the same arguments.

    Batches are assigned round-robin to the sample shards. The log has the first rank's progress.

    Args:
        model: in evaluation mode.
        batch_size: windows per batch.
    """
    batches = [
        (number, texts, windows)
        for number, corpus in enumerate(corpora)
        for texts, windows in _batches(corpus, windowing, batch_size)
    ]
    current = mesh.current()
    own = batches[current.sample_shard :: current.sample_shards]
    progress = _Progress(sum(_tokens(windows) for _, _, windows in own), len(own))
    sums = [0.0] * len(corpora)
    for number, texts, windows in own:
        nats = _sum_of_losses(model, windowing.batch(texts, windows))
        sums[number] += nats
        progress.advance(_tokens(windows), nats)
    # Ranks of a shard hold the same sums.
    by_shard = dict(from_all_ranks(lambda: (current.sample_shard, sums)))
    return [
        Measured(
            corpus.name,
            corpus.documents,
            corpus.num_tokens,
            corpus.text_bytes,
            math.fsum(shard[number] for shard in by_shard.values()),
        )
        for number, corpus in enumerate(corpora)
    ]


def _batches(
    corpus: Corpus, windowing: Windowing, batch_size: int
) -> list[tuple[Sequence[np.ndarray], list[Window]]]:
    """Batches of windows of similar length, the longest first."""
    windows = [
        window
        for text, tokens in enumerate(corpus.texts)
        for window in windowing.windows(text, tokens.size)
    ]
    windows.sort(key=lambda window: window.first - window.stop)
    return [
        (corpus.texts, windows[first : first + batch_size])
        for first in range(0, len(windows), batch_size)
    ]


def _tokens(windows: Sequence[Window]) -> int:
    return sum(window.stop - window.counted for window in windows)


@paddle.no_grad()
def _sum_of_losses(model: Model, batch: Batch) -> float:
    """The sum of the losses over the labels of a batch, in nats, on all ranks of the replica."""
    ids, labels = paddle.to_tensor(batch["input_ids"]), paddle.to_tensor(batch["labels"])
    if isinstance(model, Decoder):
        return float(model.loss(ids, labels, reduction="sum"))
    count = int((batch["labels"] != IGNORED_LABEL).sum())
    return float(model.evaluate({"input_ids": ids, "labels": labels})) * count


class _Progress:
    def __init__(self, tokens: int, batches: int) -> None:
        self._tokens, self._done, self._nats = tokens, 0, 0.0
        self._begin = self._logged = time.monotonic()
        logger.info("%s tokens in %s batches on this rank", f"{tokens:,}", f"{batches:,}")

    def advance(self, tokens: int, nats: float) -> None:
        self._done += tokens
        self._nats += nats
        report(f"evaluating, {self._done:,} of {self._tokens:,} tokens")
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        left = (now - self._begin) / self._done * (self._tokens - self._done)
        logger.info(
            "%s of %s tokens (%.0f %%), loss %.4f, %.0f s left",
            *(f"{self._done:,}", f"{self._tokens:,}", 100 * self._done / self._tokens),
            *(self._nats / self._done, left),
        )
