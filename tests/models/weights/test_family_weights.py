"""Weights of every family: out of a checkpoint and back without a changed bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from model_testing import FIXTURES, GOLDEN, overrides
from safetensors.numpy import load_file, save_file

from pypkg.models import from_pretrained, save_pretrained
from pypkg.models.architecture.registry import load_config, weight_map
from pypkg.models.architecture.weight_map import Packing, WeightMap, linear, same_layout


@pytest.mark.parametrize("fixture", FIXTURES)
def test_import_export_import(fixture: str, tmp_path: Path) -> None:
    first = from_pretrained(GOLDEN / fixture, **overrides(fixture))
    save_pretrained(first, tmp_path)
    original = load_file(GOLDEN / fixture / "model.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    names = weight_map(first.config)
    assert exported.keys() == {name for name in original if not names.is_ignored(name)}
    for name, value in exported.items():
        assert value.tobytes() == original[name].tobytes(), name
    # The exported config.json tells everything, with the overrides that the original one needed.
    assert load_config(tmp_path) == first.config
    second = dict(from_pretrained(tmp_path).named_parameters())
    for name, parameter in first.named_parameters():
        assert parameter.numpy().tobytes() == second[name].numpy().tobytes(), name


@pytest.mark.parametrize(
    ("fixture", "prefix"),
    [
        ("gpt3", "transformer."),
        ("opt", "model."),
        ("bloom", "transformer."),
        ("llama", "model."),
        ("qwen", "transformer."),
    ],
)
def test_checkpoints_of_the_model_without_its_head(
    fixture: str, prefix: str, tmp_path: Path
) -> None:
    """As released: gpt2 has h.0.ln_1, with the mask as buffers, where its class has a prefix."""
    tensors = {
        name.removeprefix(prefix): value
        for name, value in load_file(GOLDEN / fixture / "model.safetensors").items()
    }
    if fixture == "gpt3":
        tensors["h.1.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))
        tensors["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((GOLDEN / fixture / "config.json").read_bytes())
    expected = dict(from_pretrained(GOLDEN / fixture).named_parameters())
    for name, parameter in from_pretrained(tmp_path).named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), expected[name].numpy(), err_msg=name)


def test_packing_by_head() -> None:
    """[heads, 3, size] to query | key | value."""
    stored = np.array([f"{part}{head}{row}" for head in "01" for part in "qkv" for row in "ab"])
    ours = Packing(2, (0, 1, 2)).to_model(stored)
    assert " ".join(ours) == "q0a q0b q1a q1b k0a k0b k1a k1b v0a v0b v1a v1b"


def test_packing_of_halves_the_other_way_round() -> None:
    packing = Packing(1, (1, 0))
    np.testing.assert_array_equal(packing.to_model(np.arange(6)), [3, 4, 5, 0, 1, 2])


@pytest.mark.parametrize("packing", [Packing(2, (0, 1, 2)), Packing(1, (1, 0)), Packing(3, (1, 0))])
@pytest.mark.parametrize("shape", [(12,), (12, 5)])
def test_packings_are_inverse(packing: Packing, shape: tuple[int, ...]) -> None:
    value = np.random.default_rng(0).random(shape)
    np.testing.assert_array_equal(packing.to_checkpoint(packing.to_model(value)), value)
    np.testing.assert_array_equal(packing.to_model(packing.to_checkpoint(value)), value)


def test_prefix_is_left_out_only_where_no_name_has_it() -> None:
    weights = [*same_layout({"norm": "a.norm"}), *linear("layers.{}.up", "a.{}.up")]
    names = WeightMap(weights, [r"a\.cache"], prefix="a.")
    assert names.fitted_to(["a.norm.weight", "other"]) is names
    short = names.fitted_to(["norm.weight", "0.up.weight"])
    assert short.source_shapes("norm.weight", [3]) == {"norm.weight": (3,)}
    assert short.source_shapes("layers.4.up.weight", [3, 5]) == {"4.up.weight": (5, 3)}
    assert short.is_ignored("cache") and not short.is_ignored("a.cache")
