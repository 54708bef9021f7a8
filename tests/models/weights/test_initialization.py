"""Standard deviations of random weights, measured on weights that were drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pypkg.models import ModelConfig, from_config
from pypkg.models.architecture.registry import load_config
from pypkg.models.weights.initialization import standard_deviation

_CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.05,
)


def _measured(config: ModelConfig) -> dict[str, float]:
    """Of each matrix; 2^15 values or more, so the standard error is below 0.4 %."""
    model = from_config(config, seed=5)
    matrices = {name: p.numpy() for name, p in model.named_parameters() if p.ndim == 2}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter.numpy() == (0.0 if name.endswith("bias") else 1.0)).all(), name
    return {name: float(value.std()) for name, value in matrices.items()}


@pytest.mark.parametrize("gated", [True, False])
def test_scaled_residual(gated: bool) -> None:
    config = _CONFIG.replace(
        initialization="scaled_residual",
        gated_mlp=gated,
        position_embedding="learned",
        norm="layer_norm",
        mlp_bias=True,
    )
    for name, deviation in _measured(config).items():
        ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.05 / math.sqrt(6) if ends_branch else 0.05
        assert deviation == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("gated", [True, False])
def test_deepnorm(gated: bool) -> None:
    config = _CONFIG.replace(initialization="deepnorm", gated_mlp=gated)
    measured = _measured(config)
    beta = 6**-0.5
    up = "layers.1.mlp.gate_up_proj.weight" if gated else "layers.1.mlp.up_proj.weight"
    for name, fan_in, fan_out in (
        ("layers.1.self_attn.o_proj.weight", 256, 256),
        (up, 256, 512),
        ("layers.1.mlp.down_proj.weight", 512, 256),
    ):
        expected = beta * math.sqrt(2 / (fan_in + fan_out))
        assert measured[name] == pytest.approx(expected, rel=0.02), name
    assert measured["embed_tokens.weight"] == pytest.approx(0.05, rel=0.02)
    qkv = dict(from_config(config, seed=5).named_parameters())["layers.2.self_attn.qkv_proj.weight"]
    query, key, value = np.split(qkv.numpy(), [256, 384], axis=1)
    for part, width, gain in ((query, 256, 1), (key, 128, 1), (value, 128, beta)):
        expected = gain * math.sqrt(2 / (256 + width))
        assert part.std() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "initialization"),
    [
        ("facebook/llama-7b", "normal"),
        ("gpt2", "scaled_residual"),
        ("facebook/opt-125m", "scaled_residual"),
        ("bigscience/bloom-7b1", "scaled_residual"),
        ("qwen/qwen-7b", "scaled_residual"),
        ("THUDM/glm-130b", "deepnorm"),
        ("THUDM/chatglm-6b-v1.1", "deepnorm"),
    ],
)
def test_each_family_has_its_own(name: str, initialization: str) -> None:
    assert load_config(name).initialization == initialization


@pytest.mark.parametrize("initialization", ["scaled_residual", "deepnorm"])
@pytest.mark.parametrize("kind", ["up_proj", "gate_up_proj", "down_proj"])
def test_what_a_layer_has_several_of_is_drawn_like_one(initialization: str, kind: str) -> None:
    config = _CONFIG.replace(initialization=initialization)
    one, several = f"layers.1.mlp.{kind}.weight", f"layers.1.mlp.experts.7.{kind}.weight"
    drawn = standard_deviation(config, several, (256, 512))
    assert drawn == standard_deviation(config, one, (256, 512))
    assert (drawn == config.initializer_range) == (
        initialization == "scaled_residual" and kind != "down_proj"
    )
