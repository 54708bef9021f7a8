"""``python -m pypkg.bench``: exit codes and messages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


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
        (["train-step", "--baseline", "x"], "use one of 'pypkg'"),
        (["ops", "--device", "cuda", "--op", "swiglu"], "--op is for CPUs; on a GPU all kernels"),
        (["ops", "--threads", "0"], "expected at least 1, found 0"),
    ],
)
def test_bad_input_is_exit_code_2_without_a_traceback(arguments, said) -> None:
    result = _bench(*arguments)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr


def test_on_a_machine_without_a_gpu_cuda_is_refused() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = _bench("ops", "--device", "cuda")
    assert result.returncode == 2
    assert "needs a GPU, and torch sees none" in result.stderr
