"""What the doctor says about facts of machines and devices: stand-ins for each finding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pypkg.training.doctor.device import device_findings
from pypkg.training.doctor.facts import Facts
from pypkg.training.doctor.findings import Severity, exit_code
from pypkg.training.doctor.machine import Needs, machine_findings

GIB = 2**30
GPU = Facts(
    host="10.0.0.1", clock=1000.0, python="3.11.2", package="0.1.0", paddle="3.3.1 with CUDA 12.6",
    kernel_sources="a" * 64, device="gpu", device_name="NVIDIA A100-SXM4-80GB", capability=(8, 0),
    device_memory=80 * GIB, device_free=79 * GIB, host_free=900 * GIB, driver_cuda=(12, 8),
    paddle_cuda="12.6", kernels_cuda="12.6.77", architectures="80-real,90a-real,120",
    ops_backend="compiled", gpus=8, cores=64, ranks=8, threads=8, shared_memory=64 * GIB,
    locked_memory=None, open_files=1 << 20, disk_free=10**13,
)  # fmt: skip
CPU = replace(
    GPU, device="cpu", device_name="Xeon", capability=None, driver_cuda=None, paddle_cuda=None,
    kernels_cuda=None, architectures=None, gpus=0, ranks=2, threads=4, cores=8,
)  # fmt: skip
NEEDS = Needs(checkpoint=10**12, kept=3, staged=GIB)


def findings(*facts: Facts, needs: Needs = NEEDS):
    return [*device_findings(facts), *machine_findings(facts, needs)]


@pytest.mark.parametrize("fact", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_machine_in_order(fact):
    found = findings(fact, fact)
    assert exit_code(found) == 0
    assert [each.check for each in found] == ["device", "machines"]
    assert found[-1].what == "1 machine with 2 ranks"
    assert findings(fact)[-1].what == "1 machine with 1 rank"


@pytest.mark.parametrize(
    ("fact", "severity", "words"),
    [
        (replace(CPU, gpus=8), 1, ("8 GPUs", "build for CPUs", "paddlepaddle-gpu")),
        (replace(GPU, driver_cuda=(11, 8)), 2, ("CUDA 11.8 at most", "12.6", "newer driver")),
        (replace(GPU, kernels_cuda="11.8"), 2, ("CUDA 11.8", "12.6", "nvcc of CUDA 12")),
        (replace(GPU, ops_backend="reference"), 1, ("reference", "pip install .")),
        (replace(GPU, capability=(7, 0)), 2, ("80-real", "7.0", "ARCHITECTURES=70")),
        (replace(GPU, capability=(9, 0), architectures="80-real"), 2, ("9.0",)),
        (replace(GPU, device_free=60 * GIB), 1, ("20.0 GiB of 80", "nvidia-smi")),
        (replace(GPU, shared_memory=64 * 2**20), 1, ("64 MiB", "--shm-size")),
        (replace(GPU, locked_memory=64 * 2**10), 1, ("0.0625 MiB", "ulimit -l")),
        (replace(GPU, open_files=256), 1, ("256", "ulimit -n")),
        (replace(GPU, cores=4), 1, ("8 ranks share 4 cores",)),
        (replace(CPU, threads=8), 1, ("2 ranks with 8 threads each share 8 cores",)),
        (replace(GPU, host_free=7 * GIB), 2, ("7 GiB are free", "async_save_memory")),
        (replace(GPU, disk_free=10**12 - 1), 2, ("1e+03 GB are free", "Free some space")),
        (replace(GPU, disk_free=2 * 10**12), 1, ("2e+03 GB", "lower save_total_limit")),
    ],
)
def test_what_is_wrong_with_a_machine(fact, severity, words):
    problems = [each for each in findings(fact, fact) if each.severity]
    assert len({each.check for each in problems}) == 1
    assert exit_code(problems) == severity
    for word in words:
        assert word in problems[0].line()


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        ("80-real,90a-real", (9, 0), True),
        ("80-real;90a-real", (8, 6), True),
        ("80-real, 90a-real", (10, 0), False),
    ],
)
def test_which_devices_run_which_kernels(architectures, capability, fits):
    found = device_findings([replace(GPU, architectures=architectures, capability=capability)])
    assert exit_code(found) == (0 if fits else 2)


def test_machines_that_differ(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "10.0.0.1:1,10.0.0.2:1")
    other = replace(GPU, host="10.0.0.2")
    for change, severity, words in (
        ({"package": "0.2.0"}, 2, ("pypkg differ: 0.1.0 on rank 0 (10.0.0.1)", "0.2.0 on rank 1")),
        ({"paddle": "3.3.0"}, 2, ("Paddle differ",)),
        ({"kernel_sources": "b" * 64}, 2, ("kernels from sources differ",)),
        ({"python": "3.12.1"}, 1, ("Python differ",)),
        ({"clock": 1007.5}, 1, ("rank 0 (10.0.0.1) is 7.5 s behind rank 1 (10.0.0.2)", "chrony")),
    ):
        problems = [each for each in findings(GPU, replace(other, **change)) if each.severity]
        assert [each.severity for each in problems] == [severity]
        assert all(word in problems[0].line() for word in words), problems


def test_the_worst_finding_decides():
    found = findings(replace(GPU, open_files=256, kernels_cuda="11.8"))
    assert {each.severity for each in found} >= {Severity.WARNING, Severity.ERROR}
    assert exit_code(found) == 2


def test_ranks_of_one_machine_have_one_clock():
    """Their facts are read one after the other, so the times may lie apart."""
    assert exit_code(findings(GPU, replace(GPU, clock=GPU.clock + 7.5))) == 0


def test_a_clock_that_is_not_that_of_the_others(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,b:1,b:2,c:1,d:1")
    clocks = {"a": 1000.0, "b": 1600.0, "c": 1001.0, "d": 1001.0}
    facts = [replace(GPU, host=host, clock=clocks[host]) for host in "abbcd"]
    assert _only_problem(*facts) == "ranks 1 and 2 (b): 599.0 s ahead of the others"
    assert "is 600.0 s behind" in _only_problem(facts[0], *facts[1:3])
    clocks |= {"d": 400.0}
    facts = [replace(GPU, host=host, clock=clocks[host]) for host in "abbcd"]
    assert "rank 4 (d) is 1200.0 s behind rank 1 (b)" in _only_problem(*facts)


def _only_problem(*facts: Facts) -> str:
    (problem,) = [each for each in findings(*facts) if each.severity]
    return problem.what


def test_a_finding_names_the_ranks_that_have_it(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", "a:1,a:2,b:1,b:2")
    good, bad = replace(GPU, host="a"), replace(GPU, host="b", open_files=100)
    (problem,) = [each for each in findings(good, good, bad, bad) if each.severity]
    assert problem.severity is Severity.WARNING
    assert problem.where == "ranks 2 and 3 (b)"
