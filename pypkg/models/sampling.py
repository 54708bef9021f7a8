"""Chooses the next token from its logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pypkg.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only this number of most likely tokens may be chosen; 0: all. Applied before top_p.
        top_p: only the smallest set of most likely tokens whose probabilities sum to at least this
            value may be chosen (Holtzman et al., 2020); 1: all.
        seed: of the random numbers. No global random state is used.

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}; expected 0 (the most likely token) or more"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected more than 0 and at most 1 (all)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; expected 0 or more")


class Sampler:
    """Chooses a token for each row of a batch. Each row has its own random number generator.

    The tokens of a row therefore do not depend on other rows, up to rounding of its logits.

    Args:
        numbers: one for each row, which seeds its generator together with ``sampling.seed``.
    """

    def __init__(self, sampling: Sampling, numbers: Iterable[int]) -> None:
        self._sampling = sampling
        self._generators = [np.random.default_rng([sampling.seed, each]) for each in numbers]

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """int64 [rows], the next token of each row.

        Args:
            logits: float32 [rows, vocab].
        """
        if self._sampling.temperature == 0:
            return logits.argmax(axis=-1)
        chosen = map(self._choose, logits, self._generators)
        return np.fromiter(chosen, dtype=np.int64, count=len(logits))

    def _choose(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        logits = logits.astype(np.float64) / self._sampling.temperature
        top_k, top_p = self._sampling.top_k, self._sampling.top_p
        if 0 < top_k < logits.size:
            logits = np.where(logits < np.partition(logits, -top_k)[-top_k], -np.inf, logits)
        if top_p < 1:
            order = np.argsort(-logits, kind="stable")
            weights = np.exp(logits[order] - logits[order[0]])
            kept = np.searchsorted(np.cumsum(weights), top_p * weights.sum()) + 1
            logits[order[kept:]] = -np.inf
        # The largest of logits plus Gumbel noise is a sample of their softmax.
        return int((logits + generator.gumbel(size=logits.shape)).argmax())
