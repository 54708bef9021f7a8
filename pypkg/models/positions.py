"""Rotary position embedding: the angles, their scalings for long sequences, and their tables.

The angles are computed in float32, as the original implementations do: weights were trained with
those angles, and at distant positions more exact ones would differ.
"""

from __future__ import annotations

import math

import numpy as np
import paddle

from pypkg.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig, seq_length: int) -> tuple[np.ndarray, float]:
    """The angle by which each pair of dimensions turns per position.

    Args:
        seq_length: of the sequence at hand; only the dynamic scaling depends on it.

    Returns:
        The frequencies, float32 [head_dim / 2], and the factor by which the scaling multiplies
        cosines and sines.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return _frequencies(config.rope_theta, config.head_dim), 1.0
    return _SCALINGS[scaling["rope_type"]](config, seq_length)


def rotary_tables(config: ModelConfig, seq_length: int, num_positions: int) -> np.ndarray:
    """Cosines and sines from position 0 on: float32 [2, num_positions, head_dim / 2]."""
    frequencies, factor = inverse_frequencies(config, seq_length)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), frequencies)
    return np.stack([np.cos(angles), np.sin(angles)]) * np.float32(factor)


class RotaryTable:
    """The tables of a model, made on first use and shared by its layers.

    Not part of the model's state, and kept in float32 whatever the dtype of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._key: tuple[int, str] | None = None
        self._tables: tuple[paddle.Tensor, paddle.Tensor] | None = None

    def __call__(self, seq_length: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """cos and sin, float32 [at least seq_length, head_dim / 2], on the current device."""
        trained = self._config.max_position_embeddings
        key = (max(seq_length, trained), paddle.get_device())
        if self._tables is None or key != self._key:
            cos, sin = rotary_tables(self._config, seq_length, key[0])
            self._tables = (paddle.to_tensor(cos), paddle.to_tensor(sin))
            self._key = key
        return self._tables


def _frequencies(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _linear(config: ModelConfig, seq_length: int) -> tuple[np.ndarray, float]:
    """Positions divided by a factor (Chen et al., 2023, position interpolation)."""
    frequencies = _frequencies(config.rope_theta, config.head_dim)
    return frequencies / np.float32(config.rope_scaling["factor"]), 1.0


def _dynamic(config: ModelConfig, seq_length: int) -> tuple[np.ndarray, float]:
    """Dynamic NTK: the base grows once a sequence is longer than those trained on.

    The formula is that of transformers (credited there to the Reddit users bloc97 and emozilla).
    """
    factor, trained = config.rope_scaling["factor"], config.max_position_embeddings
    stretch = factor * max(seq_length, trained) / trained - (factor - 1)
    theta = config.rope_theta * stretch ** (config.head_dim / (config.head_dim - 2))
    return _frequencies(theta, config.head_dim), 1.0


def _llama3(config: ModelConfig, seq_length: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: long wavelengths divided by a factor, short ones kept, a ramp in between.

    The formula is that of Meta's llama-models repository (apply_scaling).
    """
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = _frequencies(config.rope_theta, config.head_dim)
    wavelengths = 2 * math.pi / frequencies
    turns = scaling["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended = (1 - kept) * frequencies / scaling["factor"] + kept * frequencies
    return blended.astype(np.float32), 1.0


def _yarn(config: ModelConfig, seq_length: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023): as llama3 but with the ramp over dimensions, and cosines and
    sines scaled, which sharpens the attention.

    ``mscale`` and ``mscale_all_dim`` are DeepSeek-V2's addition, ``truncate`` is GPT-OSS's.
    """
    scaling, dim = config.rope_scaling, config.head_dim
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension_of(rotations: float) -> float:
        """The pair of dimensions that turns that many times over the trained length."""
        return (
            dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = dimension_of(scaling.get("beta_fast", 32))
    high = dimension_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    frequencies = _frequencies(config.rope_theta, dim)
    blended = frequencies / factor * ramp + frequencies * (1 - ramp)
    return blended.astype(np.float32), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: dict) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


_SCALINGS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
