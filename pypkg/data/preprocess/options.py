"""The options of ``python -m pypkg.preprocess``, each in one place.

A field of :class:`PreparationOptions` is an option of the command line: its name, its default, its
help, and whether the tokens depend on it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from pypkg.data.corpus.files import output_prefix_of
from pypkg.data.preprocess.segmentation import SEGMENTERS
from pypkg.data.tokenizers.train_bpe import MIN_VOCAB_SIZE

_INPUT = "input"
_TEXT = "text"
_WORDS = "sentences and Chinese words"
_TOKENIZER = "tokenizer"


def _option(
    group: str | None,
    help: str,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    tokens: bool = False,
    aliases: Sequence[str] = (),
    **argparse_options: Any,
) -> Any:
    """A field of :class:`PreparationOptions`.

    Args:
        group: heading of the option in ``--help``; None for the first one.
        default, default_factory: as for ``dataclasses.field``; without either it is required.
        tokens: the tokens of a document depend on it, so that a change makes the corpus anew.
        aliases: further names on the command line.
        argparse_options: further arguments of ``ArgumentParser.add_argument``.
    """
    metadata = {
        "group": group,
        "tokens": tokens,
        "aliases": aliases,
        "argparse": {"help": help, **argparse_options},
    }
    return field(default=default, default_factory=default_factory, metadata=metadata)


def whole_number(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` to ``most``, both included."""

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


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas, found none")
    return names


@dataclass(frozen=True, kw_only=True)
class PreparationOptions:
    """The options of ``python -m pypkg.preprocess``, in the order of ``--help``."""

    input_path: Path = _option(  # noqa: RUF009 - a dataclass field
        _INPUT,
        "a text, JSON lines (.jsonl, .json, .ndjson) or Parquet file, or a folder of these; text "
        "and JSON lines may be compressed (.gz, .zst)",
        type=Path,
    )
    json_key: str = _option(
        _INPUT,
        "field of a JSON line or column of a Parquet file that holds the text (%(default)s); "
        "data.text is the field text of the field data",
        default="text",
        tokens=True,
    )
    doc_spliter: str | None = _option(
        _INPUT,
        "line between the documents of a text file, '' for a blank line; without this option "
        "a text file is one document",
        default=None,
        tokens=True,
        metavar="LINE",
    )
    file_suffix: Sequence[str] = _option(
        _INPUT,
        "suffixes of text files, separated by commas (.txt); JSON lines and Parquet are "
        "always read; .json among them reads such files as plain text",
        default=(".txt",),
        type=_names,
    )
    exclude: Sequence[str] = _option(
        _INPUT,
        "names or patterns (*.bak) of files and folders to leave out, separated by commas",
        default=(),
        type=_names,
    )
    on_error: str = _option(
        _INPUT,
        "what to do with a document that is not UTF-8, not JSON, or has no or two values of the "
        "field (%(default)s); replace puts "
        "U+FFFD where it is not UTF-8, and skips others",
        default="skip",
        choices=("skip", "replace", "stop"),
    )
    append_eos: bool = _option(
        _TEXT,
        "end each document with the eos token",
        default=False,
        tokens=True,
        action="store_true",
    )
    deduplicate: bool = _option(
        _TEXT,
        "of identical documents take only the first",
        default=False,
        tokens=True,
        action="store_true",
    )
    min_doc_length: int = _option(
        _TEXT,
        "drop documents of fewer characters (%(default)s)",
        default=0,
        tokens=True,
        type=whole_number(0),
    )
    max_repeated_len: int | None = _option(
        _TEXT,
        "keep a character once where it is repeated more than so often in a row",
        default=None,
        tokens=True,
        type=whole_number(1, 2**32 - 2),
    )
    strip: bool = _option(
        _TEXT,
        "take white space off both ends of each document, as PaddleNLP does",
        default=False,
        tokens=True,
        action="store_true",
    )
    split_sentences: bool = _option(
        _WORDS,
        "make each sentence a sequence of its document: by NLTK, or with --chinese at line breaks",
        default=False,
        tokens=True,
        action="store_true",
    )
    chinese: bool = _option(
        _WORDS,
        "the text is Chinese",
        default=False,
        tokens=True,
        action="store_true",
    )
    cn_whole_word_segment: bool = _option(
        _WORDS,
        "mark the characters within a word with ##, for whole-word masking",
        default=False,
        tokens=True,
        action="store_true",
    )
    cn_seg_func: str = _option(
        _WORDS,
        "what cuts Chinese text into words: jieba, or LAC in one of two modes (%(default)s)",
        default="jieba",
        tokens=True,
        choices=SEGMENTERS,
    )
    cn_splited: bool = _option(
        _WORDS,
        "the text is cut into words already",
        default=False,
        tokens=True,
        action="store_true",
    )
    cn_split_dimer: str = _option(
        _WORDS,
        "separator of these words (a blank)",
        default=" ",
        tokens=True,
    )
    tokenizer_name_or_path: Path = _option(  # noqa: RUF009 - a dataclass field
        _TOKENIZER,
        "folder with tokenizer.json, a SentencePiece model or qwen.tiktoken, or such a file; "
        "with --train_tokenizer, the folder to make",
        aliases=("--model_name_or_path",),
        type=Path,
    )
    train_tokenizer: int | None = _option(
        _TOKENIZER,
        "first train a byte-level BPE tokenizer of so many entries on the input",
        default=None,
        type=whole_number(MIN_VOCAB_SIZE, 2**31 - 1),
        metavar="VOCAB_SIZE",
    )
    tokenizer_train_bytes: int = _option(
        _TOKENIZER,
        "how much text, spread over the input, the tokenizer is trained on (%(default)s)",
        default=100_000_000,
        type=whole_number(1),
    )
    output_prefix: str = _option(
        None,
        "path of the outputs without .bin and .idx",
        type=output_prefix_of,
    )
    shuffle_seed: int | None = _option(
        None,
        "shuffle the documents, so that the last ones, which a split holds out, are like the "
        "others",
        default=None,
        type=whole_number(0, 2**32 - 1),
    )
    workers: int = _option(
        None,
        "processes that read, tokenize and write; by default every core this process may use",
        default_factory=lambda: len(os.sched_getaffinity(0)),
        type=whole_number(1),
    )
    log_interval: int = _option(
        None,
        "documents between two log lines where there is no progress bar (%(default)s)",
        default=100_000,
        type=whole_number(1),
    )

    def token_options(self) -> dict[str, Any]:
        """The options that the tokens of a document depend on, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["tokens"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an argument for every field of :class:`PreparationOptions`."""
    groups: dict[str | None, Any] = {None: parser}
    for each in fields(PreparationOptions):
        group = each.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        given = {"required": True} if default is MISSING else {"default": default}
        names = [f"--{each.name}", *each.metadata["aliases"]]
        groups[group].add_argument(*names, **given, **each.metadata["argparse"])


def with_joined_values(arguments: Sequence[str]) -> list[str]:
    """Joins ``--doc_spliter ---`` to ``--doc_spliter=---``: argparse rejects such values alone."""
    names = {f"--{f.name}": f for f in fields(PreparationOptions)}
    joined: list[str] = []
    for argument in arguments:
        option = names.get(joined[-1]) if joined else None
        takes_text = option is not None and not {"type", "action", "choices"} & set(
            option.metadata["argparse"]
        )
        if takes_text and argument.startswith("-") and argument not in (*names, "--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
