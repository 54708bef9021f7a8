"""Masks and positions: ALiBi slopes, windows by layer, and what special tokens tell."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_testing import GOLDEN
from safetensors.numpy import load_file

from pypkg.models import from_config
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import load_config
from pypkg.models.layers.masks import (
    Masks,
    alibi_slopes,
    derived_positions,
    derived_prefix_lengths,
)

SOP, GMASK, MASK = 7, 8, 9


def _prefix_config(two_dimensional: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        prefix_lm=True,
        sop_token_id=SOP,
        gmask_token_id=GMASK,
        mask_token_id=MASK,
        position_encoding_2d=two_dimensional,
    )


def test_slopes_for_a_power_of_two() -> None:
    # Press et al. (2022), section 3: for 8 heads 1/2, 1/4, ... 1/256.
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-k for k in range(1, 9)], rtol=1e-15)
    np.testing.assert_allclose(alibi_slopes(16)[:3], [0.7071068, 0.5, 0.3535534], rtol=1e-6)
    assert alibi_slopes(1) == [2.0**-8]


def test_slopes_for_other_numbers_of_heads() -> None:
    for heads, power in ((12, 8), (40, 32), (112, 64), (3, 2)):
        slopes = alibi_slopes(heads)
        assert len(slopes) == heads
        assert slopes[:power] == alibi_slopes(power)
        assert slopes[power:] == alibi_slopes(2 * power)[0::2][: heads - power]


def test_layers_with_and_without_window(tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(
        num_hidden_layers=2,
        sliding_window=5,
        layer_types=("full_attention", "sliding_attention"),
    )
    masks = Masks(config)(None)
    assert {kind: mask.window for kind, mask in masks.items()} == {
        "full_attention": None,
        "sliding_attention": 5,
    }
    assert all(mask.alibi_slopes is None for mask in masks.values())
    assert [*Masks(tiny_config)(None)] == ["full_attention"]
    assert [*Masks(tiny_config.replace(sliding_window=5))(None)] == ["sliding_attention"]


def test_a_window_hides_what_is_before_it(backend: str, tiny_config: ModelConfig) -> None:
    config = tiny_config.replace(num_hidden_layers=1, sliding_window=4, initializer_range=0.3)
    model = from_config(config, seed=2)
    ids = paddle.to_tensor(np.arange(12)[None] * 5 % 61)
    changed = ids.clone()
    changed[:, 3] = 60
    difference = np.abs(model(ids).numpy() - model(changed).numpy()).max(axis=(0, 2))
    assert (difference[3:7] > 1e-3).all()
    assert difference[7:].max() < 1e-5 and difference[:3].max() < 1e-5


@pytest.mark.parametrize("fixture", ["chatglm", "glm130b"])
def test_fixtures(fixture: str) -> None:
    io = load_file(GOLDEN / fixture / "io.safetensors")
    config, ids = load_config(GOLDEN / fixture), paddle.to_tensor(io["input_ids"])
    np.testing.assert_array_equal(derived_positions(config, ids).numpy(), io["position_ids"])
    hidden = io["attention_mask"][:, 0].astype(bool)
    mask = Masks(config)(derived_prefix_lengths(config, ids))["full_attention"]
    np.testing.assert_array_equal(~mask.visible(32, 32).numpy()[:, 0], hidden)


def _by_hand(row: list[int], two_dimensional: bool) -> tuple[int, list]:
    """Prefix length and positions of one row, token by token."""
    start = row.index(SOP) if SOP in row else len(row)
    special = GMASK if GMASK in row else MASK
    positions, blocks = [], []
    for index in range(len(row)):
        generated = index >= start
        repeats = generated and special in row and (two_dimensional or special == MASK)
        positions.append(row.index(special) if repeats else index)
        blocks.append(index - start + 1 if generated else 0)
    return (start if SOP in row else 0), ([positions, blocks] if two_dimensional else positions)


_rows = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([0, 1, SOP, GMASK, MASK]), min_size=length, max_size=length),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None, max_examples=80)
@given(_rows, st.booleans())
def test_any_row(rows: list[list[int]], two_dimensional: bool) -> None:
    config, ids = _prefix_config(two_dimensional), paddle.to_tensor(rows)
    expected = [_by_hand(row, two_dimensional) for row in rows]
    lengths = derived_prefix_lengths(config, ids)
    assert lengths.dtype == paddle.int32
    assert lengths.tolist() == [length for length, _ in expected]
    assert derived_positions(config, ids).tolist() == [positions for _, positions in expected]


def test_tokens_of_the_prefix_see_each_other_and_others_only_what_was_before(backend: str) -> None:
    model = from_config(_prefix_config(True).replace(initializer_range=0.5), seed=1)
    ids = paddle.to_tensor([[1, 2, 3, GMASK, SOP, 4, 5, 6]])

    def change_at(place: int, token: int) -> np.ndarray:
        changed = ids.clone()
        changed[:, place] = token
        return np.abs(model(changed).numpy() - model(ids).numpy()).max(axis=(0, 2))

    assert change_at(2, 6).min() > 1e-4
    late = change_at(6, 1)
    assert late[:6].max() < 1e-6 and late[6:].min() > 1e-4
