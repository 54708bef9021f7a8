"""The build finds the Paddle of the target environment, or says where it looked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import find_paddle
import pytest

ROOT = Path(__file__).resolve().parents[2]


def fake_python(folder: Path, answer: dict | None) -> Path:
    """An interpreter that answers the probe with ``answer``, or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "python"
    body = "exit 3" if answer is None else f"echo '{json.dumps(answer)}'"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return python


def answer(version: str = "9.9.9", soabi: str | None = None, cuda: str = "False") -> dict:
    return {
        "soabi": soabi or sysconfig.get_config_var("SOABI"),
        "paddle": "/somewhere/paddle",
        "version": version,
        "cuda": cuda,
    }


def test_this_environment_has_the_paddle_that_is_running():
    import paddle

    found = find_paddle.find_paddle()
    assert found.found
    assert found.version == paddle.version.full_version
    assert Path(found.folder) == Path(paddle.__file__).parent


def test_probe_does_not_import_paddle():
    code = find_paddle._PROBE + "\nimport sys; assert 'paddle' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.fixture
def only(monkeypatch):
    """Limits the search to the given interpreters."""

    def choose(*pythons: Path) -> find_paddle.Paddle:
        candidates = [(str(python), [str(python)]) for python in pythons]
        monkeypatch.setattr(find_paddle, "_candidates", lambda: candidates)
        return find_paddle.find_paddle()

    return choose


def test_first_usable_interpreter_wins_and_the_others_are_explained(tmp_path, only):
    found = only(
        fake_python(tmp_path / "broken", None),
        fake_python(tmp_path / "empty", {"soabi": "x", "paddle": None}),
        fake_python(tmp_path / "other", answer("1.0.0", soabi="cpython-27")),
        fake_python(tmp_path / "good", answer("3.3.1", cuda="12.9")),
        fake_python(tmp_path / "later", answer("2.6.2")),
    )
    assert (found.version, found.cuda) == ("3.3.1", "12.9")
    assert len(found.looked) == 4
    assert "no Paddle" in found.looked[1]
    assert "cpython-27" in found.looked[2]


def test_message_lists_every_place_and_ways_out(tmp_path, only):
    missing = only(tmp_path / "nowhere" / "python")
    assert not missing.found
    message = find_paddle.not_found_message(missing)
    assert str(tmp_path / "nowhere") in message
    assert 'pip install ".[cpu]"' in message
    assert "PYPKG_PADDLE_PYTHON" in message


def test_environment_variable_names_the_only_candidate(tmp_path, monkeypatch):
    python = fake_python(tmp_path, answer("3.3.1"))
    monkeypatch.setenv("PYPKG_PADDLE_PYTHON", str(python))
    assert [command for _, command in find_paddle._candidates()] == [[str(python)]]
    assert find_paddle.find_paddle().folder == "/somewhere/paddle"


def test_activated_environments_are_asked(tmp_path, monkeypatch):
    fake_python(tmp_path / "venv" / "bin", answer())
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    commands = [command[0] for _, command in find_paddle._candidates()]
    assert commands[0] == sys.executable
    assert str(tmp_path / "venv" / "bin" / "python") in commands


@pytest.mark.parametrize(
    ("argument", "asked"),
    [(".[cpu]", True), (".[plot, cpu]", True), ("pypkg[cpu,plot]", True), (".", False),
     (".[plot]", False), ("--flag=[cpu]x", False)],
)  # fmt: skip
def test_cpu_extra_is_seen_on_the_command_line_of_the_installer(argument, asked):
    """Runs the backend's question in a child of a process that has ``argument``."""
    child = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); "
        "import build_backend; sys.exit(0 if build_backend._cpu_extra_asked() else 4)"
    )
    parent = (
        "import subprocess, sys; "
        f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    )
    code = subprocess.run([sys.executable, "-c", parent, argument]).returncode
    assert code == (0 if asked else 4)


def test_cpu_extra_pins_the_paddle_that_the_makefile_installs():
    """One version in two files: they must not drift apart."""
    pinned = re.search(r'^cpu = \["(.+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    installed = re.search(r"^PADDLE \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pinned.group(1) == installed.group(1)
