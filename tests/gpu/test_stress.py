"""`make gpu-stress`, on the CPU kernels; and that it finds what is wrong with a kernel."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import kernel_cases
import numpy as np
import pytest

pytest.importorskip("torch", reason="the stress test's arrays are torch tensors")

import checks
import kernel_build
import stress
import torch
from random_cases import DRAWS

from pypkg import _native

ON_CPU = ("--device", "cpu", "--few-elements")


@pytest.fixture(autouse=True)
def kernels_of_this_process(monkeypatch: pytest.MonkeyPatch):
    """A process loads the module once, and other tests may have done so."""
    monkeypatch.setattr(kernel_build, "load_kernels", lambda device: _native)


def test_every_kernel_is_drawn():
    assert set(DRAWS) == {case.operation for case in kernel_cases.small_cases()}


@pytest.mark.slow
def test_cpu_kernels_pass_and_the_table_comes_last():
    command = [sys.executable, stress.__file__, *ON_CPU, "--count", "30", "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "seeds 7 to 36" and lines[-1] == "passed"
    table = [line.split() for line in lines[-1 - len(DRAWS) : -1]]
    assert [(row[0], row[1], row[2]) for row in table] == [(each, "30", "0") for each in DRAWS]
    assert all(int(row[3]) > 30 and 0 < float(row[4]) <= 1 for row in table)


def test_arrays_need_no_margins():
    assert stress.main([*ON_CPU, "--count", "3", "--seed", "1", "--bare"]) == 0


def test_no_run_begins_when_the_time_is_up(capsys: pytest.CaptureFixture[str]):
    assert stress.main([*ON_CPU, "--seconds", "0"]) == 1
    assert "out of time: 0 of 200 rounds" in capsys.readouterr().out


def test_a_seed_stands_for_a_case():
    drawn = [str(stress.draw("flash_attention", seed, "cuda", 2**20)) for seed in range(20)]
    assert drawn == [str(stress.draw("flash_attention", n, "cuda", 2**20)) for n in range(20)]
    assert len(set(drawn)) == 20


class Spoiled:
    """The CPU kernels, one of which spoils an output, wherever it is in memory."""

    def __init__(self, spoil: Any):
        self._kernels = _native
        self._spoil = spoil

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)
        if name != "gated_activation_forward":
            return kernel

        def spoiled(gate: Any, up: Any, out: torch.Tensor, *arguments: Any, **settings: Any):
            kernel(gate, up, out, *arguments, **settings)
            self._spoil(out)

        return spoiled


def leave_one_out(out: torch.Tensor) -> None:
    out.view(-1)[-1] = float("nan")


def one_last_bit(out: torch.Tensor, calls: list[int] = []) -> None:  # noqa: B006
    calls.append(0)
    if len(calls) % 2 == 0:
        bits = out.view(-1)[:1].view({2: torch.int16, 4: torch.int32}[out.itemsize])
        bits.bitwise_xor_(1)


def one_beyond(out: torch.Tensor) -> None:
    storage = torch.as_strided(out, (out.numel() + 1,), (1,))
    storage[-1] = 0.0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (leave_one_out, "out is off by inf"),
        (one_last_bit, "out differs between two runs, in 1 elements"),
        (one_beyond, "written beside an array of"),
    ],
)
def test_what_is_wrong_is_found(spoil: Any, said: str, capsys: pytest.CaptureFixture[str]):
    backend = stress.GuardedBackend(Spoiled(spoil), "cpu")
    operations = ["gated_activation", "rms_norm"]
    end = time.monotonic() + 60
    tallies = stress.stress(backend, operations, range(3, 5), stress.FEW_ELEMENTS, end)
    assert tallies["gated_activation"].failures == 2 and tallies["rms_norm"].failures == 0
    found = capsys.readouterr().out
    assert said in found
    assert "--operation gated_activation --seed 4 --count 1 --few-elements" in found


def test_an_error_of_one_rounding_is_within_the_tolerance_and_two_are_not():
    backend = stress.GuardedBackend(_native, "cpu")

    def case(factor: float) -> checks.Case:
        def compare(be: Any, rng: np.random.Generator):
            x = be.numpy(be.array(rng.standard_normal(8), "float32"))
            yield checks.Comparison("x", x * factor, x, checks.tolerance("bfloat16"))

        return checks.Case("nothing", "bfloat16", str(factor), compare)

    assert stress.run_twice(case(1 + 2.0**-9), backend, 0)[1] < 1
    with pytest.raises(AssertionError, match="x is off by"):
        stress.run_twice(case(1 + 2.0**-6), backend, 0)
