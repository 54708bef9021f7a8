"""Rotary angles against frozen values of the original implementation, and their tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from model_testing import GOLDEN

from pypkg.models.config import ModelConfig, rope_from_huggingface
from pypkg.models.positions import RotaryTable, inverse_frequencies

CASES = sorted((GOLDEN / "llama_variants").glob("rope_*.json"))


def _config(keys: dict) -> ModelConfig:
    sizes = {key: keys[key] for key in ("hidden_size", "num_attention_heads")}
    return ModelConfig(
        vocab_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        max_position_embeddings=keys["max_position_embeddings"],
        **sizes,
        **rope_from_huggingface(keys),
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
    cos, sin = RotaryTable(tiny_config)(5)
    assert cos.shape == sin.shape == [tiny_config.max_position_embeddings, 4]
    position, pair = 7, 2
    angle = position * 10000.0 ** (-2 * pair / 8)
    assert cos[position, pair].item() == pytest.approx(np.cos(angle), abs=1e-6)
    assert sin[position, pair].item() == pytest.approx(np.sin(angle), abs=1e-6)


def test_table_grows_and_shrinks_with_the_sequence(tiny_config: ModelConfig) -> None:
    """The dynamic scaling leaves short sequences as they were after it saw a long one."""
    table = RotaryTable(tiny_config.replace(rope_scaling={"type": "dynamic", "factor": 2.0}))
    before = table(8)[0].numpy()
    stretched = table(64)[0].numpy()
    assert stretched.shape[0] == 64
    assert np.abs(stretched[:32] - before).max() > 1e-3
    np.testing.assert_array_equal(table(8)[0].numpy(), before)
