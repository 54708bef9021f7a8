"""``python -m pypkg.bench learning-curves``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import pypkg.preprocess
from pypkg.bench import learning_curves
from pypkg.bench.__main__ import main
from pypkg.bench.learning_curves import OPTIMIZERS
from pypkg.bench.report.figures import curves_figure
from pypkg.config.settings import Settings


def test_every_optimizer_has_a_curve() -> None:
    (optim,) = (each for each in dataclasses.fields(Settings) if each.name == "optim")
    named = [name for name, changes in OPTIMIZERS.items() if "optim" not in changes]
    assert tuple(named) == optim.metadata["choices"]


def test_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learning-curves", "--input-dir", str(tmp_path / "none")]) == 2
    assert "--input-dir" in capsys.readouterr().err


def test_an_unknown_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--input-dir", str(tmp_path), "--tokenizer", str(tmp_path)]
    assert main(["learning-curves", *folders, "--optimizer", "sgd"]) == 2
    assert "--optimizer sgd: expected one of adamw, " in capsys.readouterr().err


@pytest.mark.slow
def test_two_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        text = "".join(f"value_{i} = {i * number}\n" for i in range(20))
        (tmp_path / f"{number}.py").write_text(text)
    tokenizer, data = tmp_path / "tokenizer", tmp_path / "data"
    arguments = ["--input_path", str(tmp_path), "--file_suffix", ".py", "--append_eos"]
    arguments += ["--train_tokenizer", "300", "--tokenizer_name_or_path", str(tokenizer)]
    assert pypkg.preprocess.main([*arguments, "--output_prefix", str(data / "text")]) == 0

    file = tmp_path / "result.json"
    chosen = ["--optimizer", "adamw", "--optimizer", "lion", "--steps", "8"]
    chosen += ["--keep", str(tmp_path / "kept")]
    folders = ["--input-dir", str(data), "--tokenizer", str(tokenizer)]
    sizes = ["--config", "quickstart-llama", "--batch", "1", "--seq", "32"]
    assert main(["learning-curves", *chosen, *folders, *sizes, "--json", str(file)]) == 0
    adamw, lion = json.loads(file.read_text())["rows"]
    assert adamw["steps"] == lion["steps"] == list(range(1, 9))
    assert adamw["losses"][0] == lion["losses"][0]
    assert adamw["losses"][-1] != lion["losses"][-1]
    assert adamw["eval_steps"] == [2, 4, 6, 8]

    # A second call takes both from the folder; with another length it trains.
    def no_training(*_: object, **__: object) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(learning_curves, "_train", no_training)
    again = ["learning-curves", *chosen, *folders, *sizes, "--json", str(file)]
    assert main(again) == 0
    assert json.loads(file.read_text())["rows"] == [adamw, lion]
    with pytest.raises(AssertionError, match="it trains"):
        main([*again, "--steps", "9"])


def test_the_figure_has_a_line_of_its_own_for_every_optimizer() -> None:
    names = [f"rule {number}" for number in range(9)]  # there are six colours
    rows = [{"optimizer": name, "steps": [1, 2], "losses": [3.0, 2.0]} for name in names]
    lines = curves_figure(rows).axes[0].lines
    assert [line.get_label() for line in lines] == names
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)
    assert len(curves_figure(rows * 3).axes[0].lines) == 27  # styles recur, no line is left out
