"""The commands ``python -m pypkg.preprocess inspect|validate|merge|split``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pypkg.data.corpus.files import output_prefix_of, prefix_of
from pypkg.data.corpus.merge_split import merge_corpora, split_corpus
from pypkg.data.corpus.reader import IndexedDataset
from pypkg.data.corpus.validate import validate
from pypkg.data.datasets.build import resolve_input_dir
from pypkg.data.preprocess.options import whole_number
from pypkg.data.tokenizers.load import load_tokenizer
from pypkg.errors import UserError


def add_tool_parsers(commands: Any) -> None:
    """Adds a parser for each tool to ``commands``, a result of ``add_subparsers``."""
    for name, (add_options, run) in TOOLS.items():
        parser = commands.add_parser(name, help=_summary(run), description=_summary(run))
        parser.set_defaults(run=run)
        add_options(parser.add_argument)


def _summary(run: Callable[..., int]) -> str:
    return (run.__doc__ or "").splitlines()[0]


def _inspect(
    prefix: str, document: int | None, tokenizer_name_or_path: Path | None, max_tokens: int
) -> int:
    """Prints the contents of a corpus, or the text of a document."""
    corpus = IndexedDataset(_one_prefix(prefix))
    starts = corpus.document_indices
    if document is None:
        sizes = corpus.document_sizes()
        print(f"files      {corpus.token_file}, {corpus.index_file}")
        print(f"dtype      {corpus.tokens.dtype}")
        print(f"documents  {len(sizes):,} of {len(corpus):,} sequences")
        print(f"tokens     {corpus.num_tokens:,}")
        print(
            f"lengths    {sizes.min():,} to {sizes.max():,} tokens, median "
            f"{int(np.median(sizes)):,}; {int((sizes == 0).sum()):,} documents are empty"
        )
        if corpus.loss_mask is not None:
            print(f"loss mask  {corpus.prefix}.lsm")
        return 0
    if not 0 <= document < len(starts) - 1:
        raise UserError(
            f"--document is {document}; {corpus.index_file} has the documents 0 to "
            f"{len(starts) - 2}"
        )
    sequences = range(int(starts[document]), int(starts[document + 1]))
    total = sum(int(corpus.sizes[s]) for s in sequences)
    print(f"document {document}: {total:,} tokens in {len(sequences):,} sequences")
    tokenizer = None if tokenizer_name_or_path is None else load_tokenizer(tokenizer_name_or_path)
    left = max_tokens
    for sequence in sequences:
        ids = corpus[sequence][:left].tolist()
        left -= len(ids)
        print(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
        if left == 0:
            break
    if total > max_tokens:
        print(f"... {total - max_tokens:,} more tokens; --max_tokens shows them")
    return 0


def _inspect_options(add: Callable[..., Any]) -> None:
    add("prefix", help="path of the corpus: the prefix, one of its files, or its folder")
    add("--document", type=int, metavar="N", help="show this document, counted from 0")
    add(
        "--tokenizer_name_or_path",
        "--model_name_or_path",
        type=Path,
        help="show text instead of token ids",
    )
    add("--max_tokens", type=whole_number(1), default=1000, help="shown at most (%(default)s)")


def _validate(prefix: Sequence[str], tokenizer_name_or_path: Path | None) -> int:
    """Checks corpora and prints all problems; the exit code is 1 if there are any."""
    vocab_size = None
    if tokenizer_name_or_path is not None:
        vocab_size = load_tokenizer(tokenizer_name_or_path).vocab_size
    code = 0
    for each in _prefixes(prefix):
        problems = validate(each, vocab_size)
        print(f"{each}: {'ok' if not problems else f'problems: {len(problems)}'}")
        for problem in problems:
            print(f"  {problem}")
            code = 1
    return code


def _validate_options(add: Callable[..., Any]) -> None:
    add("prefix", nargs="+", help="paths of corpora: prefixes, files of them, or folders")
    add(
        "--tokenizer_name_or_path",
        "--model_name_or_path",
        type=Path,
        help="also look for token ids that it does not have",
    )


def _add_output_prefix(add: Callable[..., Any], help_text: str) -> None:
    add("--output_prefix", required=True, type=output_prefix_of, help=help_text)


def _merge(prefix: Sequence[str], output_prefix: str) -> int:
    """Joins corpora, in the order in which they are given."""
    print(merge_corpora(_prefixes(prefix), output_prefix))
    return 0


def _merge_options(add: Callable[..., Any]) -> None:
    add("prefix", nargs="+", help="paths of corpora: prefixes, files of them, or folders")
    _add_output_prefix(add, "path of the result without .bin and .idx")


def _split(prefix: str, output_prefix: str, valid: float, test: float, seed: int | None) -> int:
    """Splits a corpus into training, validation and test set."""
    for line in split_corpus(_one_prefix(prefix), output_prefix, valid, test, seed):
        print(line)
    return 0


def _split_options(add: Callable[..., Any]) -> None:
    add("prefix", help="path of the corpus: the prefix, one of its files, or its folder")
    _add_output_prefix(add, "of the results, which end in _train, _valid, _test")
    amount = "documents: a number, or a share of all below 1"
    add("--valid", type=_amount, default=0, help=f"{amount}, for validation")
    add("--test", type=_amount, default=0, help=f"{amount}, for the test")
    add(
        "--seed",
        type=int,
        help="choose them at random; by default the last ones are taken, as training's split does",
    )


def _prefixes(given: Sequence[str]) -> list[str]:
    """The given prefixes; a folder is replaced by the prefixes of its corpora, sorted."""
    found = []
    for each in given:
        if Path(each).is_dir():
            found += [part for part in resolve_input_dir(each) if part != "1.0"]
        else:
            found.append(prefix_of(each))
    return found


def _one_prefix(given: str) -> str:
    """The given prefix, or the prefix of the only corpus in the given folder."""
    prefixes = _prefixes([given])
    if len(prefixes) > 1:
        raise UserError(
            f"{given} holds {len(prefixes)} corpora, {', '.join(map(os.path.basename, prefixes))}; "
            "name one of them"
        )
    return prefixes[0]


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number < 1 or number.is_integer()) or number < 0:
        raise argparse.ArgumentTypeError(
            f"found '{text}', expected a number of documents, or a share from 0 to 1"
        )
    return number


# The options and the function of each tool.
TOOLS: dict[str, tuple[Callable[[Any], None], Callable[..., int]]] = {
    "inspect": (_inspect_options, _inspect),
    "validate": (_validate_options, _validate),
    "merge": (_merge_options, _merge),
    "split": (_split_options, _split),
}
