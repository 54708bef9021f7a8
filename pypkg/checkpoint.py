"""``python -m pypkg.checkpoint``: whether checkpoints are whole, what they hold; joining parts.

Exit codes: 0 done, 1 ``verify`` found damage, 2 a folder that cannot be used, 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.console.markdown import table
from pypkg.errors import UserError
from pypkg.files.checksums import SealError
from pypkg.training.checkpoint.folders import DAMAGED_PREFIX, checkpoints, is_marked
from pypkg.training.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from pypkg.training.checkpoint.merge import merge
from pypkg.training.checkpoint.verify import Report, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = vars(_parser().parse_args(arguments))
    configure_logging()
    run = options.pop("run")
    return exit_code(lambda: run(**options), "interrupted; checkpoints are as they were")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg checkpoint",
        description="Whether checkpoints of a run are whole, what they hold; joins parts of one.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, of in (
        ("verify", _verify, "a checkpoint, or the output_dir of a run"),
        ("list", _list, "the output_dir of a run"),
        ("inspect", _inspect, "a checkpoint"),
    ):
        text = (run.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        command.add_argument("folder", type=Path, metavar="FOLDER", help=of)
        if name == "verify":
            command.add_argument(
                "--sizes", action="store_true", help="look at the lengths of files alone"
            )
    text = (_merge.__doc__ or "").splitlines()[0]
    command = commands.add_parser("merge", help=text, description=text, allow_abbrev=False)
    command.set_defaults(run=_merge)
    command.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="checkpoint-N of each machine"
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the whole checkpoint; is made"
    )
    return parser


def _verify(folder: Path, sizes: bool) -> int:
    """Compares every file with the manifest; exit code 1 if something is damaged."""
    code = 0
    for each in [folder] if is_marked(folder) else _checkpoints_in(folder):
        report, verdict = _checked(each, "sizes" if sizes else "checksums")
        print(f"{each}: {verdict}")
        for problem in report.damage:
            print(f"  {problem}")
            code = 1
        for name in report.unlisted:
            print(f"  {name} is not listed in the manifest")
    return code


def _checked(folder: Path, checks: str) -> tuple[Report, str]:
    """As ``verify``, and a verdict; a checkpoint of a later version hides no other one."""
    try:
        report = verify(folder, checks)
    except UserError as error:
        return Report(folder, None, (str(error),)), "of a later version"
    return report, _verdict(report)


def _list(folder: Path) -> int:
    """Shows the checkpoints of a run, the damaged ones that it has set aside included."""
    rows = []
    for each in _checkpoints_in(folder):
        report, verdict = _checked(each, "sizes")
        if report.manifest is None:
            rows.append((each.name, "", "", "", "", "", "", verdict))
            continue
        m = report.manifest
        saved = time.localtime((each / MANIFEST_FILE).stat().st_mtime)
        rows.append(
            (
                each.name, f"{m.step:,}", f"{m.consumed_samples:,}", f"{m.consumed_tokens:,}",
                f"{_size(m) / 1e9:,.3f}", _layout(m), time.strftime("%Y-%m-%d %H:%M:%S", saved),
                verdict,
            )
        )  # fmt: skip
    head = ("checkpoint", "step", "samples", "tokens", "GB", "layout", "saved", "files, by size")
    print("\n".join(table(head, rows)))
    return 0


def _inspect(folder: Path) -> int:
    """Shows the manifest of a checkpoint."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of a checkpoint")
    try:
        manifest = read_manifest(folder)
    except (SealError, OSError) as error:
        raise UserError(f"{error}. `pypkg checkpoint verify {folder}` tells more.") from error
    if manifest is None:
        raise UserError(
            f"{folder} has no {MANIFEST_FILE}: it is no checkpoint, or one of an earlier version "
            f"or of PaddleNLP. `pypkg convert inspect {folder}` shows weights."
        )
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    print(f"step      {manifest.step:,}")
    print(f"samples   {manifest.consumed_samples:,}")
    print(f"tokens    {manifest.consumed_tokens:,}")
    print(f"model     {manifest.model or 'not known'} (digest of config.json)")
    print(f"layout    {_layout(manifest)}")
    print(f"versions  {versions}")
    print(f"files     {len(manifest.files)}, {_size(manifest):,} bytes")
    for writers, files in manifest.elsewhere.items():
        size = sum(record.size for record in files.values())
        print(f"elsewhere {len(files)}, {size:,} bytes, written by {writers}")
    print()
    rows = [
        (name, record.digest, f"{record.size:,}") for name, record in manifest.files.items()
    ]  # fmt: skip
    print("\n".join(table(("file", "XXH3", "bytes"), rows, text_columns=2)))
    return 0


def _merge(folders: list[Path], output: Path) -> int:
    """Joins the parts that machines with allow_local_output hold of one checkpoint."""
    manifest = merge(folders, output)
    print(f"{output}: {len(manifest.files)} files, {_size(manifest):,} bytes")
    return 0


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, then those that it has set aside.

    Raises:
        UserError: there are none.
    """
    found = [path for _, path in checkpoints(folder)]
    found += sorted(folder.glob(f"{DAMAGED_PREFIX}checkpoint-*"))
    if not found:
        raise UserError(
            f"{folder} is neither a checkpoint nor a folder with checkpoints; give the output_dir "
            "of a run or a checkpoint-N folder in it"
        )
    return found


def _verdict(report: Report) -> str:
    if report.damage:
        return "damaged"
    if report.manifest is None:
        return "no manifest, cannot be verified"
    return "a whole part" if report.manifest.elsewhere else "whole"


def _size(manifest: Manifest) -> int:
    """Bytes of all files that the manifest lists."""
    return sum(record.size for record in manifest.files.values())


def _layout(manifest: Manifest) -> str:
    """The axes with more than one rank, such as "tensor 2, data 4"."""
    used = [
        f"{axis} {ranks}"
        for axis, ranks in manifest.layout.items()
        if type(ranks) is int and ranks > 1
    ]
    return ", ".join(used) or "one process"


if __name__ == "__main__":
    sys.exit(main())
