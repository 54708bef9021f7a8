"""``python -m pypkg.convert``: converts weights, lists their tensors, and enlarges vocabularies.

Exit codes: 0 success, 2 invalid option, input or output, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.device.threads import import_paddle
from pypkg.files.file_handles import raise_limit
from pypkg.training.checkpoint.verify import require_whole_weights

if TYPE_CHECKING:
    from pypkg.conversion.converter import Converted

_SOURCE = (
    "a folder with weights (safetensors, PyTorch .bin/.pt, PaddleNLP's .pdparams, SAT's rank "
    "files), a checkpoint of pypkg.pretrain, or the name of a model in the Hugging Face cache"
)
_DESTINATION = "the folder to write; it only appears when it is complete"
_EPILOG = "Run 'pypkg convert COMMAND --help' for the options of a command."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options = vars(_parser().parse_args(arguments))
    configure_logging()
    raise_limit()
    run = options.pop("run")

    def print_result() -> int:
        print(run(**options))
        return 0

    return exit_code(print_result, "interrupted; no incomplete folder is left")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg convert",
        description="Converts weights of models, lists their tensors, and enlarges vocabularies.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    texts = {
        "export": "Writes a model as a Hugging Face folder: config.json, safetensors, tokenizer.",
        "import": "Converts files of PyTorch, PaddleNLP or SAT to a Hugging Face folder to train.",
    }
    for name, text in texts.items():
        made = command(name, _convert, text)
        _add_source_and_destination(made)
        made.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help="dtype to write; by default each tensor keeps its dtype",
        )
        made.add_argument(
            "--config",
            metavar="FOLDER_OR_NAME",
            help="a folder from which to take config.json, and the tokenizer and code files that "
            "SRC lacks; or the name of a known model whose configuration to use",
        )
        if name == "export":
            made.add_argument(
                "--format",
                dest="layout",
                choices=("huggingface", "paddlenlp"),
                default="huggingface",
                help="format of tensor names, matrix layouts and config.json (%(default)s)",
            )
    resize = command(
        "resize-vocab",
        _resize,
        "Writes a model with a larger vocabulary. New rows are the mean of the old rows.",
    )
    _add_source_and_destination(resize)
    resize.add_argument("--vocab_size", type=int, required=True, help="rows of embedding and head")
    resize.add_argument(
        "--multiple",
        type=int,
        default=1,
        help="round the number of rows up to a multiple of this, such as 128, so that tensor "
        "parallelism can divide them (%(default)s)",
    )
    inspect = command(
        "inspect", _inspect, "Lists tensors, shapes, dtypes, parameters and family of a model."
    )
    inspect.add_argument("folder", metavar="FOLDER", help=_SOURCE)
    _add_reading(inspect)
    return parser


def _add_source_and_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument("destination", metavar="DST", type=Path, help=_DESTINATION)
    _add_reading(parser)
    parser.add_argument(
        "--max_shard_size",
        default="5GB",
        help="maximum size of a weight file, in bytes or with a unit, such as 500MB (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST and all its contents")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow_unknown_config",
        metavar="KEY",
        nargs="+",
        default=(),
        help="keys of config.json to ignore although the model's family does not know them",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="download files that the cache lacks from the Hugging Face Hub; without this option "
        "the network is not used",
    )


# These functions import Paddle themselves, so that inspect runs without it.
def _convert(**options: Any) -> str:
    require_whole_weights(Path(options["source"]))
    import_paddle()
    from pypkg.conversion.converter import convert_model

    return _report(convert_model(**options))


def _resize(**options: Any) -> str:
    require_whole_weights(Path(options["source"]))
    import_paddle()
    from pypkg.conversion.converter import resize_vocabulary

    return _report(resize_vocabulary(**options))


def _inspect(**options: Any) -> str:
    require_whole_weights(Path(options["folder"]), "sizes")  # checksums would read all weights
    from pypkg.conversion.inspection import describe

    return describe(**options)


def _report(converted: Converted) -> str:
    specs = converted.specs.values()
    dtypes = ", ".join(sorted({spec.dtype for spec in specs}))
    size = sum(spec.num_bytes for spec in specs)
    lines = [
        f"family      {converted.family}, vocabulary of {converted.vocab_size:,}",
        f"tensors     {len(specs):,} of {dtypes}",
        f"parameters  {sum(math.prod(spec.shape) for spec in specs):,}, {size:,} bytes",
        f"copied      {', '.join(converted.copied) or 'no other files'}",
    ]
    if converted.left_out:
        count = len(converted.left_out)
        lines.append(f"left out    {count:,} that are not parameters: {converted.left_out[0]}, ...")
    return "\n".join([*lines, f"written     {converted.folder}"])


if __name__ == "__main__":
    sys.exit(main())
