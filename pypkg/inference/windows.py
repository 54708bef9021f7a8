"""Windows over the tokens of a corpus. Each token is predicted exactly once, with context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pypkg.data.loading.objectives import IGNORED_LABEL
from pypkg.models.architecture.config import ModelConfig

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Window:
    """Tokens [first, stop) of text number ``text``; those before ``counted`` are context only."""

    text: int
    first: int
    counted: int
    stop: int


@dataclass(frozen=True)
class Windowing:
    """How a text is cut into windows.

    The first window of a text predicts as many tokens as fit. Each further window predicts the
    next ``stride`` tokens, with as much context before them as fits.

    A causal model reads ``start_id`` before the first token of a text. A ``prefix_lm`` model reads
    the context in both directions, then a blank, and fills it with the predicted tokens, as in its
    pre-training (``data.loading.objectives.BlankInfilling``).

    Attributes:
        config: configuration of the model.
        length: maximum number of tokens that the model reads at once, at least 2.
        stride: tokens that a further window predicts, from 1 to ``length`` - 1.
        start_id: the token before a text.
    """

    config: ModelConfig
    length: int
    stride: int
    start_id: int

    def windows(self, text: int, size: int) -> Iterator[Window]:
        """The windows of text number ``text`` with ``size`` tokens, in order."""
        most = self.length - 1 if self.config.prefix_lm else self.length
        counted = 0
        while counted < size:
            stop = min(size, counted + (self.stride if counted else most))
            yield Window(text, max(stop - most, 0), counted, stop)
            counted = stop

    def row(self, tokens: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Input ids and labels of a window, int64 [tokens that the model reads].

        Args:
            tokens: all tokens of the text.
        """
        context = tokens[window.first : window.counted].astype(np.int64)
        counted = tokens[window.counted : window.stop].astype(np.int64)
        if self.config.prefix_lm:
            before = [*context, self.config.gmask_token_id, self.config.sop_token_id]
        else:
            start = self.start_id if window.first == 0 else tokens[window.first - 1]
            before = [start, *context]
        input_ids = np.concatenate([np.asarray(before, dtype=np.int64), counted[:-1]])
        labels = np.full(len(input_ids), IGNORED_LABEL, dtype=np.int64)
        labels[len(before) - 1 :] = counted
        return input_ids, labels

    def batch(self, texts: Sequence[np.ndarray], windows: Sequence[Window]) -> Batch:
        """``windows`` as input_ids and labels, int64 [batch, sequence].

        Shorter rows are padded on the right with token 0 and ignored labels.
        """
        rows = [self.row(texts[window.text], window) for window in windows]
        longest = max(len(ids) for ids, _ in rows)
        input_ids = np.zeros([len(rows), longest], dtype=np.int64)
        labels = np.full([len(rows), longest], IGNORED_LABEL, dtype=np.int64)
        for number, (ids, wanted) in enumerate(rows):
            input_ids[number, : len(ids)], labels[number, : len(ids)] = ids, wanted
        return {"input_ids": input_ids, "labels": labels}
