"""Blocks of the pages are valid in their language."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from page_blocks import blocks


def check(language: str, text: str) -> None:
    """Raises an error if a block is not valid."""
    if language in ("bash", "sh"):
        subprocess.run(["bash", "-n", "-c", text], check=True, capture_output=True, text=True)
    elif language == "yaml":
        list(yaml.safe_load_all(text))
    elif language == "json":  # some settings of a file, or all of it
        json.loads(text if text.startswith(("{", "[")) else f"{{{text}}}")
    elif language == "python":
        compile(text, "block", "exec")


def test_every_block_is_valid():
    found = blocks()
    assert {"bash", "yaml", "json", "python"} <= {block.language for block in found}
    for block in found:
        try:
            check(block.language, block.text)
        except (subprocess.CalledProcessError, yaml.YAMLError, ValueError, SyntaxError) as error:
            pytest.fail(f"{block.page}: {block.text}\n{getattr(error, 'stderr', error)}")


@pytest.mark.parametrize(
    ("language", "text"),
    [("bash", "if true; then"), ("yaml", "a: b: c"), ("json", '"a": 1,'), ("python", "print(")],
)
def test_a_mistake_is_found(language, text):
    with pytest.raises(Exception):  # noqa: B017
        check(language, text)
