"""``python -m pypkg.preprocess``: turns text into the ``.bin/.idx`` that pre-training reads.

Exit codes: 0 done, 2 an option, input or output that cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pypkg.data.bpe_training import MIN_VOCAB_SIZE
from pypkg.data.preparation import PreparationOptions, Summary, prepare
from pypkg.errors import UserError
from pypkg.logs import configure_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = vars(_parser().parse_args(arguments))
    configure_logging()
    # The tokenizers library reads these when it makes its threads, at the first batch.
    os.environ["RAYON_NUM_THREADS"] = str(options.pop("workers"))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        print(_report(prepare(PreparationOptions(**options)), options["output_prefix"]))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written is left", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pypkg.preprocess",
        description="Tokenizes text into PREFIX.bin and PREFIX.idx.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    _add_input_options(add)
    _add_tokenizer_options(add)
    add("--output_prefix", required=True, help="path of the outputs without .bin and .idx")
    add("--append_eos", action="store_true", help="end each document with the eos token")
    add(
        "--shuffle_seed",
        type=_number(0, 2**32 - 1),
        help="shuffle the documents, so that the last ones, which a split holds out, are like the "
        "others",
    )
    add(
        "--log_interval",
        type=_number(1),
        default=100_000,
        help="documents between two log lines where there is no progress bar (%(default)s)",
    )
    return parser


def _add_input_options(add: Callable[..., object]) -> None:
    add(
        "--input_path",
        type=Path,
        required=True,
        help="a text file (one document), .jsonl or .jsonl.gz file, or a folder of these",
    )
    add("--json_key", default="text", help="field of a JSON line that holds the text (%(default)s)")
    add(
        "--file_suffix",
        type=_names,
        default=(".txt",),
        help="suffixes of text files, separated by commas (.txt); JSON lines are always read",
    )
    add(
        "--exclude",
        type=_names,
        default=(),
        help="names of folders to leave out, separated by commas",
    )
    add(
        "--on_error",
        choices=("skip", "stop"),
        default="skip",
        help="what to do with a document that is not UTF-8 or not JSON (%(default)s)",
    )


def _add_tokenizer_options(add: Callable[..., object]) -> None:
    add(
        "--tokenizer_name_or_path",
        "--model_name_or_path",
        type=Path,
        required=True,
        help="folder with tokenizer.json, a SentencePiece model or qwen.tiktoken, or such a file; "
        "with --train_tokenizer, the folder to make",
    )
    add(
        "--train_tokenizer",
        type=_number(MIN_VOCAB_SIZE, 2**31 - 1),
        metavar="VOCAB_SIZE",
        help="first train a byte-level BPE tokenizer of so many entries on the input",
    )
    add(
        "--tokenizer_train_bytes",
        type=_number(1),
        default=100_000_000,
        help="how much text, spread over the input, the tokenizer is trained on (%(default)s)",
    )
    add(
        "--workers",
        type=_number(1),
        default=len(os.sched_getaffinity(0)),
        help="threads that tokenize; by default every core this process may use",
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas, found none")
    return names


def _number(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            limit = f"of at least {least}" if most == sys.maxsize else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number {limit}")
        return number

    return parse


def _report(summary: Summary, prefix: str) -> str:
    left_out = f", {summary.skipped:,} skipped" if summary.skipped else ""
    left_out += f", {summary.empty:,} empty" if summary.empty else ""
    lines = [
        f"documents        {summary.documents:,}{left_out}",
        f"tokens           {summary.tokens:,} ({summary.dtype})",
        f"bytes per token  {summary.text_bytes / summary.tokens:.2f}",
        f"tokenizer        {summary.tokenizer} ({summary.vocab_size:,} entries)",
    ]
    folder = Path(prefix).parent
    lines += [
        f"output           {folder / name}, {size:,} bytes"
        for name, size in summary.outputs.items()
    ]
    if summary.reused:
        lines.append("up to date: made earlier from the same input and options, nothing was done")
    else:
        speed = summary.text_bytes / 1e6 / max(summary.seconds, 0.1)
        lines.append(f"time             {summary.seconds:.1f} s ({speed:.1f} MB/s)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
