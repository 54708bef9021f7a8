"""``python -m pypkg.preprocess``: turns text into the ``.bin/.idx`` that pre-training reads.

``inspect``, ``validate``, ``merge`` and ``split`` as the first argument work on finished corpora.
Exit codes: 0 done, 1 ``validate`` found something wrong, 2 an option, input or output that cannot
be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pypkg.data.corpus_tools import TOOLS, add_tool_parsers
from pypkg.data.preprocess.prepare import PreparationOptions, Summary, prepare
from pypkg.data.preprocess.segmentation import SEGMENTERS
from pypkg.data.tokenizers.train_bpe import MIN_VOCAB_SIZE
from pypkg.errors import UserError
from pypkg.logs import configure_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    configure_logging()
    try:
        if arguments and arguments[0] in TOOLS:
            return _use_tool(arguments)
        options = vars(_parser().parse_args(arguments))
        # The tokenizers library reads these when it makes its threads, at the first batch.
        os.environ["RAYON_NUM_THREADS"] = str(options["workers"])
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        print(_report(prepare(PreparationOptions(**options)), options["output_prefix"]))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; nothing half-written is left, and what is finished is kept: the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 130


def _use_tool(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="pypkg preprocess", allow_abbrev=False)
    add_tool_parsers(parser.add_subparsers(required=True))
    options = vars(parser.parse_args(arguments))
    return options.pop("run")(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg preprocess",
        description="Tokenizes text into PREFIX.bin and PREFIX.idx.",
        epilog=f"On finished corpora: pypkg preprocess {{{','.join(TOOLS)}}} --help",
        allow_abbrev=False,
    )
    add = parser.add_argument
    _add_input_options(parser.add_argument_group("input").add_argument)
    _add_text_options(parser.add_argument_group("text").add_argument)
    _add_chinese_options(parser.add_argument_group("sentences and Chinese words").add_argument)
    _add_tokenizer_options(parser.add_argument_group("tokenizer").add_argument)
    add("--output_prefix", required=True, help="path of the outputs without .bin and .idx")
    add(
        "--shuffle_seed",
        type=_number(0, 2**32 - 1),
        help="shuffle the documents, so that the last ones, which a split holds out, are like the "
        "others",
    )
    add(
        "--workers",
        type=_number(1),
        default=len(os.sched_getaffinity(0)),
        help="processes that read, tokenize and write; by default every core this process may use",
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
        help="a text, JSON lines (.jsonl) or Parquet file, or a folder of these; text and JSON "
        "lines may be compressed (.gz, .zst)",
    )
    add(
        "--json_key",
        default="text",
        help="field of a JSON line or column of a Parquet file that holds the text (%(default)s)",
    )
    add(
        "--doc_spliter",
        metavar="LINE",
        help="line between the documents of a text file, '' for a blank line; without this option "
        "a text file is one document",
    )
    add(
        "--file_suffix",
        type=_names,
        default=(".txt",),
        help="suffixes of text files, separated by commas (.txt); JSON lines and Parquet are "
        "always read",
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


def _add_text_options(add: Callable[..., object]) -> None:
    add("--append_eos", action="store_true", help="end each document with the eos token")
    add("--deduplicate", action="store_true", help="of identical documents take only the first")
    add(
        "--min_doc_length",
        type=_number(0),
        default=0,
        help="drop documents of fewer characters (%(default)s)",
    )
    add(
        "--max_repeated_len",
        type=_number(1, 2**32 - 2),
        help="keep a character once where it is repeated more than so often in a row",
    )
    add(
        "--strip",
        action="store_true",
        help="take white space off both ends of each document, as PaddleNLP does",
    )


def _add_chinese_options(add: Callable[..., object]) -> None:
    add(
        "--split_sentences",
        action="store_true",
        help="make each sentence a sequence of its document: by NLTK, or with --chinese at line "
        "breaks",
    )
    add("--chinese", action="store_true", help="the text is Chinese")
    add(
        "--cn_whole_word_segment",
        action="store_true",
        help="mark the characters within a word with ##, for whole-word masking",
    )
    add(
        "--cn_seg_func",
        choices=SEGMENTERS,
        default="jieba",
        help="what cuts Chinese text into words: jieba, or LAC in one of two modes (%(default)s)",
    )
    add("--cn_splited", action="store_true", help="the text is cut into words already")
    add("--cn_split_dimer", default=" ", help="what stands between these words (a blank)")


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
    sequences = ""
    if summary.sequences != summary.documents:
        sequences = f" of {summary.sequences:,} sentences"
    lines = [
        f"documents        {summary.documents:,}{sequences}",
        *(f"dropped          {count:,} {reason}" for reason, count in summary.dropped.items()),
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
