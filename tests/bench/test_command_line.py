"""``python -m pypkg.bench``: exit codes and messages, and a training step from end to end."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from pypkg.bench.case import BenchmarkError
from pypkg.bench.train_step import Contender, check_losses, start_worker
from pypkg.models.config import ModelConfig

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


def _bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pypkg.bench", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ops", "--op", "softmax"], "softmax is not a benchmarked operator; use one of rms_norm"),
        (["ops", "--op", "swiglu", "--update-docs"], "leave out --op and --dtype"),
        (["train-step", "--config", "llama-58x"], "llama-58x"),
        (["train-step", "--seq", "4096"], "max_position_embeddings (2048)"),
        (["train-step", "--contender", "x"], "use one of 'pypkg'"),
        (["ops", "--device", "cuda", "--op", "swiglu"], "--op is for CPUs; on a GPU all kernels"),
        (["ops", "--threads", "0"], "expected at least 1, found 0"),
    ],
)
def test_bad_input_is_exit_code_2_without_a_traceback(arguments, said) -> None:
    result = _bench(*arguments)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr


def test_train_step_of_a_tiny_model(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_TINY))
    output = tmp_path / "result.json"
    result = _bench(
        *("train-step", "--config", str(tmp_path), "--batch", "2", "--seq", "16", "--steps", "2"),
        *("--contender", "pypkg, reference operators", "--json", str(output)),
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["count"] == 2 and row["tokens_per_step"] == 32
    assert abs(row["first_loss"] - math.log(64)) < 0.05
    assert row["last_loss"] < row["first_loss"]
    assert row["peak_rss_bytes"] > 2**26
    assert "tokens/s" in result.stdout


def test_a_contender_that_fails_says_why() -> None:
    with (
        pytest.raises(BenchmarkError, match=r"(?s)mine failed with exit code 1:.*KeyError: 'fly'"),
        start_worker(Contender("mine", "fly"), {}),
    ):
        pass


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([(9.0, 3.0)], "the loss of random weights is 9.0000"),
        ([(math.nan, 3.0)], "the loss of random weights is nan"),
        ([(4.2, 3.0), (4.25, 3.0)], "first_loss of b is 4.2500"),
        ([(4.2, 3.0), (4.2, 3.3)], "last_loss of b is 3.3000"),
    ],
)
def test_contenders_that_do_not_train_the_same_are_refused(losses, said) -> None:
    rows = [
        {"contender": name, "first_loss": first, "last_loss": last}
        for name, (first, last) in zip("ab", losses)
    ]
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    with pytest.raises(BenchmarkError, match=said):
        check_losses(rows, config)


def test_on_a_machine_without_a_gpu_cuda_is_refused() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = _bench("ops", "--device", "cuda")
    assert result.returncode == 2
    assert "needs a GPU, and torch sees none" in result.stderr
