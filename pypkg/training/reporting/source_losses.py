"""The loss of each corpus of a blend, from the token losses that the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from pypkg.data import IGNORED_LABEL, SOURCES, Batch
from pypkg.parallel import mesh
from pypkg.parallel.context.tokens import own_part


class SourceLosses:
    """Sums of losses by corpus, kept on the device until ``sums`` or ``take`` fetches them.

    ``watch`` takes a batch before the model does. ``collect`` adds the losses after the model has
    computed them. Every rank must make the same calls in the same order.
    """

    def __init__(self, names: Sequence[str], earlier: Sequence[Sequence[float]] = ()) -> None:
        """
        Args:
            names: of the corpora; with fewer than two, nothing is watched.
            earlier: ``sums`` of a checkpoint.
        """
        self.names = list(names) if len(names) > 1 else []
        fits = len(earlier) == 2 and all(len(row) == len(self.names) for row in earlier)
        self._earlier = np.array(earlier) if fits else np.zeros((2, len(self.names)))
        self._sums: paddle.Tensor | None = None  # float64 [2, corpora]: losses, counted labels
        self._watched: list[tuple[np.ndarray, np.ndarray, list[paddle.Tensor]]] = []

    def watch(self, batch: Batch) -> dict[str, Any]:
        """The batch for the model: without ``sources``, and with a request for token losses."""
        sources = batch.pop(SOURCES, None)
        if not self.names or sources is None:
            return batch
        token_losses: list[paddle.Tensor] = []
        self._watched.append((sources, own_part(batch["labels"]), token_losses))
        return {**batch, "token_losses": token_losses}

    def collect(self) -> None:
        """Adds the losses of the watched batches, without waiting for the device."""
        for sources, labels, token_losses in self._watched:
            if not token_losses:  # another stage of the pipeline has them
                continue
            counts = (labels != IGNORED_LABEL).sum(axis=1)
            losses = token_losses[0].sum(axis=1).astype("float64")
            rows = paddle.stack([losses, paddle.to_tensor(counts, dtype="float64")])
            member = paddle.to_tensor(sources[:, None] == np.arange(len(self.names)))
            added = paddle.matmul(rows, member.astype("float64"))
            self._sums = added if self._sums is None else self._sums + added
        self._watched.clear()

    def sums(self) -> list[list[float]]:
        """[2, corpora]: sums of losses in nats, and numbers of labels, over all ranks."""
        if not self.names:
            return []
        total = paddle.zeros([2, len(self.names)], "float64") if self._sums is None else self._sums
        total = total.clone()
        current = mesh.current()
        groups = (*current.token_groups, current.pipeline)
        for group in groups:
            if group is not None:
                dist.all_reduce(total, group=group)
        return (total.numpy() + self._earlier).tolist()

    def take(self) -> dict[str, float]:
        """Mean loss by corpus, of those with labels since the last call, in nats per token."""
        sums = self.sums()
        self._sums = None
        self._earlier = np.zeros_like(self._earlier)
        if not sums:
            return {}
        return {name: loss / count for name, loss, count in zip(self.names, *sums) if count > 0}


def named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """``values`` under the names of metrics: the prefix, a slash and their own."""
    return {f"{prefix}/{name}": value for name, value in values.items()}
