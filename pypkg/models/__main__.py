"""``python -m pypkg.models``: the list of families and known models, or the sizes of some models.

Exit codes: 0 success, 2 a name or folder is not a model, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from pypkg.console.command_line import exit_code
from pypkg.console.markdown import table
from pypkg.models.architecture.registry import known_config, load_config
from pypkg.models.docs_page import models_page


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="pypkg models",
        description="Prints docs/models.md: the families, and the known names with their sizes. "
        "With MODEL, prints the sizes of each MODEL. It reads configurations, not weights.",
    )
    parser.add_argument(
        "--config", metavar="NAME", help="print the config.json of a known name, to start one's own"
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="a folder with a config.json, or a known name"
    )
    options = parser.parse_args(arguments)
    if options.config is not None and options.models:
        parser.error("--config prints one file; leave out MODEL")
    return exit_code(lambda: _run(options.config, options.models), "interrupted")


def _run(name: str | None, models: Sequence[str]) -> int:
    if name is not None:
        print(known_config(name).rstrip())
        return 0
    return _sizes(models) if models else _page()


def _page() -> int:
    logging.disable(logging.WARNING)  # warnings about single configurations
    try:
        print(models_page(), end="")
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _sizes(models: Sequence[str]) -> int:
    rows = []
    for name in models:
        config = load_config(name)
        sizes = (config.num_parameters(), config.num_hidden_layers, config.hidden_size)
        heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        numbers = (f"{size:,}" for size in (*sizes, *heads, config.vocab_size))
        rows.append((name, config.model_type, *numbers))
    headings = ("layers", "hidden_size", "heads", "key-value heads", "head_dim", "vocab_size")
    print("\n".join(table(("model", "family", "parameters", *headings), rows, text_columns=2)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
