"""Random weights: their deviations, measured, and that parts are those of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle
import pytest
from tiny_configs import tiny

from pypkg.models import ModelConfig, from_config
from pypkg.models.architecture.registry import load_config
from pypkg.models.pretrained import parameter_shapes
from pypkg.models.weights.initialization import fill_random, standard_deviation
from pypkg.models.weights.tp_shards import tp_shard
from pypkg.parallel.host_memory import to_host

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


def _filled(
    config: ModelConfig, name: str, shape: Sequence[int], dtype: str = "float32", **place: int
) -> np.ndarray:
    """A part of a matrix; ``size`` elements of it from ``start`` on, or all."""
    size = place.pop("size", math.prod(shape))
    out = paddle.full([size], float("nan"), dtype)
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
    fill_random(out, config, name, 7, shape, **place)
    assert paddle.base.core.host_memory_stat_peak_value("Allocated", 0) == before
    return to_host(out)


def _matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in parameter_shapes(config).items() if len(shape) == 2}


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("family", ["llama", "chatglm2", "glm130b", "bloom"])
def test_a_rank_makes_its_part_of_the_whole(family: str, degree: int) -> None:
    config = tiny(family).replace(vocab_size=1021)  # the last rank's rows are padded
    for name, shape in _matrices(config).items():
        whole = _filled(config, name, shape).reshape(shape)
        for rank in range(degree):
            shard = tp_shard(config, name, degree, rank)
            expected = whole if shard is None else shard.take(whole)
            own = _filled(config, name, expected.shape, degree=degree, rank=rank)
            np.testing.assert_array_equal(own, expected.reshape(-1), err_msg=name)


@pytest.mark.parametrize("slices", [2, 3, 7])
def test_slices_of_a_part_make_it_up(slices: int) -> None:
    """As ZeRO stage 3 cuts them: flat, of one size, the last one followed by zeros."""
    config = tiny("glm130b").replace(vocab_size=1021)
    for name, shape in _matrices(config).items():
        shard = tp_shard(config, name, 2, 1)
        own_shape = shape if shard is None else shard.take(np.empty(shape, bool)).shape
        part = _filled(config, name, own_shape, degree=2, rank=1)
        size = -(-part.size // slices) + 5
        made = [
            _filled(config, name, own_shape, degree=2, rank=1, start=i * size, size=size)
            for i in range(slices)
        ]
        expected = np.pad(part, (0, slices * size - part.size))
        np.testing.assert_array_equal(np.concatenate(made), expected, err_msg=name)


def test_every_name_and_seed_has_numbers_of_its_own() -> None:
    config = tiny("llama")
    first = _filled(config, "layers.0.self_attn.o_proj.weight", (64, 64))
    other = _filled(config, "layers.1.self_attn.o_proj.weight", (64, 64))
    assert np.isin(first, other).mean() < 0.01  # by chance
    out = paddle.empty([64, 64])
    fill_random(out, config, "layers.0.self_attn.o_proj.weight", 8, (64, 64))
    assert np.isin(first, out.numpy()).mean() < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_building_takes_no_more_memory_than_the_weights(dtype: str) -> None:
    core = paddle.base.core
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = core.host_memory_stat_current_value("Allocated", 0)
    model = from_config(_CONFIG, dtype, seed=5)
    kept = core.host_memory_stat_current_value("Allocated", 0) - before
    largest = max(p.size * p.element_size() for p in model.parameters())
    assert kept >= sum(p.size * p.element_size() for p in model.parameters())
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    assert peak < kept + largest / 8


def test_what_cannot_be_filled_is_refused() -> None:
    config, name = tiny("llama"), "layers.0.self_attn.o_proj.weight"
    with pytest.raises(TypeError, match="float64"):
        fill_random(paddle.zeros([64, 64], "float64"), config, name, 1, (64, 64))
    with pytest.raises(ValueError, match="contiguous"):
        fill_random(paddle.zeros([64, 128])[:, :64].T, config, name, 1, (64, 64))
