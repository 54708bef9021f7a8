"""``python -m pypkg.bench train-step`` from end to end, with a stand-in for PaddleNLP."""

from __future__ import annotations

import argparse
import json
import math
import sys

import pytest

from pypkg.bench.__main__ import main
from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.train_step.baselines import Baseline, choose_baselines
from pypkg.bench.train_step.suite import check_first_losses, check_same_loss, start_worker

_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
# Has the names of PaddleNLP that the worker uses, on top of this project's model.
_PADDLENLP = {
    "paddlenlp-3.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: paddlenlp\nVersion: 3.1\n",
    "paddlenlp/__init__.py": "",
    "paddlenlp/transformers.py": """
class AutoModelForCausalLM:
    def from_pretrained(folder, dtype, convert_from_torch):
        from pypkg.models import from_pretrained
        assert dtype == "float32" and convert_from_torch
        return from_pretrained(folder)
""",
    "paddlenlp/trainer.py": """
import baselines  # the one beside this folder, not pypkg/bench/train_step/baselines.py
import paddle
from types import SimpleNamespace as TrainingArguments
assert baselines.HERE
class Trainer:
    def __init__(self, model, args):
        self.model, self.args = model, args
    def create_optimizer_and_scheduler(self, num_training_steps):
        args = self.args
        assert args.lr_scheduler_type == "constant"
        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(args.learning_rate, lambda step: 1)
        decays = [p.name for p in self.model.parameters() if p.ndim > 1]
        self.optimizer = paddle.optimizer.AdamW(
            self.lr_scheduler, args.adam_beta1, args.adam_beta2, args.adam_epsilon,
            self.model.parameters(), args.weight_decay,
            apply_decay_param_fun=lambda name: name in decays,
            grad_clip=paddle.nn.ClipGradByGlobalNorm(args.max_grad_norm),
        )
    def training_step(self, model, inputs):
        loss = model.loss(**inputs)
        loss.backward()
        return loss
""",
    "baselines.py": "HERE = True\n",
}


@pytest.fixture
def paddlenlp(tmp_path, monkeypatch) -> list[str]:
    """The arguments for an environment with the stand-in."""
    for name, text in _PADDLENLP.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return ["--paddlenlp", sys.executable]


def test_a_tiny_model_trains_alike_in_every_environment(tmp_path, paddlenlp, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_TINY))
    output = tmp_path / "result.json"
    names = ["pypkg, reference operators", "PaddleNLP, float32"]
    arguments = ["--config", str(tmp_path), "--batch", "2", "--seq", "16", "--steps", "2"]
    arguments += [word for name in names for word in ("--baseline", name)]
    assert main(["train-step", *arguments, *paddlenlp, "--json", str(output)]) == 0
    result = json.loads(output.read_text())
    ours, theirs = result["rows"]
    assert [ours["baseline"], theirs["baseline"]] == names
    for row in result["rows"]:
        assert row["count"] == 2 and row["tokens_per_step"] == 32
        assert abs(row["first_loss"] - math.log(64)) < 0.05
        assert row["last_loss"] < row["first_loss"]
        assert row["peak_rss_bytes"] > 2**26
    # The batch, the learning rate and the other settings reach either.
    assert theirs["last_loss"] == pytest.approx(ours["last_loss"], abs=1e-5)
    assert result["matmul_rate"] > 0
    (note,) = [each for each in result["notes"] if "PaddleNLP" in each]
    assert note.startswith("PaddleNLP: paddlenlp 3.1, paddlepaddle")
    shown = capsys.readouterr().out
    assert note in shown and "`PaddleNLP`: LlamaForCausalLM" in shown


def test_what_is_set_for_paddlenlp(paddlenlp) -> None:
    options = argparse.Namespace(baseline=None, paddlenlp=paddlenlp[1], threads=3)
    baselines, _ = choose_baselines(options)
    plain, tuned = [each for each in baselines if each.stack == "paddlenlp"]
    assert plain.environment == {} and plain.python == tuned.python == sys.executable
    assert tuned.environment["OMP_NUM_THREADS"] == "3"
    assert "mmap_max=0" in tuned.environment["GLIBC_TUNABLES"]


def _fails(capsys, *arguments: str) -> str:
    assert main(["train-step", "--baseline", "PaddleNLP, float32", *arguments]) == 2
    return capsys.readouterr().err


def test_without_an_environment_paddlenlp_is_left_out(capsys) -> None:
    said = _fails(capsys)
    assert "none of the baselines can run here: --paddlenlp was not given" in said


def test_an_interpreter_that_is_not_there(tmp_path, capsys) -> None:
    said = _fails(capsys, "--paddlenlp", str(tmp_path / "python"))
    assert f"--paddlenlp {tmp_path}/python cannot be run: No such file or directory" in said


def test_what_is_no_interpreter(capsys) -> None:
    assert "--paddlenlp true cannot be run: it is no Python" in _fails(
        capsys, "--paddlenlp", "true"
    )


def test_an_environment_without_paddlenlp(tmp_path, capsys) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    python.chmod(0o755)
    said = _fails(capsys, "--paddlenlp", str(python))
    assert f"{python}: paddlenlp is not installed in its environment; install it there" in said


def test_a_baseline_that_fails_says_why() -> None:
    with (
        pytest.raises(BenchmarkError, match=r"(?s)mine failed with exit code 1:.*KeyError: 'fly'"),
        start_worker(Baseline("mine", "fly"), {}),
    ):
        pass


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"a": 9.0}, "a: the loss of random weights is 9.0000"),
        ({"a": math.nan}, "a: the loss of random weights is nan"),
        ({"a": 4.2, "b": 4.25}, "the first loss of b is 4.2500, but that of a is 4.2000"),
    ],
)
def test_baselines_that_do_not_begin_alike_are_refused(losses, said) -> None:
    with pytest.raises(BenchmarkError, match=said):
        check_first_losses(losses, math.log(64))


@pytest.mark.parametrize("last", [3.3, math.nan])
def test_baselines_that_do_not_train_alike_are_refused(last) -> None:
    with pytest.raises(BenchmarkError, match="the last loss of b is"):
        check_same_loss("last", {"a": 3.0, "b": last}, 0.2)
