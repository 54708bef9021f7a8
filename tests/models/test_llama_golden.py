"""LLaMA against the original implementation: logits, loss and every gradient.

The originals' own float32 noise is about 1e-5 on logits of size 5 (meta.json), which the
tolerances leave a factor of ten above.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN
from safetensors.numpy import load_file

from pypkg.models import from_pretrained
from pypkg.models.registry import weight_map

FIXTURES = ["llama", "llama_variants/biased"]


def _folder(fixture: str, config: str, tmp_path: Path) -> Path:
    """The fixture with one of its configuration files as config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(GOLDEN / fixture / config, folder / "config.json")
    shutil.copy(GOLDEN / fixture / "model.safetensors", folder)
    return folder


@pytest.mark.parametrize(
    ("fixture", "config"),
    [
        ("llama", "config.json"),
        ("llama", "config_v5.json"),
        ("llama_variants/biased", "config.json"),
    ],
)
def test_logits(backend: str, fixture: str, config: str, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(_folder(fixture, config, tmp_path))
    assert not model.training
    logits = model(paddle.to_tensor(expected["input_ids"]))
    assert logits.shape == list(expected["logits"].shape)
    np.testing.assert_allclose(logits.numpy(), expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_loss_and_gradients(backend: str, fixture: str) -> None:
    expected = load_file(GOLDEN / fixture / "io.safetensors")
    model = from_pretrained(GOLDEN / fixture)
    loss = model.loss(paddle.to_tensor(expected["input_ids"]), paddle.to_tensor(expected["labels"]))
    assert loss.shape == [] and loss.dtype == paddle.float32
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=1e-5)
    loss.backward()
    names = weight_map(model.config)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients.update(names.to_checkpoint(name, parameter.grad.numpy()))
    wanted = {
        name.removeprefix("grad."): value
        for name, value in expected.items()
        if name.startswith("grad.")
    }
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        error = np.linalg.norm(gradient - wanted[name]) / np.linalg.norm(wanted[name])
        assert error < 1e-3, f"{name}: relative error {error}"


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
