"""Attention masks of a model, as arguments of ``ops.flash_attention``."""

from __future__ import annotations

import math
from functools import partial

import paddle

from pypkg import ops
from pypkg.models.architecture.checks import FULL_ATTENTION, SLIDING_ATTENTION, chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.context.heads import own_heads
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


def alibi_slopes(num_heads: int) -> list[float]:
    """ALiBi slopes, one per head (Press et al., 2022).

    For n heads, n a power of two, they are the geometric series with first term and ratio
    2^(-8/n). For other n they are the series of the next lower power of two, followed by every
    second slope of the next higher power of two, as in the authors' code.

    Returns:
        ``num_heads`` slopes.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def series(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (k + 1) / count) for k in range(count)]

    return series(power) + series(2 * power)[::2][: num_heads - power]


class Masks:
    """Creates the masks of a model. ALiBi slopes are cached for the device of the last call."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._slopes: paddle.Tensor | None = None
        self._device: str | None = None

    def __call__(
        self,
        prefix_lengths: paddle.Tensor | None,
        document_starts: paddle.Tensor | None = None,
    ) -> dict[str, ops.AttentionMask]:
        """The mask of each layer type of the model (``ModelConfig.layer_types``).

        Args:
            prefix_lengths: int32 [batch], number of leading tokens of each row that attend to each
                other in both directions; None: attention is causal.
            document_starts: int32 [batch, sequence], index in the row of the first token of each
                token's document; a token attends only to its own document. None: a row is one
                document.
        """
        config = self._config
        make = partial(
            ops.AttentionMask,
            prefix_lengths=prefix_lengths,
            document_starts=document_starts,
            alibi_slopes=self._alibi_slopes() if config.position_embedding == "alibi" else None,
        )
        windows = {FULL_ATTENTION: None, SLIDING_ATTENTION: config.sliding_window}
        return {
            layer_type: make(window=chosen("layer_types", layer_type, windows))
            for layer_type in set(config.layer_types)
        }

    def _alibi_slopes(self) -> paddle.Tensor:
        device = paddle.get_device()
        if self._slopes is None or self._device != device:
            slopes = alibi_slopes(self._config.num_attention_heads)
            heads = len(slopes) // tensor_degree()  # heads of this rank
            own = slopes[tensor_rank() * heads :][:heads]
            self._slopes = paddle.to_tensor(own_heads(own), dtype="float32")
            self._device = device
        return self._slopes


def derived_prefix_lengths(config: ModelConfig, input_ids: paddle.Tensor) -> paddle.Tensor:
    """The length of each row's prefix: the number of tokens before its first ``sop_token_id``.

    The tokens of a prefix attend to each other in both directions. A row without a ``sop_token_id``
    has no prefix.

    Args:
        input_ids: int64 [batch, sequence].

    Returns:
        int32 [batch].
    """
    start, sequence = _first(input_ids, config.sop_token_id), input_ids.shape[1]
    return paddle.where(start < sequence, start, paddle.zeros_like(start)).astype("int32")


def derived_positions(config: ModelConfig, input_ids: paddle.Tensor) -> paddle.Tensor:
    """Position ids of a prefix language model, as ChatGLM-6B and GLM-130B define them.

    Let c be the index of the row's first ``sop_token_id``, and m the index of its first
    ``gmask_token_id``, or of its first ``mask_token_id`` if the row has no ``gmask_token_id``.

    - With ``position_encoding_2d``, positions are 0, 1, ... before c, and m from c on. Block
      positions are 0 before c, and 1, 2, ... from c on (Du et al., 2022).
    - Without it, positions are the same, except for rows with a ``gmask_token_id``, where they are
      0, 1, ... everywhere.

    A row without ``gmask_token_id`` and ``mask_token_id`` has positions 0, 1, ... everywhere.

    Args:
        input_ids: int64 [batch, sequence].

    Returns:
        int64 [batch, 2, sequence] with positions and block positions, or [batch, sequence].
    """
    sequence = input_ids.shape[1]
    index = paddle.arange(sequence, dtype="int64").unsqueeze(0)
    start = _first(input_ids, config.sop_token_id).unsqueeze(1)
    gmask = _first(input_ids, config.gmask_token_id).unsqueeze(1)
    mask = _first(input_ids, config.mask_token_id).unsqueeze(1)
    has_gmask = gmask < sequence
    masked = paddle.where(has_gmask, gmask, mask)
    counts_on = (index < start) | (masked == sequence)
    if not config.position_encoding_2d:
        return paddle.where(counts_on | has_gmask, index, masked)
    positions = paddle.where(counts_on, index, masked)
    block = paddle.clip(index - start + 1, min=0)
    return paddle.stack([positions, block], axis=1)


def _first(input_ids: paddle.Tensor, token: int | None) -> paddle.Tensor:
    """int64 [batch]: index of the first ``token`` of each row, or the row length without one."""
    assert token is not None  # ModelConfig requires it of a prefix_lm model
    sequence = input_ids.shape[1]
    index = paddle.arange(sequence, dtype="int64").unsqueeze(0)
    absent = paddle.full([1, 1], sequence, dtype="int64")
    return paddle.where(input_ids == token, index, absent).min(axis=1)
