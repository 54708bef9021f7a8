"""Helpers of the tests of configuration files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pypkg.config import Settings, check_supported, load_settings
from pypkg.errors import UserError

MINIMAL = {
    "model_name_or_path": "llama-58m",
    "input_dir": "data",
    "output_dir": "out",
    "max_steps": 100,
}


def refused_names(file: Path) -> set[str]:
    """The settings in a pre-training file that this version refuses."""
    settings = load_settings([str(file)])
    try:
        check_supported(settings)
    except UserError as error:
        lines = str(error).splitlines()
        return {line.removeprefix("  - ").split(" is ")[0] for line in lines if " is " in line}
    return set()


def load(tmp_path: Path, extra: dict | None = None, *arguments: str) -> Settings:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**MINIMAL, **(extra or {})}), encoding="utf-8")
    return load_settings([str(file), *arguments])


def problems(tmp_path: Path, extra: dict | None = None, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, extra, *arguments)
    return str(caught.value)


def check_one_problem(tmp_path: Path, extra: dict, words: Sequence[str]) -> None:
    """Checks that the settings have one problem, and that its message holds each of ``words``."""
    text = problems(tmp_path, extra)
    assert "\n" not in text
    for word in words:
        assert word in text, text
