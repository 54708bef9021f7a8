"""Every family against its original implementation: logits, loss and every gradient.

The originals' own float32 noise is about 1e-5 on logits of size 5 (meta.json), which the
tolerances leave a factor of ten above.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from model_testing import FIXTURES, FORMS, GOLDEN, assert_gradients_close, overrides
from safetensors.numpy import load_file

from pypkg.models import from_pretrained
from pypkg.models.architecture.registry import weight_map
from pypkg.models.decoder import Decoder


def _gradients(model: Decoder) -> dict[str, np.ndarray]:
    """Under the names and in the layouts of the original."""
    names = weight_map(model.config)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients.update(names.to_checkpoint(name, parameter.grad.numpy()))
    return gradients


def test_all_families_have_fixtures() -> None:
    assert len(FIXTURES) >= 25
    assert {fixture.partition("/")[0] for fixture in FIXTURES} == {
        *("baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b", "bloom", "chatglm"),
        *("chatglm2", "family_variants", "glm130b", "glm4_glm", "glm4_glm4", "gpt3", "llama"),
        *("llama_variants", "mistral", "opt", "qwen", "qwen2", "qwen3", "stablelm"),
    }


@pytest.mark.parametrize(("fixture", "form"), FORMS)
def test_logits(backend: str, fixture: str, form: str, tmp_path: Path) -> None:
    shutil.copy(GOLDEN / fixture / form, tmp_path / "config.json")
    shutil.copy(GOLDEN / fixture / "model.safetensors", tmp_path)
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(tmp_path, **overrides(fixture))
    assert not model.training
    logits = model(paddle.to_tensor(expected["input_ids"]))
    assert logits.shape == list(expected["logits"].shape)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_loss_and_gradients(backend: str, fixture: str) -> None:
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(GOLDEN / fixture, **overrides(fixture))
    loss = model.loss(paddle.to_tensor(expected["input_ids"]), paddle.to_tensor(expected["labels"]))
    assert loss.shape == [] and loss.dtype == paddle.float32
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=1e-5)
    loss.backward()
    wanted = {
        name.removeprefix("grad."): value
        for name, value in expected.items()
        if name.startswith("grad.")
    }
    assert_gradients_close(_gradients(model), wanted)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_parameter_count_is_that_of_the_configuration(fixture: str) -> None:
    model = from_pretrained(GOLDEN / fixture, **overrides(fixture))
    assert sum(p.size for p in model.parameters()) == model.config.num_parameters()


@pytest.mark.parametrize("fixture", ["chatglm", "glm130b"])
def test_explicit_positions_and_prefix_are_those_derived(backend: str, fixture: str) -> None:
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(GOLDEN / fixture)
    ids, labels = (paddle.to_tensor(expected[name]) for name in ("input_ids", "labels"))
    # Row 0 of the original's mask: 1 where the first token does not see another.
    lengths = (expected["attention_mask"][:, 0, 0] == 0).sum(axis=-1).astype(np.int32)
    given = {
        "position_ids": paddle.to_tensor(expected["position_ids"]),
        "prefix_lengths": paddle.to_tensor(lengths),
    }
    np.testing.assert_array_equal(model(ids, **given).numpy(), model(ids).numpy())
    assert model.loss(ids, labels, **given).item() == model.loss(ids, labels).item()


def test_glm130b_read_from_left_to_right(backend: str) -> None:
    expected = load_file(GOLDEN / "glm130b" / "io.safetensors")
    model = from_pretrained(GOLDEN / "glm130b")
    ids, labels = (paddle.to_tensor(expected[name]) for name in ("input_ids", "causal.labels"))
    causal = {
        "position_ids": paddle.arange(32).expand([2, 32]),
        "prefix_lengths": paddle.zeros([2], dtype="int32"),
    }
    logits = model(ids, **causal).numpy()
    np.testing.assert_allclose(logits, expected["causal.logits"], rtol=0, atol=1e-4)
    assert np.abs(logits - expected["logits"]).max() > 1
    loss = model.loss(ids, labels, **causal).item()
    np.testing.assert_allclose(loss, expected["causal.loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("fixture", "changes"),
    [
        ("baichuan_13b", {"position_embedding": "rope"}),
        ("baichuan2_7b", {"norm_head": False}),
        ("family_variants/mistral_window", {"sliding_window": None}),
        ("family_variants/qwen2_tied_window", {"layer_types": None}),
        ("chatglm2", {"rope_interleaved": False}),
        ("glm4_glm", {"partial_rotary_factor": 1.0}),
        ("glm130b", {"activation": "gelu_tanh"}),
        ("gpt3", {"activation": "gelu"}),
        ("chatglm", {"residual_alpha": 7.4}),
        ("opt", {"activation": "gelu"}),
        ("opt", {"norm_eps": 1e-3}),
    ],
)
def test_each_difference_matters(fixture: str, changes: dict) -> None:
    """The fixtures would notice a field that is not honoured."""
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(GOLDEN / fixture, **{**overrides(fixture), **changes})
    logits = model(paddle.to_tensor(expected["input_ids"])).numpy()
    assert np.abs(logits - expected["logits"]).max() > 3e-4


@pytest.mark.parametrize("case", ["linear", "dynamic", "llama3", "yarn"])
def test_logits_under_rope_scaling(backend: str, case: str) -> None:
    """On 96 tokens, 32 more than max_position_embeddings."""
    expected = load_file(GOLDEN / "llama_variants" / "rope.safetensors")
    options = {
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "llama3": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    }
    scaling = {"rope_type": case, **options[case]}
    model = from_pretrained(GOLDEN / "llama", rope_scaling=scaling)
    logits = model(paddle.to_tensor(expected["input_ids"])).numpy()[0, [0, -1]]
    np.testing.assert_allclose(logits, expected[case], rtol=0, atol=1e-4)
    unscaled = from_pretrained(GOLDEN / "llama")(paddle.to_tensor(expected["input_ids"]))
    assert np.abs(unscaled.numpy()[0, -1] - expected[case][1]).max() > 1e-2
