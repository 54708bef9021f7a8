"""``pypkg report OUTPUT_DIR [MORE ...]``: the page of a run, or of several runs, as one HTML file.

Exit codes: 0 done, 2 a folder that holds no run or a file that cannot be written, 130 stopped by
Ctrl-C before the page was written. ``--watch`` ends by Ctrl-C with 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.report.collect import collect
from pypkg.report.page import render
from pypkg.report.server import PageServer

PAGE_FILE = "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    configure_logging()
    return exit_code(lambda: _run(options), "interrupted; no page was written")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg report",
        description="Writes the page of a run: curves, events, settings, checkpoints. Several runs "
        "are compared on one page. The page is one HTML file that needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="OUTPUT_DIR", help="the output_dir of a run"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.html",
        help=f"by default {PAGE_FILE} in the first OUTPUT_DIR",
    )  # fmt: skip
    parser.add_argument(
        "--watch", action="store_true",
        help="write no file: serve the page on this machine, kept up to date, until Ctrl-C",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=int, default=0, help="of --watch; by default one that is free"
    )
    parser.add_argument(
        "--checksums", action="store_true",
        help="verify the checksums of all checkpoint files; by default only sizes are compared",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=int, default=2000, metavar="N",
        help="maximum number of points of a curve; a longer curve keeps the minimum and the "
        "maximum of each interval; by default 2000",
    )  # fmt: skip
    return parser


def _run(options: argparse.Namespace) -> int:
    folders = list(dict.fromkeys(options.folders))
    if options.points < 4:
        raise UserError(f"--points is {options.points}; expected 4 or more")
    if options.watch:
        return _watch(options, folders)
    checks = "checksums" if options.checksums else "sizes"
    document = collect(folders, points=options.points, checks=checks)
    output = options.output or folders[0] / PAGE_FILE
    write_file(output, render(document).encode())
    print(f"{output}: {len(folders)} run{'s' if len(folders) > 1 else ''}")
    return 0


def _watch(options: argparse.Namespace, folders: list[Path]) -> int:
    for name, given in (("--output", options.output), ("--checksums", options.checksums)):
        if given:
            raise UserError(f"{name} has no effect with --watch; leave one of them out")
    collect(folders, points=options.points)  # a wrong folder ends the command here
    server = PageServer(lambda: collect(folders, points=options.points, is_live=True), options.port)
    print(f"{server.address} until Ctrl-C", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
