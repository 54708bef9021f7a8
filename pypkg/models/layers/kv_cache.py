"""The key-value cache: what attention keeps of the tokens that a model has already read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from pypkg import ops
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.layers.masks import derived_positions, derived_prefix_lengths
from pypkg.parallel.host_memory import to_host

_BLOCK = 128  # the capacity is a multiple of it
_HIDDEN = np.float32(-1e30)  # the score of a key that a query does not see


@dataclass(frozen=True, eq=False)
class NewTokens:
    """What a pass of the model has to know of the tokens that it adds to a cache.

    Attributes:
        position_ids: int64 [batch, sequence] or [batch, 2, sequence], as for
            ``Decoder.hidden_states``; None: 0, 1, 2, ..., or the model takes none.
        prefix_lengths: int32 [batch], of the first pass of a ``prefix_lm`` model, padding included.
        document_starts: int32 [batch, sequence], of a first pass with padding, which is a document
            of its own; else None.
        stop: number of tokens of the longest row, with the new ones.
    """

    position_ids: paddle.Tensor | None
    prefix_lengths: paddle.Tensor | None
    document_starts: paddle.Tensor | None
    stop: int


class KVCache:
    """Keys and values of all layers, for rows of tokens that grow at their ends.

    Rows of different lengths are padded on the left; no token sees the padding. Each pass calls
    ``advance`` once and ``attend`` in every layer. The first pass holds the whole prompt: the
    prefix and the positions of a ``prefix_lm`` model follow from it. Only the first pass of a
    ``prefix_lm`` model reads tokens that see later ones.

    Memory: 2 x layers x batch x key-value heads x capacity x head_dim elements in the dtype of the
    model; the capacity is the length of a row, rounded up to a multiple of 128.

    Args:
        config: of the model.
        padding: number of first tokens of each row that are padding.
    """

    def __init__(self, config: ModelConfig, padding: Sequence[int]) -> None:
        self._config = config
        self._padding = np.asarray(padding, dtype=np.int64)
        self._length = 0  # tokens of a row that earlier passes have read, padding included
        self._new = 0  # tokens of a row in the current pass
        self._layers: dict[int, tuple[paddle.Tensor, paddle.Tensor]] = {}
        self._next_positions = np.zeros(0, dtype=np.int64)  # [batch] or [batch, 2]
        self._step = np.zeros(0, dtype=np.int64)  # what is added to them for each further token
        self._biases: dict[ops.AttentionMask, paddle.Tensor] = {}
        first_keys = paddle.to_tensor(self._padding) if self._padding.any() else None
        self._first_keys = first_keys
        self._weights: list[ops.DecoderWeights | None] = []  # once they have been looked for

    @property
    def capacity(self) -> int:
        """Tokens of a row for which there is room, those of the current pass included."""
        return -(-(self._length + self._new) // _BLOCK) * _BLOCK

    def advance(self, input_ids: paddle.Tensor) -> NewTokens:
        """Begins a pass over ``input_ids``, int64 [batch, sequence], after the last one."""
        self._length += self._new
        self._new = input_ids.shape[1]
        self._biases = {}
        stop = self._length + self._new - int(self._padding.min())
        if self._length == 0:
            return self._first(input_ids, stop)
        if self._next_positions.size == 0:
            return NewTokens(None, None, None, stop)
        further = np.arange(self._new, dtype=np.int64)
        positions = self._next_positions[..., None] + self._step[..., None] * further
        self._next_positions = self._next_positions + self._step * self._new
        return NewTokens(paddle.to_tensor(positions), None, None, stop)

    def _first(self, input_ids: paddle.Tensor, stop: int) -> NewTokens:
        config, sequence = self._config, input_ids.shape[1]
        is_padded, prefixes, starts = bool(self._padding.any()), None, None
        positions = np.maximum(np.arange(sequence) - self._padding[:, None], 0)
        self._next_positions = sequence - self._padding
        self._step = np.ones_like(self._padding)
        if config.prefix_lm:
            rows = [input_ids[row : row + 1, pad:] for row, pad in enumerate(self._padding)]
            own = [derived_prefix_lengths(config, row).item() for row in rows]
            prefixes = paddle.to_tensor(own + self._padding, dtype="int32")
            positions = self._derived_positions(rows)
        if config.position_embedding not in ("rope", "learned"):
            self._next_positions = self._next_positions[:0]
        if is_padded:
            index = np.arange(sequence)
            own_start = np.where(index < self._padding[:, None], 0, self._padding[:, None])
            starts = paddle.to_tensor(own_start, dtype="int32")
        takes_positions = self._next_positions.size > 0 and (is_padded or config.prefix_lm)
        ids = paddle.to_tensor(positions) if takes_positions else None
        return NewTokens(ids, prefixes, starts, stop)

    def _derived_positions(self, rows: Sequence[paddle.Tensor]) -> np.ndarray:
        """Those of ``derived_positions``, padded; sets what the next tokens get.

        Two tokens after the end of a row tell how its positions go on.
        """
        padded = []
        for row, pad in zip(rows, self._padding, strict=True):
            longer = paddle.concat([row, paddle.full([1, 2], -1, dtype="int64")], axis=1)
            found = to_host(derived_positions(self._config, longer)[0])
            padded.append(np.pad(found, [(0, 0)] * (found.ndim - 1) + [(int(pad), 0)]))
        positions = np.stack(padded)
        self._next_positions = positions[..., -2]
        self._step = positions[..., -1] - positions[..., -2]
        return positions[..., :-2]

    def attend(
        self,
        layer: int,
        query: paddle.Tensor,
        key: paddle.Tensor,
        value: paddle.Tensor,
        attention: Callable[..., paddle.Tensor],
        **options: Any,
    ) -> paddle.Tensor:
        """Attention of the new tokens of a layer to all tokens, whose keys and values it keeps.

        Args:
            layer: number of the layer in the model.
            query: [batch, sequence, heads_q, head_dim], rotated.
            key, value: [batch, sequence, heads_k, head_dim] of the new tokens; keys rotated.
            attention: ``ops.flash_attention`` or another that takes its arguments; the first pass
                calls it.
            options: ``mask``, ``scale`` and ``softcap`` of ``ops.flash_attention``. In later
                passes, window and slopes of the mask count; the cache knows the rest.

        Returns:
            [batch, sequence, heads_q, head_dim].
        """
        kept = self.step(layer)
        if kept is not None:
            out = ops.cached_attention(query, key, value, kept, **options)
            if out is not None:
                return out
        keys, values = self._room(layer, key)
        self._write(keys, key)
        self._write(values, value)
        if self._length == 0:
            return attention(query, key, value, **options)
        return self._attend(query, keys, values, **options)

    def step(self, layer: int) -> ops.KeptTokens | None:
        """Keys and values of ``layer``, with room for the new token.

        None unless the current pass reads one token of each row, after the prompts.
        """
        if self._new != 1 or self._length == 0:
            return None
        return ops.KeptTokens(*self._room(layer), self._length, self._first_keys)

    def weights_of_steps(
        self, find: Callable[[], ops.DecoderWeights | None]
    ) -> ops.DecoderWeights | None:
        """The result of the first call of ``find``; a model does not change while it generates."""
        if not self._weights:
            self._weights.append(find())
        return self._weights[0]

    def _write(self, kept: paddle.Tensor, new: paddle.Tensor) -> None:
        """Puts ``new``, [batch, sequence, heads_k, head_dim], behind what ``kept`` holds."""
        rows = slice(self._length, self._length + self._new)
        if kept.place.is_cpu_place():  # Paddle's assignment takes several times as long
            to_host(kept)[:, :, rows] = to_host(new).transpose([0, 2, 1, 3])
        else:
            kept[:, :, rows] = new.transpose([0, 2, 1, 3])

    def _room(
        self, layer: int, new: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Keys and values of ``layer``, each [batch, heads_k, capacity, head_dim].

        Args:
            new: [batch, sequence, heads_k, head_dim], keys of the first pass; later ones need none.
        """
        held = self._layers.get(layer)
        if held is not None and held[0].shape[2] == self.capacity:
            return held
        if held is None:
            assert new is not None
            (batch, _, heads, head_dim), length, dtype = new.shape, 0, new.dtype
        else:
            (batch, heads, length, head_dim), dtype = held[0].shape, held[0].dtype
        shape = [batch, heads, self.capacity - length, head_dim]
        keys, values = paddle.zeros(shape, dtype), paddle.zeros(shape, dtype)
        if held is not None:
            keys, values = (paddle.concat([*pair], 2) for pair in zip(held, (keys, values)))
        self._layers[layer] = keys, values
        return keys, values

    def _attend(
        self,
        query: paddle.Tensor,
        keys: paddle.Tensor,
        values: paddle.Tensor,
        mask: ops.AttentionMask,
        scale: float | None,
        softcap: float,
    ) -> paddle.Tensor:
        batch, sequence, heads_q, head_dim = query.shape
        heads_k, capacity = keys.shape[1:3]
        scale = head_dim**-0.5 if scale is None else scale
        # The queries of a key-value head are rows of one product, head by head. A single
        # query of each head needs no transpose.
        grouped = [batch, heads_k, heads_q // heads_k * sequence, head_dim]
        rows = query * scale
        if sequence > 1:
            rows = rows.transpose([0, 2, 1, 3])
        rows = rows.reshape(grouped)
        scores = ops.matmul(rows, keys, transpose_y=True).astype("float32")
        if softcap > 0:
            scores = softcap * paddle.tanh(scores / softcap)
        bias = self._biases.get(mask)
        if bias is None:
            bias = self._biases[mask] = self._bias(mask, capacity, heads_q, heads_k)
        weights = F.softmax(scores + bias).astype(values.dtype)
        out = ops.matmul(weights, values)
        if sequence == 1:
            return out.reshape(query.shape)
        return out.reshape([batch, heads_q, sequence, head_dim]).transpose([0, 2, 1, 3])

    def _bias(
        self, mask: ops.AttentionMask, capacity: int, heads_q: int, heads_k: int
    ) -> paddle.Tensor:
        """What is added to the scores: ALiBi, and a huge negative value where a key is hidden.

        Returns:
            float32 [batch or 1, heads_k or 1, heads_q / heads_k * sequence or 1, capacity].
        """
        i = self._length + np.arange(self._new)[:, None]
        j = np.arange(capacity)
        hidden = j > i
        if mask.window is not None:
            hidden = hidden | (i - j >= mask.window)
        hidden = hidden[None]
        if self._padding.any():
            hidden = hidden | (j < self._padding[:, None, None])
        bias = np.where(hidden, _HIDDEN, np.float32(0))[:, None, None]
        groups = heads_q // heads_k
        if mask.alibi_slopes is not None:
            slopes = to_host(mask.alibi_slopes).reshape([1, heads_k, groups, 1, 1])
            bias = bias + slopes * (j - i).astype(np.float32)
        elif self._new > 1:
            bias = np.broadcast_to(bias, [len(hidden), 1, groups, self._new, capacity])
        return paddle.to_tensor(bias.reshape([bias.shape[0], bias.shape[1], -1, capacity]))
