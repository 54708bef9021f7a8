"""`make gpu-sanitize` with a compute-sanitizer made up here: its command line and its verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

SCRIPT = Path(sanitize.__file__)
KERNELS = SCRIPT.parents[3] / "csrc" / "kernels"
FAKE = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
tool = sys.argv[sys.argv.index("--tool") + 1]
caching = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
(folder / (tool + ".json")).write_text(json.dumps([sys.argv[1:], caching]))
text, code = json.loads((folder / "said.json").read_text()).get(tool, {clean!r})
print(text.format(what="RACECHECK" if tool == "racecheck" else "ERROR"))
sys.exit(code)
"""
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


class Tools:
    """A folder with a compute-sanitizer, and what it should say."""

    def __init__(self, folder: Path):
        self.folder = folder
        program = folder / "compute-sanitizer"
        clean = ("========= COMPUTE-SANITIZER\npassed\n========= {what} SUMMARY: 0 errors", 0)
        program.write_text(FAKE.format(python=sys.executable, folder=str(folder), clean=clean))
        program.chmod(0o755)

    def run(self, said: dict, *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "said.json").write_text(json.dumps(said))
        path = os.pathsep.join([str(self.folder), os.environ["PATH"]])
        return subprocess.run(
            [sys.executable, str(SCRIPT), "--logs", str(self.folder / "logs"), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )

    def called(self, tool: str) -> tuple[list[str], str | None]:
        return tuple(json.loads((self.folder / f"{tool}.json").read_text()))


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def test_all_tools_run_the_same_small_shapes(tools: Tools):
    stress = pytest.importorskip("stress", reason="the stress test's arrays are torch tensors")
    result = tools.run({}, "--count", "5", "--seed", "11")
    assert result.returncode == 0, result.stdout + result.stderr
    for tool in sanitize.TOOLS:
        arguments, caching = tools.called(tool)
        assert caching == "1"
        assert ("kernel_substring=pypkg" in arguments) == (tool != "initcheck")
        script = arguments.index(str(SCRIPT.parent / "stress.py"))
        options = stress.parse_arguments(arguments[script + 1 :])
        assert options.bare and options.few_elements and options.device == "cuda"
        assert (options.count, options.seed, options.operation) == (5, 11, None)
        assert "0 errors" in (tools.folder / "logs" / f"sanitize-{tool}.log").read_text()
    assert result.stdout.count("passed") == len(sanitize.TOOLS)


@pytest.mark.parametrize(
    ("text", "code", "verdict"),
    [
        ("========= Invalid write\n========= ERROR SUMMARY: 3 errors", 86, "FAILED: 3 reports"),
        ("========= ERROR SUMMARY: 1 error", 0, "FAILED: 1 reports"),
        (
            "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)",
            0,
            "FAILED: 2 reports",
        ),
        ("FAILED rms_norm\n========= ERROR SUMMARY: 0 errors", 1, "no report, but exit code 1"),
        ("========= Error: process didn't terminate", 255, "no summary, exit code 255"),
        ("", 0, "no summary, exit code 0"),
    ],
)
def test_any_report_fails(tools: Tools, text: str, code: int, verdict: str):
    result = tools.run({"racecheck": (text, code)})
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("racecheck ")]
    assert verdict in row and text in result.stdout
    others = [line for line in lines if line.startswith(("memcheck ", "synccheck ", "initcheck "))]
    assert [line.split()[-1] for line in others] == ["passed"] * 3


@pytest.mark.parametrize(("tool", "summary"), CLEAN.items())
def test_summaries_as_the_tools_print_them(tool: str, summary: str):
    assert sanitize.Outcome(tool, 0, f"passed\n{summary}\n", 1.0).passed


def test_without_compute_sanitizer(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert result.returncode == 1
    assert "compute-sanitizer is not on PATH" in result.stderr and "Traceback" not in result.stderr


def test_every_kernel_has_the_name_that_the_tools_look_for():
    """Kernels in the namespace pypkg have it in their mangled names."""
    sources = [path for path in KERNELS.rglob("*.cu") if "__global__" in path.read_text()]
    assert len(sources) >= 5
    for path in sources:
        text = path.read_text()
        assert text.index("namespace pypkg {") < text.index("__global__"), path.name
