"""Training objectives: next-token prediction, and the blank infilling of GLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pypkg.errors import UserError

# Arrays by argument name of ``Decoder.loss``.
Batch = dict[str, np.ndarray]

# (numbers of the samples in the dataset [batch], their tokens int64 [batch, seq_length + 1])
Objective = Callable[[np.ndarray, np.ndarray], Batch]

IGNORED_LABEL = -100

_MASK_SHARE = 0.3  # share of the samples with [MASK] spans; the others have one [gMASK] suffix
_MASKED_TOKENS = 0.15  # total length of the spans of a sample, as a share of the sequence
_MEAN_SPAN = 3


def causal(samples: np.ndarray, text: np.ndarray) -> Batch:
    """Next-token prediction: labels are the inputs shifted by one token.

    Args:
        samples: int64 [batch], sample numbers; not used.
        text: int64 [batch, seq_length + 1], the tokens of the samples.

    Returns:
        input_ids, labels: int64 [batch, seq_length]. Both are copies, because a loss mask is
        applied to the labels in place. ``np.ascontiguousarray`` would not copy a batch of one
        sample, and the two would share memory.
    """
    return {"input_ids": text[:, :-1].copy(), "labels": text[:, 1:].copy()}


@dataclass(frozen=True)
class BlankInfilling:
    """The pre-training objective of GLM: fill in the blanks of a text.

    A sample becomes a context with blanks, which is seen in both directions, followed by the
    contents of the blanks, which are generated from left to right (Du et al., 2022, "GLM: General
    Language Model Pretraining with Autoregressive Blank Infilling"). As in the training of GLM-130B
    (Zeng et al., 2022, "GLM-130B: An Open Bilingual Pre-trained Model", section 2.2), 30 % of the
    samples have short blanks [MASK], and the others have one long blank [gMASK] at the end. With
    s = ``seq_length``:

    **[gMASK]**. The first s - 1 tokens x of the sample are cut at a uniformly drawn position. At
    least one token is generated, and the context may be empty::

        input_ids  x[0] ... x[c-1]  [gMASK]  sop   x[c]    ...  x[s-3]
        labels      -   ...   -        -     x[c]  x[c+1]  ...  x[s-2]

    **[MASK]**. The lengths of the spans are drawn from a Poisson distribution with mean 3, without
    zeros, until their sum is 15 % of s; the last span is shortened to match. With k spans, the
    spans are taken out of the first s - 2k tokens at uniformly drawn positions, no two adjacent. A
    [MASK] replaces each span. The spans follow in random order; each begins with sop, and its
    labels end with eop::

        input_ids  x[0] [MASK] x[3] ... [MASK] x[9]  sop   x[6]  x[7]  x[8]  sop   x[1]  x[2]
        labels      -     -     -   ...   -     -    x[6]  x[7]  x[8]  eop   x[1]  x[2]  eop

    In both cases the sequence has length s without padding, and one or more tokens at the end of
    the sample are unused. Document boundaries are ignored: a span may contain the end of one.

    Positions are those of the models' own code for one blank, and those of GLM (blocklm_utils.py of
    THUDM/GLM) for several. The position of a context token is its index. All tokens of a blank,
    including sop, have the position of its mask; their block positions are 1, 2, ... from sop on,
    and 0 in the context. ``two_dimensional`` models (ChatGLM-6B) get positions and block positions.
    The others (GLM-130B) get only positions, which continue to count after [gMASK], as in
    generate.py of THUDM/GLM-130B.

    All random choices depend only on ``seed`` and the number of the sample. They come from NumPy's
    RandomState, whose streams are equal in all versions. A resumed run has the same batches.

    Attributes:
        seq_length: length of the sequences.
        mask_id, gmask_id, sop_id, eop_id: ids of [MASK], [gMASK], and the tokens that start and
            end a generated span.
        two_dimensional: whether position_ids are [batch, 2, seq_length] instead of [batch,
            seq_length].
        seed: seed of the random choices.

    Raises:
        UserError: ``seq_length`` is below 3.
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
            samples: int64 [batch], sample numbers in the dataset.
            text: int64 [batch, seq_length + 1], the tokens of the samples.

        Returns:
            A dict with

            - input_ids, labels: int64 [batch, seq_length]; labels are -100 before the first sop;
            - position_ids: int64 [batch, seq_length] or [batch, 2, seq_length];
            - prefix_lengths: int32 [batch], length of the context, the index of the first sop.
        """
        random = np.random.RandomState()  # seeding it for each row is faster than creating one
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
        """The row in which [gMASK] replaces the end of ``tokens``."""
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
        """The row in which [MASK] replaces short spans of ``tokens``."""
        lengths = self._span_lengths(random)
        tokens = tokens[: self.seq_length - 2 * len(lengths)]
        starts = _places(lengths, len(tokens), random)
        # After the spans are taken out, i masks of earlier spans precede the mask of span i.
        masks = starts - np.cumsum(lengths) + lengths + np.arange(len(lengths))
        kept = np.ones(len(tokens), bool)
        kept[np.repeat(starts + 1, lengths - 1) + _count_up(lengths - 1)] = False
        context = tokens.copy()
        context[starts] = self.mask_id
        context = context[kept]

        order = random.permutation(len(lengths))
        blocks = lengths[order] + 1  # length of a span with sop in the inputs, or eop in the labels
        place = _count_up(blocks)
        origin = np.repeat(starts[order], blocks) + place  # index of the label in ``tokens``
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
        """Lengths of one or more spans; their sum is the masked share of the sequence."""
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
        """The row with its positions; ``block_positions`` are those after the context."""
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
    """Random starts of non-adjacent spans with these lengths in ``total`` tokens, in order.

    The total - sum(lengths) tokens outside the spans have one more slot between and around them
    than their number. Each span takes a different slot.
    """
    slots = np.sort(random.permutation(total - lengths.sum() + 1)[: len(lengths)])
    return slots + np.cumsum(lengths) - lengths


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """The concatenation of 0, 1, ..., length - 1 for each of ``lengths``."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
