"""The ``pypkg`` command: one entry point for the command lines of the package.

``pypkg COMMAND ...`` runs the ``main`` of the command's module with the arguments that follow, as
``python -m MODULE ...`` does, and returns its exit code. Only that module is imported, so
``pypkg --help`` starts without Paddle and NumPy.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pypkg import __version__


class Command(NamedTuple):
    """A subcommand: ``module`` has ``main(arguments) -> int``."""

    name: str
    module: str
    summary: str


# Title of a group in --help to its commands. A new command is one line here.
GROUPS: dict[str, tuple[Command, ...]] = {
    "Pre-training": (
        Command("preprocess", "pypkg.preprocess", "text to .bin/.idx, training of a tokenizer"),
        Command("pretrain", "pypkg.pretrain", "train a model, or resume a run"),
        Command("plan", "pypkg.plan", "memory, time and price of a run before it is started"),
        Command("doctor", "pypkg.doctor", "whether the machines can carry a run"),
        Command("supervise", "pypkg.supervise", "start a run again after a crash"),
        Command("report", "pypkg.report.__main__", "the page of a run: curves, events, settings"),
        Command(
            "compare-losses", "pypkg.report.compare_losses", "where two runs differ, step by step"
        ),
    ),
    "Models": (
        Command("convert", "pypkg.convert", "import, export and inspect weights"),
        Command("checkpoint", "pypkg.checkpoint", "verify, list and inspect checkpoints"),
        Command("generate", "pypkg.generate", "text that a model writes after prompts"),
        Command("evaluate", "pypkg.evaluate", "loss of a model on whole corpora"),
        Command("models", "pypkg.models.__main__", "families and known model names"),
    ),
    "Reference": (
        Command("config", "pypkg.config.__main__", "settings of pretrain, all or by name"),
        Command("bench", "pypkg.bench.__main__", "benchmarks of operators, steps and data"),
        Command(
            "completion", "pypkg.console.completion", "completion script for bash, zsh or fish"
        ),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: that of the command, or 2 for no command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(f"pypkg {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: {name!r} is not a command of pypkg; {hint}", file=sys.stderr)
        return 2
    return importlib.import_module(command.module).main(rest)


def help_text() -> str:
    """The text of ``pypkg --help``; it fits a terminal of 24 lines of 80 characters."""
    lines = ["usage: pypkg COMMAND [ARGUMENTS]", "       pypkg COMMAND --help", ""]
    for title, commands in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {command.name:<16}{command.summary}" for command in commands]
    lines += ["", f"  {'--version':<16}version of the package"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
