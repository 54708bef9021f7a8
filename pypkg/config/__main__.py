"""``python -m pypkg.config [WORD ...]``: the settings of pypkg.pretrain.

Without words it prints docs/configuration.md, with words the settings whose names contain one, or
whose meanings do if no name does. Exit codes: 0 success, 2 no setting contains any of the words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pypkg.config.docs_page import configuration_page, explain_settings
from pypkg.console.command_line import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="pypkg config",
        description="Prints docs/configuration.md, or the settings whose names contain a WORD. "
        "A WORD in no name is looked for in the meanings.",
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="such as learning_rate, parallel")
    words = parser.parse_args(arguments).words
    return exit_code(lambda: _run(words), "interrupted")


def _run(words: Sequence[str]) -> int:
    print(explain_settings(words) if words else configuration_page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
