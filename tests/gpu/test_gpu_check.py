"""`make gpu-check`: on a GPU where there is one, and tried out on the CPU everywhere."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pypkg.bench.report.page import read_result, render

SCRIPT = Path(__file__).resolve().parent / "tools" / "gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_on_the_cpu(tmp_path: Path):
    pytest.importorskip("torch", reason="gpu_check compares with torch, which is not installed")
    report_file = tmp_path / "report.json"
    result = run("--device", "cpu", "--output", str(report_file))
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(report_file.read_text())
    versions = [row["version"] for row in report["checks"]]
    assert versions.count("compiled") > 50
    assert all(row["passed"] for row in report["checks"])
    has_triton = importlib.util.find_spec("triton") is not None
    assert (versions.count("triton") > 40) == has_triton
    rows = report["rows"]
    passes = {(row["op"], row["pass"]) for row in rows}
    assert {("rms_norm", "forward"), ("swiglu", "backward"), ("adamw", "step")} <= passes
    assert any(row["baseline"] == "pypkg, Triton" for row in rows) == has_triton
    assert all(row["median"] > 0 and row["error"] < 2e-2 for row in rows)
    masked = [row for row in rows if row["baseline"] == "pypkg" and "alibi" in row["shape"]]
    assert len(masked) == 2 and all(row["of_yardstick"] > 0 for row in masked)
    assert "adamw             step" in result.stdout.splitlines()[-2]
    # As it is, it goes onto the page of benchmarks.
    page = render(read_result(report_file))
    assert "### flash_attention" in page and "of causal" in page and str(tmp_path) not in page


def test_variants_are_versions_of_every_case():
    pytest.importorskip("torch", reason="gpu_check compares with torch, which is not installed")
    from pypkg import _native
    from pypkg.bench.ops.gpu import suites
    from pypkg.bench.ops.gpu.case import Maker

    maker = Maker(_native, None, "cpu", use_compile=False, variants={"kThreads=1": _native})
    versions = {
        (case.op, case.passes[0]): list(case.method.versions)
        for case in suites.cases(maker, suites.SUITES)
    }
    assert versions["swiglu", "forward"] == ["CUDA", "CUDA kThreads=1"]
    assert versions["flash_attention", "backward"] == ["ampere", "ampere kThreads=1"]
    assert versions.pop(("cross_entropy", "forward+backward")) == ["CUDA"]
    assert all(len(each) == 2 for each in versions.values())


@pytest.mark.slow
def test_a_failed_check_fails_the_script(tmp_path: Path):
    pytest.importorskip("torch", reason="gpu_check compares with torch, which is not installed")
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu_check, checks\n"
        "checks.UNIT.update(bfloat16=1e-9)\n"
        f"sys.exit(gpu_check.main(['--device', 'cpu', '--output', {str(tmp_path / 'r.json')!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED rms_norm-bfloat16" in result.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert not all(row["passed"] for row in report["checks"])
    assert "rows" not in report  # what is wrong is not timed


@pytest.mark.slow
def test_on_this_gpu(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="gpu_check compares with torch")
    if not torch.cuda.is_available() or shutil.which("nvcc") is None:
        pytest.skip("no GPU, or no nvcc, on this machine")
    result = run("--no-benchmark", "--output", str(tmp_path / "report.json"))
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
