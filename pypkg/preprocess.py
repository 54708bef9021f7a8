"""``python -m pypkg.preprocess``: turns text into the ``.bin/.idx`` that pre-training reads.

``inspect``, ``validate``, ``merge`` and ``split`` as the first argument work on finished corpora.
Exit codes: 0 done, 1 ``validate`` found something wrong, 2 an option, input or output that cannot
be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.data.corpus_tools import TOOLS, add_tool_parsers
from pypkg.data.preprocess.options import PreparationOptions, add_options, with_joined_values
from pypkg.data.preprocess.prepare import prepare
from pypkg.data.preprocess.summary import Summary
from pypkg.files.file_handles import raise_limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    configure_logging()
    raise_limit()
    is_tool = bool(given) and given[0] in TOOLS
    return exit_code(
        lambda: _use_tool(given) if is_tool else _prepare(given),
        "interrupted; nothing half-written is left, and what is finished is kept: the same "
        "command goes on from there",
    )


def _prepare(arguments: Sequence[str]) -> int:
    options = vars(_parser().parse_args(with_joined_values(arguments)))
    # The tokenizers library reads these when it makes its threads, at the first batch.
    os.environ["RAYON_NUM_THREADS"] = str(options["workers"])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    print(_report(prepare(PreparationOptions(**options)), options["output_prefix"]))
    return 0


def _use_tool(arguments: Sequence[str]) -> int:
    options = vars(_tool_parser().parse_args(arguments))
    return options.pop("run")(**options)


def _tool_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pypkg preprocess", allow_abbrev=False)
    add_tool_parsers(parser.add_subparsers(required=True))
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg preprocess",
        description="Tokenizes text into PREFIX.bin and PREFIX.idx.",
        epilog=f"On finished corpora: pypkg preprocess {{{','.join(TOOLS)}}} --help",
        allow_abbrev=False,
    )
    add_options(parser)
    return parser


def _report(summary: Summary, prefix: str) -> str:
    sequences = ""
    if summary.sequences != summary.documents:
        sequences = f" of {summary.sequences:,} sentences"
    lines = [
        f"documents        {summary.documents:,}{sequences}",
        *(f"dropped          {count:,} {reason}" for reason, count in summary.dropped.items()),
        *([f"mended           {summary.mended:,} not UTF-8"] if summary.mended else []),
        f"tokens           {summary.tokens:,} ({summary.dtype})",
        f"bytes per token  {summary.text_bytes / summary.tokens:.2f}",
        f"tokenizer        {summary.tokenizer} ({summary.vocab_size:,} entries)",
        *_length_lines(summary),
    ]
    folder = Path(prefix).parent
    lines += [
        f"output           {folder / name}, {size:,} bytes"
        for name, size in summary.outputs.items()
    ]
    if summary.reused:
        lines.append("up to date: made earlier from the same input and options, nothing was done")
    else:
        if summary.resumed:
            lines.append(f"resumed          {summary.resumed} units were finished earlier")
        speed = summary.text_bytes / 1e6 / max(summary.seconds, 0.1)
        lines.append(f"time             {summary.seconds:.1f} s ({speed:.1f} MB/s)")
    return "\n".join(lines)


def _length_lines(summary: Summary) -> list[str]:
    """How many documents have how many tokens, with bars."""
    most = max(count for _, count in summary.lengths)
    return [
        f"{'tokens each' if number == 0 else '':<15}  {f'{least:,}-{2 * least - 1:,}':>21}"
        f"  {count:>12,}  {'#' * round(30 * count / most)}".rstrip()
        for number, (least, count) in enumerate(summary.lengths)
    ]


if __name__ == "__main__":
    sys.exit(main())
