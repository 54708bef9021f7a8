"""The commands of README.md run as they are written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def blocks(section: str) -> list[str]:
    """The bash blocks below the heading ``section`` of README.md."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    body = re.search(rf"^## {section}\n(.*?)(?=^## )", text, re.M | re.S).group(1)
    return re.findall(r"^```bash\n(.*?)^```$", body, re.M | re.S)


@pytest.fixture
def commands(tmp_path) -> dict[str, str]:
    """An environment whose ``pypkg`` and ``python`` are those of this checkout."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in (("python", ""), ("pypkg", "-m pypkg ")):
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        file.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPO)}


@pytest.mark.slow
def test_the_training_block_trains_from_an_empty_folder(tmp_path, commands):
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", blocks("Train")[0]],
        cwd=folder, env=commands, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / "checkpoints/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert losses[0] > 6 and losses[-1] < losses[0] - 1.5
