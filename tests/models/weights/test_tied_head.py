"""A stored head that differs from the embedding it is tied to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from model_testing import GOLDEN
from safetensors.numpy import load_file, save_file

from pypkg import convert
from pypkg.files.paths import configs_dir
from pypkg.models import from_pretrained
from pypkg.models.architecture.registry import config_from_huggingface
from pypkg.models.pretrained import stored_config
from pypkg.models.weights import tied_head

TIED = "gpt3"
IDS = [[3, 1, 4, 1, 5]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the fixtures are compared in several blocks, the last of which is not full."""
    monkeypatch.setattr(tied_head, "_ROWS", 100)


def _folder(folder: Path, change: float | None, family: str = TIED) -> Path:
    """A tied model that stores its head a second time; ``change`` is added to one element."""
    folder.mkdir()
    keys = json.loads((GOLDEN / family / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "tie_word_embeddings": True}))
    tensors = load_file(GOLDEN / family / "model.safetensors")
    if change is not None:
        head = tensors["transformer.wte.weight"].copy()
        head[-1, -1] += change  # the last row: all blocks have to be compared
        tensors["lm_head.weight"] = head
    save_file(tensors, folder / "model.safetensors")
    return folder


def _logits(folder: Path) -> np.ndarray:
    return from_pretrained(folder)(paddle.to_tensor(IDS)).numpy()


@pytest.mark.parametrize("change", [None, 0.0])
def test_an_equal_head_stays_tied(
    change: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _folder(tmp_path / "model", change)
    assert stored_config(folder).tie_word_embeddings
    assert "differs" not in caplog.text
    np.testing.assert_array_equal(_logits(folder), _logits(GOLDEN / TIED))


@pytest.mark.parametrize("rows", [7, 320, 4096])
def test_a_head_that_differs_is_used(
    rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_head, "_ROWS", rows)
    folder = _folder(tmp_path / "model", 5.0)
    model = from_pretrained(folder)
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight differs from transformer.wte.weight" in caplog.text
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(model.lm_head.weight.numpy(), stored["lm_head.weight"])
    np.testing.assert_array_equal(
        model.embed_tokens.weight.numpy(), stored["transformer.wte.weight"]
    )
    difference = _logits(folder) - _logits(GOLDEN / TIED)
    assert np.abs(difference[..., -1]).max() > 0.1
    assert np.abs(difference[..., :-1]).max() < 1e-5


def test_a_conversion_keeps_a_head_that_differs(tmp_path: Path) -> None:
    folder, out = _folder(tmp_path / "model", 5.0), tmp_path / "out"
    assert convert.main(["export", str(folder), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(_logits(out), _logits(folder))
    assert convert.main(["inspect", str(folder)]) == 0


def test_chatglm_is_tied_where_its_file_does_not_say() -> None:
    keys = json.loads((configs_dir() / "models/THUDM--chatglm-6b-v1.1.json").read_text())
    keys.pop("tie_word_embeddings", None)
    config = config_from_huggingface(keys)
    assert config.tie_word_embeddings
    assert config.num_parameters() == 6_173_286_400
