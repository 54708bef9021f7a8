"""What a model learns to predict from a sample: the next token, or the blanks of GLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pypkg.errors import UserError

# By the names of the arguments of a model's ``loss``.
Batch = dict[str, np.ndarray]

# (numbers of the samples in the dataset [batch], their tokens int64 [batch, seq_length + 1])
Objective = Callable[[np.ndarray, np.ndarray], Batch]

IGNORED_LABEL = -100

_MASK_SHARE = 0.3  # of the samples have [MASK] spans, the others one [gMASK] suffix
_MASKED_TOKENS = 0.15  # share of the sequence that the spans of a sample add up to
_MEAN_SPAN = 3


def causal(samples: np.ndarray, text: np.ndarray) -> Batch:
    """Next-token prediction: input_ids and labels, int64 [batch, seq_length], shifted by one.

    Both are copies. Labels are written to where a loss mask applies, and a batch of one sample is
    contiguous as it is, so that ``np.ascontiguousarray`` would let the two share memory.
    """
    return {"input_ids": text[:, :-1].copy(), "labels": text[:, 1:].copy()}


@dataclass(frozen=True)
class BlankInfilling:
    """The pre-training objective of GLM: fill in the blanks of a text, in any order.

    A sample becomes a context with blanks, seen in both directions, and after it the blanks'
    contents, generated from left to right (Du et al., 2022, "GLM: General Language Model
    Pretraining with Autoregressive Blank Infilling"). As GLM-130B was trained (Zeng et al., 2022,
    "GLM-130B: An Open Bilingual Pre-trained Model", section 2.2), 30 % of the samples have short
    blanks [MASK], the others one long blank [gMASK] at the end. With s = ``seq_length``:

    **[gMASK]**. The first s - 1 tokens x of the sample are cut at a place drawn uniformly; at
    least one token is generated, and the context may be empty::

        input_ids  x[0] ... x[c-1]  [gMASK]  sop   x[c]    ...  x[s-3]
        labels      -   ...   -        -     x[c]  x[c+1]  ...  x[s-2]

    **[MASK]**. Lengths of spans are drawn from a Poisson distribution of mean 3, without zeros,
    until they add up to 15 % of s; the last one is shortened to meet that. Of the first s - 2k
    tokens, k being the number of spans, the spans are cut out at places drawn uniformly, no two
    of them adjacent, and a [MASK] stands in for each. They follow in random order, each after
    its own sop and ending with eop in the labels::

        input_ids  x[0] [MASK] x[3] ... [MASK] x[9]  sop   x[6]  x[7]  x[8]  sop   x[1]  x[2]
        labels      -     -     -   ...   -     -    x[6]  x[7]  x[8]  eop   x[1]  x[2]  eop

    Either way the sequence is s long without padding, and one or more tokens at the end of the
    sample are left out. Documents are not kept apart: a span may hold the end of one.

    Positions follow the models' own code for one blank and, for several, GLM's (blocklm_utils.py
    of THUDM/GLM): a context token's position is its index; all tokens of a blank, sop included,
    have the position of its mask, and its block position counts 1, 2, ... from sop on (0 in the
    context). ``two_dimensional`` models (ChatGLM-6B) get both, the others (GLM-130B) the first
    alone - save that for [gMASK] the single position simply counts on, as generate.py of
    THUDM/GLM-130B has it.

    All random choices follow from ``seed`` and the number of the sample, by NumPy's RandomState,
    whose streams are the same in every version: a resumed run sees what it would have seen.

    Attributes:
        mask_id, gmask_id, sop_id, eop_id: ids of [MASK], [gMASK], and the tokens that start and
            end what is generated.
        two_dimensional: position_ids are [batch, 2, seq_length], else [batch, seq_length].
    """

    seq_length: int
    mask_id: int
    gmask_id: int
    sop_id: int
    eop_id: int
    two_dimensional: bool
    seed: int

    def __post_init__(self) -> None:
        if self.seq_length < 3:
            raise UserError(
                f"max_seq_length is {self.seq_length}; filling in blanks needs at least 3 tokens"
            )

    def __call__(self, samples: np.ndarray, text: np.ndarray) -> Batch:
        """
        Args:
            samples: [batch], numbers of the samples in their dataset.
            text: int64 [batch, seq_length + 1], their tokens.

        Returns:
            input_ids, labels: int64 [batch, seq_length]; labels are -100 up to the first sop.
            position_ids: int64 [batch, seq_length] or [batch, 2, seq_length].
            prefix_lengths: int32 [batch], the length of the context, which is the index of the
                first sop.
        """
        random = np.random.RandomState()  # seeded anew for each row: quicker than a new one
        rows = [self._row(int(sample), tokens, random) for sample, tokens in zip(samples, text)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["prefix_lengths"] = batch["prefix_lengths"].astype(np.int32)
        return batch

    def _row(self, sample: int, tokens: np.ndarray, random: np.random.RandomState) -> Batch:
        random.seed([self.seed, sample & 0xFFFFFFFF, sample >> 32])
        if random.random_sample() < _MASK_SHARE:
            return self._fill_spans(tokens, random)
        return self._continue(tokens[: self.seq_length - 1], random)

    def _continue(self, tokens: np.ndarray, random: np.random.RandomState) -> Batch:
        """[gMASK] in place of the rest of ``tokens``."""
        cut = random.randint(0, len(tokens))
        context, rest = tokens[:cut], tokens[cut:]
        input_ids = np.concatenate([context, [self.gmask_id, self.sop_id], rest[:-1]])
        labels = np.concatenate([np.full(cut + 1, IGNORED_LABEL), rest])
        positions = np.arange(self.seq_length)
        if self.two_dimensional:
            positions[cut + 1 :] = cut
        return self._with_positions(
            input_ids, labels, cut + 1, positions, np.arange(1, len(rest) + 1)
        )

    def _fill_spans(self, tokens: np.ndarray, random: np.random.RandomState) -> Batch:
        """[MASK] in place of short spans of ``tokens``."""
        lengths = self._span_lengths(random)
        tokens = tokens[: self.seq_length - 2 * len(lengths)]
        starts = _places(lengths, len(tokens), random)
        # After the cut, span i follows the tokens before it and the i masks of earlier spans.
        masks = starts - np.cumsum(lengths) + lengths + np.arange(len(lengths))
        kept = np.ones(len(tokens), bool)
        kept[np.repeat(starts + 1, lengths - 1) + _count_up(lengths - 1)] = False
        context = tokens.copy()
        context[starts] = self.mask_id
        context = context[kept]

        order = random.permutation(len(lengths))
        blocks = lengths[order] + 1  # a span, and sop before it or eop behind it
        place = _count_up(blocks)
        origin = np.repeat(starts[order], blocks) + place  # of the label, until its span ends
        is_end = place == np.repeat(lengths[order], blocks)
        spans = tokens[np.where(is_end, 0, origin)]
        labels = np.where(is_end, self.eop_id, spans)
        input_ids = np.where(place == 0, self.sop_id, np.roll(labels, 1))
        return self._with_positions(
            np.concatenate([context, input_ids]),
            np.concatenate([np.full(len(context), IGNORED_LABEL), labels]),
            len(context),
            np.concatenate([np.arange(len(context)), np.repeat(masks[order], blocks)]),
            place + 1,
        )

    def _span_lengths(self, random: np.random.RandomState) -> np.ndarray:
        """At least one, adding up to the share of the sequence that is masked."""
        lengths: list[int] = []
        left = max(1, int(_MASKED_TOKENS * self.seq_length))
        while left > 0:
            length = min(int(random.poisson(_MEAN_SPAN)), left)
            if length > 0:
                lengths.append(length)
                left -= length
        return np.array(lengths)

    def _with_positions(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        prefix_length: int,
        positions: np.ndarray,
        block_positions: np.ndarray,
    ) -> Batch:
        """One row; ``block_positions`` are those after the context."""
        if self.two_dimensional:
            blocks = np.concatenate([np.zeros(prefix_length, np.int64), block_positions])
            positions = np.stack([positions, blocks])
        return {
            "input_ids": input_ids.astype(np.int64),
            "labels": labels.astype(np.int64),
            "position_ids": positions.astype(np.int64),
            "prefix_lengths": np.array(prefix_length, np.int64),
        }


def _places(lengths: np.ndarray, total: int, random: np.random.RandomState) -> np.ndarray:
    """Starts of spans of these lengths in ``total`` tokens, in order, a gap between any two.

    Without the spans there are total - sum(lengths) tokens and one more slot beside them than
    that; each span takes a slot of its own.
    """
    slots = np.sort(random.permutation(total - lengths.sum() + 1)[: len(lengths)])
    return slots + np.cumsum(lengths) - lengths


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each of ``lengths`` in turn."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
