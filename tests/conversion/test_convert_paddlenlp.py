"""``python -m pypkg.convert`` on models of PaddleNLP (golden/paddlenlp/ORIGIN.md), in and back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import check_paddlenlp_export
import numpy as np
import pytest

from pypkg import convert
from pypkg.models.architecture.registry import load_config
from pypkg.models.weights.formats.tensor_files import TensorFiles

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "model.safetensors"
PADDLENLP = GOLDEN / "paddlenlp/models"
PADDLENLP_MODELS = sorted(path.name for path in PADDLENLP.glob("*_safetensors"))


def _run(*arguments: str | Path) -> int:
    return convert.main([str(argument) for argument in arguments])


def _assert_same_tensors(folder: Path, expected: Path) -> None:
    first, second = TensorFiles(folder), TensorFiles(expected)
    assert first.specs().items() <= second.specs().items()
    for name, spec in first.specs().items():
        assert np.array_equal(first.read(name, spec.dtype), second.read(name, spec.dtype)), name


@pytest.mark.parametrize("model", PADDLENLP_MODELS)
def test_from_paddlenlp_and_back(model: str, tmp_path: Path) -> None:
    """Import writes a Hugging Face folder, export the tensors that PaddleNLP wrote."""
    source = PADDLENLP / model.replace("_safetensors", "_pdparams")
    assert _run("import", source, tmp_path / "in") == 0
    keys = json.loads((tmp_path / "in/config.json").read_text())
    assert "paddlenlp_version" not in keys and "architectures" in keys
    assert load_config(tmp_path / "in") == load_config(source)
    names = TensorFiles(tmp_path / "in").shapes()
    assert not any(name.startswith(model.partition("_")[0] + ".") for name in names)
    assert _run("export", tmp_path / "in", tmp_path / "out", "--format", "paddlenlp") == 0
    _assert_same_tensors(tmp_path / "out", PADDLENLP / model)
    lost = TensorFiles(PADDLENLP / model).shapes().keys() - TensorFiles(tmp_path / "out").shapes()
    assert all("inv_freq" in name or name == "lm_head.weight" for name in lost)
    with open(tmp_path / "out" / WEIGHTS, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["__metadata__"] == {"format": "np"}  # PaddleNLP refuses others
    assert load_config(tmp_path / "out") == load_config(source)


def test_bfloat16_of_paddlenlp(tmp_path: Path) -> None:
    source = GOLDEN / "paddlenlp/bfloat16/llama"
    assert _run("import", source, tmp_path / "in") == 0
    assert {spec.dtype for spec in TensorFiles(tmp_path / "in").specs().values()} == {"bfloat16"}
    assert b'"BF16"' in (tmp_path / "in" / WEIGHTS).read_bytes()
    assert _run("export", tmp_path / "in", tmp_path / "out", "--format", "paddlenlp") == 0
    _assert_same_tensors(tmp_path / "out", source)
    assert b'"U16"' in (tmp_path / "out" / WEIGHTS).read_bytes()  # as PaddleNLP writes it
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_parts_of_which_the_last_is_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing at the end of the ranks shows only in the shapes of the joined tensors."""
    shutil.copytree(PADDLENLP.parent / "parts/llama_tp4", tmp_path / "parts")
    (tmp_path / "parts/model_state.tp03.pdparams").unlink()
    assert _run("import", tmp_path / "parts", tmp_path / "in") == 2
    files = "3 files, model_state.tp00.pdparams to model_state.tp02.pdparams"
    assert files in capsys.readouterr().err


def test_fused_matrices_of_paddlenlp_are_taken_apart(tmp_path: Path) -> None:
    fused = GOLDEN / "paddlenlp/fused/llama"
    assert _run("export", fused, tmp_path / "out", "--format", "paddlenlp") == 0
    _assert_same_tensors(tmp_path / "out", PADDLENLP / "llama_safetensors")


def test_inspect_takes_paddlenlp(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("inspect", PADDLENLP / "chatglm_v2_pdparams") == 0
    shown = capsys.readouterr().out
    assert "chatglm2, " in shown and "model_state.pdparams" in shown
    count = load_config(PADDLENLP / "chatglm_v2_pdparams").num_parameters()
    assert f"parameters  {count:,} (float32 {count:,})" in shown


def test_a_family_that_paddlenlp_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("export", GOLDEN / "qwen3", tmp_path / "out", "--format", "paddlenlp") == 2
    assert "PaddleNLP has no qwen3 model" in capsys.readouterr().err


def test_a_vocabulary_grows_in_hugging_face_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = PADDLENLP / "llama_pdparams"
    assert _run("resize-vocab", source, tmp_path / "out", "--vocab_size", "200") == 2
    assert "pypkg.convert import SRC DST" in capsys.readouterr().err


def test_exports_are_those_that_paddlenlp_has_loaded(tmp_path: Path) -> None:
    """exports.json records the exports that PaddleNLP 3.0.0b4 loaded as the models they are of."""
    recorded = json.loads(check_paddlenlp_export.RECORD.read_text())
    cases = check_paddlenlp_export.make_exports(tmp_path)
    assert len(cases) == len(recorded) >= 14
    for case in cases:
        record = recorded[case.name]
        assert record["paddlenlp"].startswith("3.0.0b4") and record["same"]
        assert check_paddlenlp_export.digest(case.export) == record["sha256"], case.name
        assert len(TensorFiles(case.export).specs()) <= record["tensors"]


@pytest.mark.slow
@pytest.mark.skipif(
    "PYPKG_PADDLENLP_PYTHON" not in os.environ,
    reason="PYPKG_PADDLENLP_PYTHON does not name the Python of an environment with PaddleNLP",
)
def test_paddlenlp_loads_the_exports(tmp_path: Path) -> None:
    found = check_paddlenlp_export.check(os.environ["PYPKG_PADDLENLP_PYTHON"], tmp_path)
    assert found == json.loads(check_paddlenlp_export.RECORD.read_text())
