"""``pypkg generate`` and ``pypkg evaluate`` on a checkpoint with a tokenizer of its own."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import forked
import pytest
from tiny_configs import tiny
from training_testing import (
    ROOT,
    Workplace,
    counting_documents,
    environment,
    write_corpus,
    write_model,
)

import pypkg.convert
import pypkg.evaluate
import pypkg.generate
from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.data.tokenizers.train_bpe import train_tokenizer
from pypkg.inference.loading import Source
from pypkg.models import from_config, save_pretrained
from pypkg.training.checkpoint.manifest import write_manifest
from pypkg.training.state import TrainerState

TEXTS = ["def main(): return 1\n", "import os\nimport sys\n", "class Empty: pass\n"] * 9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output_dir with two checkpoints; the newest is checkpoint-20."""
    folder = tmp_path_factory.mktemp("run")
    for step in (9, 20):
        checkpoint = folder / f"checkpoint-{step}"
        train_tokenizer(TEXTS, 300, checkpoint, "test")
        size = load_tokenizer(checkpoint).vocab_size
        config = tiny("llama").replace(vocab_size=size, initializer_range=0.3)
        save_pretrained(from_config(config, seed=step), checkpoint)
        (checkpoint / "trainer_state.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of this process stay as they are."""
    for module in (pypkg.generate, pypkg.evaluate):
        monkeypatch.setattr(module, "configure_cpu", lambda threads: None)


def texts_of(run: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    file = tmp_path / "texts.jsonl"
    arguments = [str(run), "--max_new_tokens", "12", "--json", str(file), *options]
    assert pypkg.generate.main(arguments) == 0
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_texts_of_several_prompts(run: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = ("--prompt", "def", "--prompt", "import os", "--prompt", "class")
    found = texts_of(run, tmp_path, *prompts, "--batch_size", "2", "--seed", "5")
    printed = capsys.readouterr().out
    assert [each["prompt"] for each in found] == ["def", "import os", "class"]
    for each in found:
        assert each["prompt"] + each["text"] in printed
    assert found == texts_of(run, tmp_path, *prompts, "--batch_size", "3", "--seed", "5")
    assert found != texts_of(run, tmp_path, *prompts, "--seed", "6")
    older = texts_of(run / "checkpoint-9", tmp_path, *prompts, "--seed", "5")
    assert found != older
    assert found == texts_of(run / "checkpoint-20", tmp_path, *prompts, "--seed", "5")


def test_greedy_and_stop(run: Path, tmp_path: Path) -> None:
    options = ("--prompt", "def", "--temperature", "0", "--ignore_eos")
    (whole,) = texts_of(run, tmp_path, *options)
    assert whole["finish"] == "length" and whole["tokens"] == 12
    stop = whole["text"][4:6]
    (stopped,) = texts_of(run, tmp_path, *options, "--stop", stop)
    assert stopped["finish"] == "stop"
    assert stopped["text"] == whole["text"].partition(stop)[0]


def test_interactive(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def\n\nclass\n"))
    arguments = [str(run), "--interactive", "--max_new_tokens", "3", "--temperature", "0"]
    assert pypkg.generate.main(arguments) == 0
    answers = capsys.readouterr().out
    assert answers.startswith("def") and "\nclass" in answers


def evaluated(run: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "losses.json"
    arguments = [str(run), "--window", "16", "--json", str(file), "--data", *options]
    assert pypkg.evaluate.main(arguments) == 0
    return json.loads(file.read_text())


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("".join(TEXTS), encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]


def test_losses_of_two_corpora(run: Path, data: list[str], tmp_path: Path, capsys: Any) -> None:
    result = evaluated(run, tmp_path, *data)
    assert result["checkpoint"] == str(run / "checkpoint-20")
    assert (result["window"], result["stride"]) == (16, 8)
    first, second = result["corpora"]
    assert [first["documents"], second["documents"]] == [1, len(TEXTS)]
    assert first["bytes"] == second["bytes"] == len("".join(TEXTS))
    assert result["total"]["tokens"] == first["tokens"] + second["tokens"]
    table = capsys.readouterr().out
    assert f"{first['loss']:.4f}" in table and f"{second['bits_per_byte']:.4f}" in table
    closer = evaluated(run, tmp_path, data[0], "--stride", "1")["total"]
    assert closer["tokens"] == first["tokens"]
    assert closer["loss"] != first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["--nproc", "2"],
        ["--nproc", "2", "--tensor_parallel_degree", "2"],
        ["--nproc", "2", "--pipeline_parallel_degree", "2"],
    ],
)
def test_losses_of_several_processes(
    run: Path, data: list[str], tmp_path: Path, layout: list[str]
) -> None:
    expected = evaluated(run, tmp_path, *data)
    file = tmp_path / "divided.json"
    options = ["--window", "16", "--json", file, "--num_threads", "1", *layout, "--data", *data]
    done = forked.run(
        ["-m", "pypkg.evaluate", run, *options], environment=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    measured = ("loss", "perplexity", "bits_per_byte")
    for one, several in zip(expected["corpora"], found["corpora"], strict=True):
        assert several == one | {name: pytest.approx(one[name], rel=1e-6) for name in measured}


@pytest.mark.slow
def test_a_run_writes_texts(run: Path, tmp_path: Path) -> None:
    """At each of their steps, also after the run has gone on from a checkpoint."""
    write_corpus(tmp_path / "data" / "corpus", counting_documents())
    write_model(tmp_path / "model")
    workplace = Workplace(tmp_path)
    given = {
        "tokenizer_name_or_path": run / "checkpoint-20",
        "sample_prompts": '["def", "import os"]',
        "sample_steps": 3,
        "sample_tokens": 8,
    }
    for last in (8, 12):
        done = workplace.run(max_steps=last, **given)
        assert done.returncode == 0, done.stderr
    lines = (workplace.output_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [n for step in (3, 6, 8, 9, 12) for n in (step, step)]
    assert [row["prompt"] for row in rows] == ["def", "import os"] * 5
    assert len({row["text"] for row in rows}) > 2
    assert "step 12, 'import os' -> " in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", [], "there is no prompt"),
        ("generate", ["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
        ("generate", ["--prompt", "a", "--stop", ""], "--stop is an empty text"),
        ("generate", ["--prompt", "a", "--top_p", "2"], "top_p is 2.0"),
        ("evaluate", ["--data", "a", "--window", "1"], "--window is 1; expected 2 or more"),
        ("evaluate", ["--data", "a", "--stride", "256"], "--stride is 256, but a window has 256"),
        ("evaluate", ["--data", "a"], "--data a is not there"),
        ("evaluate", ["--data", "a", "--nproc", "3", "--tensor_parallel_degree", "2"],
         "needs a multiple of 2 processes, but there are 3"),
    ],
)  # fmt: skip
def test_mistakes(
    run: Path, tmp_path: Path, command: str, arguments: list[str], message: str, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    main = {"generate": pypkg.generate.main, "evaluate": pypkg.evaluate.main}[command]
    assert main([str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_ends_of_generation_config(run: Path, tmp_path: Path) -> None:
    tokenizer, config = load_tokenizer(run / "checkpoint-20"), tiny("llama")
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "generation_config.json"
    for named, more in (("[7, 8]", {7, 8}), ("9", {9}), ("null", set())):
        file.write_text(f'{{"eos_token_id": {named}}}')
        found = Source(str(tmp_path)).end_ids(config, tokenizer)
        assert found == {config.eos_token_id, tokenizer.eos_id} | more


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: Any) -> None:
    save_pretrained(from_config(tiny("llama"), seed=1), tmp_path / "model")
    assert pypkg.generate.main([str(tmp_path / "model"), "--prompt", "a"]) == 2
    assert "give one with --tokenizer FOLDER" in capsys.readouterr().err


def test_the_help_and_the_page_have_the_same_launch_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Paddle's launcher starts a command on the path; it has no option for a module."""
    with pytest.raises(SystemExit):
        pypkg.evaluate.main(["--help"])
    line = "python -m paddle.distributed.launch pypkg evaluate CHECKPOINT"
    assert line in " ".join(capsys.readouterr().out.split())
    assert line in (ROOT / "docs/evaluation_and_generation.md").read_text(encoding="utf-8")


def test_a_run_that_has_saved_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert pypkg.generate.main([str(tmp_path), "--prompt", "a"]) == 2
    message = f"{tmp_path} holds neither a checkpoint-N of a run nor the config.json of a model"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """What reads all weights compares them with the manifest, as a resume does."""
    checkpoint = tmp_path / "checkpoint-20"
    shutil.copytree(run / "checkpoint-20", checkpoint)
    write_manifest(checkpoint, TrainerState(global_step=20), {})
    text = tmp_path / "text.txt"
    text.write_text("import os", encoding="utf-8")
    commands = (
        lambda: pypkg.generate.main([str(checkpoint), "--prompt", "a", "--max_new_tokens", "1"]),
        lambda: pypkg.evaluate.main([str(checkpoint), "--data", str(text)]),
        lambda: pypkg.convert.main(["export", str(checkpoint), str(tmp_path / "out")]),
    )
    assert [command() for command in commands] == [0, 0, 0]
    content = (checkpoint / name).read_bytes()
    place = content.rindex(b"20") if name == "manifest.json" else len(content) - 3
    flipped = bytes([content[place] ^ 1])
    (checkpoint / name).write_bytes(content[:place] + flipped + content[place + 1 :])
    for command in commands:
        capsys.readouterr()
        assert command() == 2
        error = capsys.readouterr().err
        assert "checkpoint-20 is damaged: " in error and name in error


@pytest.mark.parametrize("prompt", ["a\udcff", "\ud800"])
def test_a_prompt_that_is_no_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    assert pypkg.generate.main([str(run), "--prompt", prompt]) == 2
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([prompt]), encoding="utf-8")
    assert pypkg.generate.main([str(run), "--prompts", str(file)]) == 2
    out, error = capsys.readouterr()
    assert error.count("is not text: its character") == 2 and not out.strip("\n")


def test_lines_that_are_no_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"def\n\xff\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    arguments = [str(run), "--interactive", "--max_new_tokens", "2"]
    assert pypkg.generate.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out.startswith("def") and "is not text" in error


def test_more_tokens_than_positions(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops = [word for letter in "aeiou \n" for word in ("--stop", letter)]
    arguments = [str(run), "--prompt", "def", "--max_new_tokens", "100000", *stops]
    assert pypkg.generate.main(arguments) == 0
    error = capsys.readouterr().err
    assert "--max_new_tokens 100,000 exceeds the" in error and "max_position_embeddings" in error


def test_a_corpus_without_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert pypkg.evaluate.main([str(run), "--data", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt has no text" in capsys.readouterr().err


def test_inspection_compares_sizes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint-20"
    shutil.copytree(run / "checkpoint-20", checkpoint)
    write_manifest(checkpoint, TrainerState(global_step=20), {})
    assert pypkg.convert.main(["inspect", str(checkpoint)]) == 0
    with (checkpoint / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert pypkg.convert.main(["inspect", str(checkpoint)]) == 2
    assert "checkpoint-20 is damaged: model.safetensors has" in capsys.readouterr().err
