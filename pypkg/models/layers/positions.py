"""Rotary position embedding: frequencies, their scalings for long sequences, and tables.

Angles are computed in float32, as in the original implementations. Released weights were trained
with these angles; more exact angles would differ from them at large positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from pypkg import ops
from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.parallel.host_memory import to_host

Scaling = dict[str, Any]  # ``ModelConfig.rope_scaling``


def inverse_frequencies(
    config: ModelConfig, seq_length: int, training: bool = True
) -> tuple[np.ndarray, float]:
    """The rotary frequencies in radians per position, one for each pair of dimensions.

    Args:
        seq_length: length of the current sequence; only dynamic scalings depend on it.
        training: whether the model is training; ``dynamic_ntk_length`` applies only in evaluation.

    Returns:
        The frequencies, float32 [rotary_dim / 2], and a factor for the cosines and sines.
    """
    scaling, trained = config.rope_scaling, config.dynamic_ntk_length
    if trained is not None and _exceeds(seq_length, trained, training):
        return _dynamic_in_steps(config, seq_length, trained), 1.0
    if scaling is None:
        return _frequencies(config.rope_theta, config.rotary_dim), 1.0
    compute = chosen("rope_scaling.rope_type", scaling["rope_type"], _SCALINGS)
    return compute(config, scaling, seq_length)


def depends_on_length(config: ModelConfig) -> bool:
    """Whether the frequencies depend on the length of the sequence.

    In that case the keys of all tokens change when a sequence becomes longer.
    """
    scaling = config.rope_scaling or {}
    return config.dynamic_ntk_length is not None or scaling.get("rope_type") == "dynamic"


def rotary_tables(
    config: ModelConfig, seq_length: int, num_positions: int, training: bool = True
) -> np.ndarray:
    """Cosines and sines of positions 0, 1, ..., float32 [2, num_positions, rotary_dim / 2].

    ``seq_length`` and ``training`` are those of ``inverse_frequencies``.
    """
    frequencies, factor = inverse_frequencies(config, seq_length, training)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)]) * np.float32(factor)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation of queries and keys by their positions.

    Args:
        cos, sin: float32 [positions, rotary_dim / 2].
        position_ids: int64 [batch, sequence] for each part of the head dimensions with its own
            positions; (None,): one part with positions 0, 1, 2, ...
        interleaved: whether pair i consists of the dimensions 2i and 2i + 1, instead of i and
            i + rotary_dim / 2.
    """

    cos: paddle.Tensor
    sin: paddle.Tensor
    position_ids: tuple[paddle.Tensor | None, ...]
    interleaved: bool

    def __call__(
        self, query: paddle.Tensor, key: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """The rotated query and key, each [batch, sequence, heads, head_dim] like its input."""
        rotary_dim = 2 * self.cos.shape[1]
        for part, position_ids in enumerate(self.position_ids):
            query, key = ops.rotary_embedding(
                query,
                key,
                self.cos,
                self.sin,
                position_ids,
                interleaved=self.interleaved,
                rotary_offset=part * rotary_dim,
            )
        return query, key


class RotaryTable:
    """The cosine and sine tables of a model, computed on first use and shared by its layers.

    The tables are float32 for every dtype of the model, and not part of the state dict.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._key: tuple[int, int, str] | None = None
        self._tables: tuple[paddle.Tensor, paddle.Tensor] | None = None

    def __call__(
        self, seq_length: int, position_ids: paddle.Tensor | None = None, training: bool = True
    ) -> Rotation:
        """The rotation on the current device.

        Args:
            seq_length: number of tokens.
            position_ids: int64 [batch, sequence]; for a model with ``position_encoding_2d``,
                [batch, 2, sequence] with positions and block positions; None: 0, 1, 2, ...
            training: as in ``inverse_frequencies``.
        """
        config = self._config
        num_positions = max(seq_length, config.max_position_embeddings)
        # A table also serves shorter sequences, unless its frequencies depend on the length.
        grown_for = seq_length if _exceeds(seq_length, config.dynamic_ntk_length, training) else 0
        key = (num_positions, grown_for, paddle.get_device())
        if self._tables is None or key != self._key:
            cos, sin = rotary_tables(config, seq_length, num_positions, training)
            self._tables = (paddle.to_tensor(cos), paddle.to_tensor(sin))
            self._key = key
        parts: tuple[paddle.Tensor | None, ...] = (position_ids,)
        if config.position_encoding_2d and position_ids is not None:
            parts = tuple(part.contiguous() for part in position_ids.unbind(axis=1))
        return Rotation(*self._tables, parts, config.rope_interleaved)


def logn_query_scale(
    config: ModelConfig,
    seq_length: int,
    training: bool,
    position_ids: paddle.Tensor | None = None,
) -> paddle.Tensor | None:
    """Factors of the queries: log(i) / log(n) for the i-th token if i > n, else 1.

    n is ``logn_attention_length``. The scaling applies only in evaluation, as in Qwen (Su, 2021,
    https://kexue.fm/archives/8823).

    Args:
        seq_length: number of tokens.
        training: whether the model is training.
        position_ids: int64 [batch, sequence], i - 1 for each query; None: 0, 1, ...

    Returns:
        float32 [seq_length], or of the shape of ``position_ids``; None if all factors are 1.
    """
    length = config.logn_attention_length
    if length is None or not _exceeds(seq_length, length, training):
        return None
    positions = np.arange(seq_length) if position_ids is None else to_host(position_ids)
    scale = np.log(positions + 1) / math.log(length)
    return paddle.to_tensor(np.maximum(scale, 1.0), dtype="float32")


def _exceeds(seq_length: int, length: int | None, training: bool) -> bool:
    return length is not None and not training and seq_length > length


def _frequencies(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _linear(config: ModelConfig, scaling: Scaling, seq_length: int) -> tuple[np.ndarray, float]:
    """Positions divided by a factor (Chen et al., 2023, position interpolation)."""
    frequencies = _frequencies(config.rope_theta, config.rotary_dim)
    return frequencies / np.float32(scaling["factor"]), 1.0


def _dynamic(config: ModelConfig, scaling: Scaling, seq_length: int) -> tuple[np.ndarray, float]:
    """Dynamic NTK: theta grows with the length of sequences longer than the trained length.

    The formula is that of transformers, which credits the Reddit users bloc97 and emozilla.
    """
    factor, trained = scaling["factor"], config.max_position_embeddings
    stretch = factor * max(seq_length, trained) / trained - (factor - 1)
    theta = config.rope_theta * stretch ** (config.rotary_dim / (config.rotary_dim - 2))
    return _frequencies(theta, config.rotary_dim), 1.0


def _dynamic_in_steps(config: ModelConfig, seq_length: int, trained: int) -> np.ndarray:
    """Dynamic NTK of Qwen: theta grows in steps, once per doubling of the length.

    The formula is that of Qwen's modeling_qwen.py (get_ntk_alpha).
    """
    alpha = 2 ** math.ceil(math.log2(seq_length / trained) + 1) - 1
    theta = config.rope_theta * alpha ** (config.rotary_dim / (config.rotary_dim - 2))
    return _frequencies(theta, config.rotary_dim)


def _llama3(config: ModelConfig, scaling: Scaling, seq_length: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: divides low frequencies by a factor, keeps high ones, interpolates in between.

    The formula is that of Meta's llama-models repository (apply_scaling).
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = _frequencies(config.rope_theta, config.rotary_dim)
    wavelengths = 2 * math.pi / frequencies
    turns = scaling["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    return blended.astype(np.float32), 1.0


def _yarn(config: ModelConfig, scaling: Scaling, seq_length: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): interpolates over dimensions, and scales cosines and sines.

    The scale sharpens the attention. ``mscale`` and ``mscale_all_dim`` come from DeepSeek-V2,
    ``truncate`` from GPT-OSS.
    """
    dim = config.rotary_dim
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        """The (fractional) index of the pair with ``rotations`` turns in the trained length."""
        return (
            dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = dimension_of(scaling.get("beta_fast", 32))
    high = dimension_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    frequencies = _frequencies(config.rope_theta, dim)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: Scaling) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


_SCALINGS: dict[str, Callable[[ModelConfig, Scaling, int], tuple[np.ndarray, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
