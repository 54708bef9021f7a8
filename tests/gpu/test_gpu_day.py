"""`make gpu-day`: the order of its parts, what ends it, and what it leaves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_day
import gpu_day_page
import paddle_python
import pytest

DOCS = gpu_day.ROOT / "docs"


def part(name: str, code: str = "print('done')", **others: object) -> gpu_day.Part:
    return gpu_day.Part(name, (sys.executable, "-c", code), **others)


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_day, "compute_capability", lambda: "9.0")
    monkeypatch.setattr(paddle_python, "obstacle", lambda python: None)


def test_parts_on_a_gpu(on_an_h100, tmp_path):
    planned = gpu_day.parts("cuda", tmp_path, Path("/paddle/python"))
    names = [each.name for each in planned]
    assert names[:4] == ["build", "check", "stress", "memcheck"]
    assert names.index("stress, Hopper") < names.index("time") < names.index("smoke, GPT3")
    assert len(set(names)) == len(names) == 19
    assert all(each.left_out is None for each in planned)
    assert all(Path(each.command[1]).is_file() for each in planned)
    hopper = [each.environment for each in planned if "Hopper" in each.name]
    assert hopper == [{"PYPKG_FLASH_ATTENTION": "hopper"}] * 5
    assert planned[-1].command[0] == "/paddle/python"


def test_parts_that_this_machine_cannot_run_say_why(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_day, "compute_capability", lambda: "8.0")
    monkeypatch.setattr(paddle_python, "obstacle", lambda python: f"{python} sees no GPU")
    planned = gpu_day.parts("cuda", tmp_path, Path("python"))
    assert {each.left_out for each in planned if "Hopper" in each.name} == {
        "for compute capability 9.0"
    }
    assert {each.left_out for each in planned if "smoke" in each.name} == {"python sees no GPU"}
    assert [each.name for each in planned if each.left_out is None][-1] == "time"


def test_the_parts_take_the_options_that_they_are_given(on_an_h100, tmp_path):
    """Each tool names an unknown option, and --help ends it before anything runs."""
    sanitize, smoke = (f"{gpu_day.TOOLS}/{name}.py" for name in ("sanitize", "gpu_smoke"))
    for each in gpu_day.parts("cuda", tmp_path, Path(sys.executable)):
        if each.command[1] not in (sanitize, smoke) or each.name not in ("memcheck", "smoke, GPT3"):
            continue
        done = subprocess.run([*each.command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_first_failure_ends_the_day(tmp_path, capsys):
    planned = [
        part("first"),
        part("second", "print('a line'); print('wrong at 3'); raise SystemExit(1)"),
        part("third"),
    ]
    outcomes = gpu_day.run_day(planned, tmp_path)
    assert [(each.name, each.verdict) for each in outcomes] == [
        ("first", "passed"), ("second", "failed"),
    ]  # fmt: skip
    assert outcomes[1].said == "exit code 1: wrong at 3"
    printed = capsys.readouterr().out
    assert "a line" in printed and f"stopped at second; all of its output: {tmp_path}" in printed


def test_a_part_ends_with_its_time_and_its_children(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    outcome = gpu_day.run_part(part("slow", code), tmp_path / "log", seconds=1)
    assert outcome.verdict == "failed" and outcome.said.startswith("not done after 1 s: ")
    child = Path("/proc", outcome.said.rpartition(" ")[2], "stat")
    while child.exists() and child.read_text().split()[2] != "Z":
        time.sleep(0.01)


def test_reports_are_kept_and_old_ones_are_not(tmp_path):
    report = tmp_path / "report.json"
    report.write_text('"of yesterday"')
    write = f"open({str(report)!r}, 'w').write('[1]')"
    assert gpu_day.run_part(part("new", write, report=report), tmp_path / "log").report == [1]
    report.write_text('"of yesterday"')
    assert gpu_day.run_part(part("none", report=report), tmp_path / "log").report is None


def test_a_day_goes_on_from_a_part(tmp_path):
    planned = [part("first", "raise SystemExit(1)"), part("second"), part("third", left_out="why")]
    outcomes = gpu_day.run_day(planned, tmp_path, start="second")
    assert [(each.name, each.verdict, each.said) for each in outcomes] == [
        ("second", "passed", "done"), ("third", "left out", "why"),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="--from is 'nothing'; the parts are build, check, stress"):
        gpu_day.main(["--device", "cpu", "--from", "nothing"])


def day(date: str, verdict: str, said: str) -> dict:
    outcome = {"name": "check", "verdict": verdict, "said": said, "report": None}
    return {"date": date, "device": "cuda", "gpus": "A | B\nC", "nvcc": "13", "commit": "1a",
            "passed": verdict != "failed", "parts": [outcome]}  # fmt: skip


def test_days_come_onto_the_page_the_newest_first(tmp_path):
    shutil.copy(DOCS / gpu_day_page.PAGE, tmp_path)
    gpu_day_page.write(day("2026-01-02 10:00", "failed", "1 of 3"), tmp_path)
    gpu_day_page.write(day("2026-02-01 09:30", "passed", ""), tmp_path)
    page = (tmp_path / gpu_day_page.PAGE).read_text()
    rows = [line for line in page.splitlines() if line.startswith("| 2026")]
    assert rows[0] == "| 2026-02-01 09:30 | A \\| B / C | 13 | 1a | passed: check |"
    assert rows[1].endswith("| failed: check; 1 of 3 |") and gpu_day_page.NONE not in page
    assert (tmp_path / "gpu_days" / "2026-01-02-1000.json").is_file()


def test_the_page_is_that_of_the_days():
    page = (DOCS / gpu_day_page.PAGE).read_text()
    assert page == gpu_day_page.with_days(page, gpu_day_page.read_days(DOCS))


@pytest.mark.slow
def test_dry_run_on_the_cpu(tmp_path):
    pytest.importorskip("torch", reason="gpu_check compares with torch, which is not installed")
    shutil.copy(DOCS / gpu_day_page.PAGE, tmp_path)
    command = [sys.executable, gpu_day.__file__, "--device", "cpu", "--docs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "gpu_days").iterdir()
    result = json.loads(file.read_text())
    verdicts = {each["name"]: each["verdict"] for each in result["parts"]}
    ran = {name for name, verdict in verdicts.items() if verdict == "passed"}
    assert result["passed"] and ran == {"build", "check", "stress", "time"}
    assert set(verdicts.values()) == {"passed", "left out"} and len(verdicts) == 19
    reports = {each["name"]: each["report"] for each in result["parts"]}
    assert len(reports["check"]["checks"]) > 50 and len(reports["time"]["rows"]) > 3
    assert "passed: build, check, stress, time" in (tmp_path / gpu_day_page.PAGE).read_text()
    assert (tmp_path / "benchmarks" / "ops-cpu.json").is_file()
