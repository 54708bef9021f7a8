"""Rotary angles against frozen values of the original implementation, and their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN

from pypkg.models import ModelConfig, from_config
from pypkg.models.architecture.llama_format import read_rope
from pypkg.models.layers.positions import RotaryTable, inverse_frequencies, logn_query_scale

CASES = sorted((GOLDEN / "llama_variants").glob("rope_*.json"))


def _config(keys: dict) -> ModelConfig:
    sizes = {key: keys[key] for key in ("hidden_size", "num_attention_heads")}
    return ModelConfig(
        vocab_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        max_position_embeddings=keys["max_position_embeddings"],
        **sizes,
        **read_rope(keys),
    )


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_frequencies_match_the_original(path: Path) -> None:
    case = json.loads(path.read_text())
    frequencies, factor = inverse_frequencies(_config(case["config"]), case["seq_length"])
    assert frequencies.dtype == np.float32
    # A few float32 roundings, in another order than the original's.
    np.testing.assert_allclose(frequencies, case["inverse_frequencies"], rtol=2e-6)
    assert factor == pytest.approx(case["factor"], rel=1e-12)


def test_all_cases_are_there() -> None:
    kinds = {
        (json.loads(path.read_text())["config"]["rope_scaling"] or {}).get("rope_type")
        for path in CASES
    }
    assert kinds == {None, "linear", "dynamic", "llama3", "yarn"}


def test_table_is_the_closed_form(tiny_config: ModelConfig) -> None:
    rotation = RotaryTable(tiny_config)(5)
    cos, sin = rotation.cos, rotation.sin
    assert cos.shape == sin.shape == [tiny_config.max_position_embeddings, 4]
    position, pair = 7, 2
    angle = position * 10000.0 ** (-2 * pair / 8)
    assert cos[position, pair].item() == pytest.approx(np.cos(angle), abs=1e-6)
    assert sin[position, pair].item() == pytest.approx(np.sin(angle), abs=1e-6)


def test_table_grows_and_shrinks_with_the_sequence(tiny_config: ModelConfig) -> None:
    """The dynamic scaling leaves short sequences as they were after it saw a long one."""
    table = RotaryTable(tiny_config.replace(rope_scaling={"type": "dynamic", "factor": 2.0}))
    before = table(8).cos.numpy()
    stretched = table(64).cos.numpy()
    assert stretched.shape[0] == 64
    assert np.abs(stretched[:32] - before).max() > 1e-3
    np.testing.assert_array_equal(table(8).cos.numpy(), before)


def _qwen(**changes: object) -> ModelConfig:
    return ModelConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        **changes,
    )


@pytest.mark.parametrize(
    ("seq_length", "alpha"), [(8, 1), (16, 1), (17, 3), (32, 3), (33, 7), (64, 7), (65, 15)]
)
def test_dynamic_base_in_steps(seq_length: int, alpha: int) -> None:
    """alpha = 2^ceil(log2(length / 16) + 1) - 1 beyond 16 tokens, in evaluation only."""
    config = _qwen(dynamic_ntk_length=16)
    evaluated, factor = inverse_frequencies(config, seq_length, training=False)
    theta = 10000.0 * alpha ** (16 / 14)
    np.testing.assert_allclose(evaluated, theta ** -(np.arange(0, 16, 2) / 16), rtol=1e-5)
    trained, _ = inverse_frequencies(config, seq_length, training=True)
    np.testing.assert_allclose(trained, 10000.0 ** -(np.arange(0, 16, 2) / 16), rtol=1e-5)
    assert factor == 1.0


def test_grown_tables_are_not_reused_for_other_lengths() -> None:
    table = RotaryTable(_qwen(dynamic_ntk_length=16))
    short, longer, longest = (table(length, training=False).cos.numpy() for length in (8, 20, 40))
    assert np.abs(short[:8] - longer[:8]).max() > 1e-3
    assert np.abs(longer[:20] - longest[:20]).max() > 1e-3
    np.testing.assert_array_equal(table(20, training=True).cos.numpy(), short)


def test_queries_grow_with_the_logarithm_of_their_position() -> None:
    config = _qwen(logn_attention_length=16)
    assert logn_query_scale(config, 16, training=False) is None
    assert logn_query_scale(config, 40, training=True) is None
    scale = logn_query_scale(config, 40, training=False).numpy()
    assert (scale[:16] == 1).all()
    np.testing.assert_allclose(scale[16:], np.log(np.arange(17, 41)) / np.log(16), rtol=1e-6)


def test_logn_scales_the_scores(backend: str) -> None:
    """A factor on queries of one token is one on its scores: as if the softmax were colder."""
    config = _qwen(initializer_range=0.3)
    scaled = from_config(config.replace(logn_attention_length=8), seed=1)
    plain = from_config(config, seed=1)
    plain.layers[0].self_attn.register_forward_pre_hook(
        lambda layer, inputs: (
            inputs[0],
            replace(inputs[1], query_scale=logn_query_scale(scaled.config, 12, training=False)),
        )
    )
    ids = paddle.arange(12).unsqueeze(0)
    in_training = scaled(ids).numpy()
    scaled.eval()
    evaluated = scaled(ids).numpy()
    np.testing.assert_array_equal(evaluated, plain(ids).numpy())
    difference = np.abs(evaluated - in_training).max(axis=(0, 2))
    assert (difference[:8] == 0).all() and (difference[8:] > 1e-4).all()


def test_one_rotation_per_half_of_the_head() -> None:
    """The first half turns by positions, the second by block positions."""
    config = _qwen(
        prefix_lm=True,
        position_encoding_2d=True,
        sop_token_id=1,
        gmask_token_id=2,
        mask_token_id=3,
    )
    positions = paddle.to_tensor([[[0, 1, 2, 2], [0, 0, 0, 1]]])
    query = paddle.ones([1, 4, 2, 16])
    turned, _ = RotaryTable(config)(4, positions)(query, query)
    first, second = turned.numpy()[0, :, 0, :8], turned.numpy()[0, :, 0, 8:]
    angles = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    for half, steps in ((first, [0, 1, 2, 2]), (second, [0, 0, 0, 1])):
        angle = np.outer(steps, angles)
        np.testing.assert_allclose(half[:, :4], np.cos(angle) - np.sin(angle), atol=1e-6)
        np.testing.assert_allclose(half[:, 4:], np.cos(angle) + np.sin(angle), atol=1e-6)
