"""Every command of the pages exists, with its options; test_readme.py runs those of README.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pypkg import checkpoint, convert, preprocess, supervise
from pypkg.__main__ import COMMANDS
from pypkg.config.settings import Settings

REPO = Path(__file__).resolve().parent.parent
PAGES = (REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md")))
PARSERS = {"checkpoint": checkpoint, "convert": convert, "preprocess": preprocess}
OF_PRETRAIN = {"nproc"}  # an option of the launcher


def command_lines(text: str) -> list[list[str]]:
    """The words of each pypkg command in the bash blocks of a page, without ``pypkg``."""
    found = []
    for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"^(?:python -m pypkg\.)", "pypkg ", line), comments=True)
            if words[:1] == ["pypkg"]:
                found.append(words[1:])
    return found


def check(words: list[str]) -> None:
    """Raises SystemExit or AssertionError if a command or one of its options does not exist."""
    name, *rest = words
    assert name in COMMANDS
    if name == "supervise" and "--" in rest:
        place = rest.index("--")
        supervise._parser().parse_args(rest[:place])
        if rest[place + 1 : place + 2] == ["pypkg"]:
            check(rest[place + 2 :])
    elif name in PARSERS:
        PARSERS[name]._parser().parse_args(rest)
    elif name == "pretrain":
        keys = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
        assert keys <= set(Settings.__dataclass_fields__) | OF_PRETRAIN


COMMAND_LINES = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:50]}")
    for page in PAGES
    for words in command_lines(page.read_text(encoding="utf-8"))
]


def test_commands_are_found():
    assert {words.values[0][0] for words in COMMAND_LINES} >= {"pretrain", "supervise", *PARSERS}


@pytest.mark.parametrize("words", COMMAND_LINES)
def test_the_options_of_a_command_exist(words):
    check(words)


@pytest.mark.parametrize(
    "line", ["pretrain run.json --max_stepz 3", "convert inspect F --bogus", "trane run.json"]
)
def test_an_option_that_does_not_exist_is_found(line, capsys):
    with pytest.raises((SystemExit, AssertionError)):
        check(shlex.split(line))
