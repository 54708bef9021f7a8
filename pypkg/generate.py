"""``pypkg generate CHECKPOINT``: text that a model writes after prompts.

Exit codes: 0 done, 2 an invalid option or file, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.device.threads import configure_cpu, import_paddle
from pypkg.errors import UserError

if TYPE_CHECKING:  # it needs Paddle
    from pypkg.generation.text import Completion

logger = logging.getLogger("pypkg")

_DTYPES = ("float32", "bfloat16", "float16")
_ASKS = "> "


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = _parser().parse_args(arguments)
    configure_logging()
    return exit_code(lambda: _run(options), "\ninterrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg generate",
        description="Writes text that follows prompts, as the model goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, an output_dir (its newest one), a "
        "Hugging Face folder, or a name in its cache")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be given repeatedly")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines, each a text or "
                        'an object with "prompt"; or plain lines')  # fmt: skip
    source.add_argument(
        "--interactive", action="store_true", help="read a prompt from each line of the terminal"
    )
    add("--max_new_tokens", type=int, default=128, metavar="N", help="of a text (128)")
    add("--temperature", type=float, default=1.0, help="0 takes the most likely token (1.0)")
    add("--top_k", type=int, default=0, metavar="K", help="choose from the K most likely (0: all)")
    add("--top_p", type=float, default=1.0, metavar="P", help="choose from the most likely that "
        "have the probability P together (1.0)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the choices (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends a text before TEXT")
    add("--ignore_eos", action="store_true", help="go on behind the end of a document")
    add("--bos", action="store_true", help="put the tokenizer's bos_token before each prompt")
    add("--batch_size", type=int, default=8, metavar="N", help="prompts at a time (8)")
    add("--tokenizer", metavar="FOLDER", help="by default the one of the checkpoint")
    add("--dtype", choices=_DTYPES, help="by default bfloat16 on a GPU, float32 on a CPU")
    add("--device", choices=("cpu", "gpu"), help="by default a GPU if there is one")
    add("--num_threads", type=int, default=0, metavar="N", help="on a CPU (0: all cores)")
    add("--json", type=Path, metavar="FILE", help="write the texts as JSON lines")
    return parser


def _run(options: argparse.Namespace) -> int:
    """
    Raises:
        UserError: an option or a file is invalid.
    """
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("num_threads", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name} is {value}; expected {least} or more")
    if any(not stop for stop in options.stop):
        raise UserError("--stop is an empty text, which every text begins with; leave it out")
    prompts = None if options.interactive else _prompts(options)
    configure_cpu(options.num_threads)
    import_paddle()
    writer = _Writer(options)
    if prompts is None:
        writer.converse()
    else:
        writer.write_all(prompts)
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    from pypkg.generation.prompts import check_is_text

    if options.prompt:
        for prompt in options.prompt:
            check_is_text(prompt)
        return list(options.prompt)
    if options.prompts is None:
        raise UserError("there is no prompt; give --prompt TEXT, --prompts FILE or --interactive")
    from pypkg.generation.prompts import read_prompts

    return read_prompts(options.prompts)


class _Writer:
    """Loads the model once and writes texts to the terminal as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        from pypkg.inference.loading import Source, load
        from pypkg.models.sampling import Sampling

        self._options = options
        self._sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
        source = Source(options.checkpoint, options.tokenizer, options.dtype, options.device)
        self._tokenizer = source.need_tokenizer("text")
        self._model = load(source)
        positions = self._model.config.max_position_embeddings
        if options.max_new_tokens > positions:
            logger.warning(
                "--max_new_tokens %s exceeds the %s positions of the model "
                "(max_position_embeddings); expect no sense beyond them",
                *(f"{options.max_new_tokens:,}", f"{positions:,}"),
            )
        ends = source.end_ids(self._model.config, self._tokenizer)
        self._end_ids = frozenset() if options.ignore_eos else ends
        self._told = 0  # number of the text that the terminal shows

    def write_all(self, prompts: Sequence[str]) -> None:
        """Writes a text after each prompt; the first of a batch as it comes, the others whole."""
        found: list[Completion] = []
        begin = time.perf_counter()
        for first in range(0, len(prompts), self._options.batch_size):
            batch = prompts[first : first + self._options.batch_size]
            found += self._complete(batch, first)
        seconds = time.perf_counter() - begin
        tokens = sum(each.tokens for each in found)
        logger.info("%s tokens in %.1f s, %.1f a second", f"{tokens:,}", seconds, tokens / seconds)
        if self._options.json:
            self._save(found)

    def converse(self) -> None:
        """Answers one line after the other, until the input ends."""
        for prompt in _lines():
            self._complete([prompt])

    def _complete(self, prompts: Sequence[str], first: int = 0) -> list[Completion]:
        from pypkg.generation.text import complete

        def show_first(row: int, text: str) -> None:
            if row == 0:
                print(text, end="", flush=True)

        print(prompts[0], end="", flush=True)
        found = complete(
            self._model,
            self._tokenizer,
            prompts,
            self._options.max_new_tokens,
            self._sampling,
            end_ids=self._end_ids,
            stops=self._options.stop,
            with_bos=self._options.bos,
            first_number=first,
            on_text=show_first,
        )
        print()
        for each in found[1:]:
            print(f"---\n{each.prompt}{each.text}")
        return found

    def _save(self, found: Sequence[Completion]) -> None:
        from pypkg.files import write_file

        rows = [vars(each) for each in found]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(self._options.json, lines.encode())


def _lines() -> Iterator[str]:
    """The lines of standard input, asked for where it is a terminal.

    Raises:
        UserError: a line is not UTF-8.
    """
    from pypkg.generation.prompts import check_is_text

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while True:
        if sys.stdin.isatty():
            print(_ASKS, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        check_is_text(line)
        if line.strip():
            yield line.rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
