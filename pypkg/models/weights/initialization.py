"""Standard deviations of random weights, as the authors of each family chose them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from pypkg.models.architecture.checks import chosen
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.weight_map import kind_of

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def standard_deviation(config: ModelConfig, name: str, shape: Sequence[int]) -> float | np.ndarray:
    """The standard deviation of the normal distribution of the matrix ``name`` with ``shape``.

    It depends on ``config.initialization``, with L layers:

    - normal: ``initializer_range``;
    - scaled_residual: ``initializer_range``, divided by sqrt(2 L) for the last matrix of each
      branch (Radford et al., 2019; Megatron-LM, with which OPT and BLOOM were trained);
    - deepnorm: ``initializer_range`` outside the layers. Inside, sqrt(2 / (inputs + outputs))
      (Glorot and Bengio, 2010), multiplied by (2 L)^-0.5 in the MLP, the value projection and the
      attention output (Wang et al., 2022; Zeng et al., 2022, section 2.1).

    Returns:
        One number, or an array with one number per column.
    """
    scheme = chosen("initialization", config.initialization, _SCHEMES)
    return scheme(config, name, shape)


def _normal(config: ModelConfig, name: str, shape: Sequence[int]) -> float:
    return config.initializer_range


def _scaled_residual(config: ModelConfig, name: str, shape: Sequence[int]) -> float:
    if kind_of(name) in _OUTPUTS:
        return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    return config.initializer_range


def _deepnorm(config: ModelConfig, name: str, shape: Sequence[int]) -> float | np.ndarray:
    beta = (2 * config.num_hidden_layers) ** -0.5
    (inputs, outputs), kind = shape, kind_of(name)
    if kind == "self_attn.qkv_proj.weight":
        widths = (config.query_size, config.key_value_size, config.key_value_size)
        gains = (1.0, 1.0, beta)
        return np.concatenate(
            [np.full(width, gain * _glorot(inputs, width)) for width, gain in zip(widths, gains)]
        ).astype(np.float32)
    if kind == "mlp.gate_up_proj.weight":
        return beta * _glorot(inputs, outputs // 2)  # two matrices side by side
    if kind in (*_OUTPUTS, "mlp.up_proj.weight"):
        return beta * _glorot(inputs, outputs)
    return config.initializer_range


def _glorot(inputs: int, outputs: int) -> float:
    return math.sqrt(2.0 / (inputs + outputs))


_SCHEMES: dict[str, Callable[[ModelConfig, str, Sequence[int]], float | np.ndarray]] = {
    "normal": _normal,
    "scaled_residual": _scaled_residual,
    "deepnorm": _deepnorm,
}
