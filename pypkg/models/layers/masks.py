"""Which tokens see which, as descriptions that the attention operator understands."""

from __future__ import annotations

import math

import paddle

from pypkg import ops
from pypkg.models.architecture.checks import FULL_ATTENTION, SLIDING_ATTENTION, chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.tp_layers import tensor_degree, tensor_rank


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (Press et al., 2022, and their code for other than powers of two).

    For n heads, n a power of two, a geometric series from 2^(-8/n) with that ratio. For others the
    series of the power of two below, then every second slope of that above.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def series(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (k + 1) / count) for k in range(count)]

    return series(power) + series(2 * power)[::2][: num_heads - power]


class Masks:
    """Makes the masks of a model; the slopes are kept on the device that they were last used on."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._slopes: paddle.Tensor | None = None
        self._device: str | None = None

    def __call__(
        self,
        prefix_lengths: paddle.Tensor | None,
        document_starts: paddle.Tensor | None = None,
    ) -> dict[str, ops.AttentionMask]:
        """The mask of each type of layer that the model has (``ModelConfig.layer_types``).

        Args:
            prefix_lengths: int32 [batch], or None where no token sees those after it.
            document_starts: int32 [batch, sequence], for each token the place of the first token of
                its document, which is all that it sees; None where all is one document.
        """
        config = self._config
        described = {
            "prefix_lengths": prefix_lengths,
            "document_starts": document_starts,
            "alibi_slopes": (
                self._alibi_slopes() if config.position_embedding == "alibi" else None
            ),
        }
        windows = {FULL_ATTENTION: None, SLIDING_ATTENTION: config.sliding_window}
        return {
            layer_type: ops.AttentionMask(
                window=chosen("layer_types", layer_type, windows), **described
            )
            for layer_type in set(config.layer_types)
        }

    def _alibi_slopes(self) -> paddle.Tensor:
        device = paddle.get_device()
        if self._slopes is None or self._device != device:
            slopes = alibi_slopes(self._config.num_attention_heads)
            heads = len(slopes) // tensor_degree()  # those of this process
            own = slopes[tensor_rank() * heads :][:heads]
            self._slopes = paddle.to_tensor(own, dtype="float32")
            self._device = device
        return self._slopes


def derived_prefix_lengths(config: ModelConfig, input_ids: paddle.Tensor) -> paddle.Tensor:
    """How many tokens of each row come before its first ``sop_token_id``.

    Those see each other in both directions. A row without that token has no prefix: it is read
    from left to right.

    Args:
        input_ids: int64 [batch, sequence].

    Returns:
        int32 [batch].
    """
    start, sequence = _first(input_ids, config.sop_token_id), input_ids.shape[1]
    return paddle.where(start < sequence, start, paddle.zeros_like(start)).astype("int32")


def derived_positions(config: ModelConfig, input_ids: paddle.Tensor) -> paddle.Tensor:
    """The positions of each token around a prefix, as ChatGLM-6B and GLM-130B count them.

    Let c be the index of the row's first ``sop_token_id`` and m that of its first
    ``gmask_token_id``, or of its first ``mask_token_id`` if it has none of those.

    - ``position_encoding_2d``: positions are 0, 1, ... before c and m from there on; block
      positions are 0 before c and 1, 2, ... from there on (Du et al., 2022).
    - otherwise 0, 1, ... for rows with a ``gmask_token_id``, and for the others, m from c on.

    Rows that have no such tokens count 0, 1, ... in their place.

    Args:
        input_ids: int64 [batch, sequence].

    Returns:
        int64 [batch, 2, sequence], positions and block positions, or [batch, sequence].
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


def _first(input_ids: paddle.Tensor, token: int) -> paddle.Tensor:
    """Index of the first ``token`` of each row, or the length of the row: int64 [batch]."""
    sequence = input_ids.shape[1]
    index = paddle.arange(sequence, dtype="int64").unsqueeze(0)
    absent = paddle.full([1, 1], sequence, dtype="int64")
    return paddle.where(input_ids == token, index, absent).min(axis=1)
