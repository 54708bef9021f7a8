"""Every command of the pages exists, with its options; test_running.py runs those of blocks."""

from __future__ import annotations

import shlex

import pytest
from page_blocks import blocks, inline_commands

from pypkg import checkpoint, convert, evaluate, generate, preprocess, supervise
from pypkg.__main__ import COMMANDS
from pypkg.bench import __main__ as bench
from pypkg.config.settings import Settings
from pypkg.data.corpus_tools import TOOLS
from pypkg.report import __main__ as report
from pypkg.report import compare_losses

PARSERS = {
    "bench": bench, "checkpoint": checkpoint, "convert": convert, "preprocess": preprocess,
    "generate": generate, "evaluate": evaluate,
    "report": report, "compare-losses": compare_losses,
}  # fmt: skip
OF_PRETRAIN = {"nproc", "dry_run"}  # options of the command line alone
SYNOPSIS = "["  # of optional words, which no shell takes


def words_of(command: str) -> list[str]:
    """The words of a command after ``pypkg``, in either of its forms."""
    return shlex.split(command.replace("python -m pypkg.", "pypkg ", 1))[1:]


def check(words: list[str]) -> None:
    """Raises SystemExit or AssertionError if a command or one of its options does not exist."""
    name, *rest = words
    assert name in COMMANDS
    if name == "supervise" and "--" in rest:
        place = rest.index("--")
        supervise._parser().parse_args(rest[:place])
        if rest[place + 1 : place + 2] == ["pypkg"]:
            check(rest[place + 2 :])
    elif name == "preprocess" and rest[:1] and rest[0] in TOOLS:
        preprocess._tool_parser().parse_args(rest)
    elif name in PARSERS and rest:
        PARSERS[name]._parser().parse_args(rest)
    elif name == "pretrain":
        keys = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
        assert keys <= set(Settings.__dataclass_fields__) | OF_PRETRAIN


FOUND = [(block.page, command) for block in blocks() for command in block.commands]
FOUND += inline_commands()
COMMAND_LINES = [
    pytest.param(words_of(command), id=f"{page}: {command[:50]}")
    for page, command in dict.fromkeys(FOUND)
    if command.startswith(("pypkg ", "python -m pypkg.")) and SYNOPSIS not in command
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
