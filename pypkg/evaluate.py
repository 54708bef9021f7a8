"""``pypkg evaluate CHECKPOINT --data ...``: the loss of a model on whole corpora.

Exit codes: 0 done, 2 an invalid option or file, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypkg.console.command_line import exit_code
from pypkg.console.logs import configure_logging
from pypkg.console.markdown import table
from pypkg.device.threads import configure_cpu, import_paddle
from pypkg.errors import UserError
from pypkg.parallel import mesh
from pypkg.parallel.launch import watchdog
from pypkg.parallel.launch.launcher import end_with_launcher, launch, take_nproc

if TYPE_CHECKING:  # they need Paddle
    from pypkg.inference.windows import Windowing
    from pypkg.models import ModelConfig

_LONGEST = 2048  # tokens of a window by default


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    end_with_launcher()
    configure_logging(mesh.launched_rank())
    return exit_code(lambda: _run(arguments, options), "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg evaluate",
        description="Loss, perplexity and bits per byte of a model on whole corpora.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, an output_dir (its newest one), a "
        "Hugging Face folder, or a name in its cache")  # fmt: skip
    add("--data", nargs="+", required=True, metavar="DATA", help="corpora: text, JSON lines or "
        "Parquet files, folders of them, or prefixes of .bin/.idx")  # fmt: skip
    add("--tokenizer", metavar="FOLDER", help="by default the one of the checkpoint")
    add("--window", type=int, metavar="N", help="most tokens that the model reads at once (its "
        f"max_position_embeddings, at most {_LONGEST:,})")  # fmt: skip
    add("--stride", type=int, metavar="N", help="tokens that a window predicts (half of it)")
    add("--by_document", action="store_true", help="documents see nothing of one another")
    add("--json_key", default="text", metavar="KEY", help='field with the text ("text")')
    add("--batch_size", type=int, default=8, metavar="N", help="windows at a time (8)")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="by default bfloat16 on a GPU, "
        "float32 on a CPU")  # fmt: skip
    add("--device", choices=("cpu", "gpu"), help="by default a GPU if there is one")
    add("--num_threads", type=int, default=0, metavar="N", help="on a CPU (0: all cores)")
    add("--nproc", default="1", metavar="N", help="start N CPU processes; on GPUs: python -m "
        "paddle.distributed.launch pypkg evaluate CHECKPOINT ...")  # fmt: skip
    add("--tensor_parallel_degree", type=int, default=1, metavar="N", help="processes that divide "
        "each layer (1)")  # fmt: skip
    add("--pipeline_parallel_degree", type=int, default=1, metavar="N", help="processes that "
        "divide the layers (1)")  # fmt: skip
    return parser


def _run(arguments: Sequence[str], options: argparse.Namespace) -> int:
    """
    Raises:
        UserError: an option or a file is invalid.
    """
    rest, processes = take_nproc(arguments)
    degrees = _degrees(options, max(processes, mesh.launched_processes()))
    if processes > 1:
        with tempfile.TemporaryDirectory(prefix="pypkg-evaluate-") as folder:
            return launch(rest, processes, Path(folder), "pypkg.evaluate")
    watchdog.start()
    watchdog.compare_settings(json.dumps(vars(options), default=str))
    configure_cpu(options.num_threads)
    import_paddle()
    with watchdog.starting_fleet():
        mesh.initialize(degrees)
    result = _measure(options)
    if mesh.launched_rank() == 0:
        _show(result)
        if options.json:
            from pypkg.files import write_file

            write_file(options.json, (json.dumps(result, indent=2) + "\n").encode())
    watchdog.leave()
    return 0


def _degrees(options: argparse.Namespace, processes: int) -> mesh.Degrees:
    """
    Raises:
        UserError: the processes cannot be divided so, or a number is too small.
    """
    least = {"batch_size": 1, "num_threads": 0, "stride": 1, "window": 2,
             "tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}  # fmt: skip
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"--{name} is {value}; expected {bound} or more")
    tensor, pipeline = options.tensor_parallel_degree, options.pipeline_parallel_degree
    if processes % (tensor * pipeline):
        raise UserError(
            f"tensor_parallel_degree ({tensor}) x pipeline_parallel_degree ({pipeline}) needs a "
            f"multiple of {tensor * pipeline} processes, but there are {processes}; give --nproc "
            f"{tensor * pipeline}, or change the degrees"
        )
    return mesh.Degrees(data=processes // (tensor * pipeline), pipeline=pipeline, tensor=tensor)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.inference.corpora import Reader
    from pypkg.inference.evaluate import evaluate, total
    from pypkg.inference.loading import Source, load

    source = Source(options.checkpoint, options.tokenizer, options.dtype, options.device)
    tokenizer = source.find_tokenizer()
    model = load(source)
    end = None if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)
    windowing = _windowing(options, model.config, end or (None, None))
    reader = Reader(tokenizer, model.config.vocab_size, options.by_document, options.json_key)
    corpora = [reader.read(name) for name in options.data]
    measured = evaluate(model, corpora, windowing, options.batch_size)
    return {
        "checkpoint": str(source.folder()),
        "window": windowing.length,
        "stride": windowing.stride,
        "by_document": options.by_document,
        "corpora": [each.as_dict() for each in measured],
        "total": total(measured).as_dict(),
    }


def _windowing(
    options: argparse.Namespace, config: ModelConfig, starts: tuple[int | None, int | None]
) -> Windowing:
    """
    Args:
        starts: the tokens that begin and end a document.

    Raises:
        UserError: the window is longer than what the model can read, or the stride does not fit.
    """
    from pypkg.inference.windows import Windowing

    positions = config.max_position_embeddings
    length = min(positions, _LONGEST) if options.window is None else options.window
    if length > positions and config.position_embedding == "learned":
        raise UserError(
            f"--window is {length}, but the model has learned positions for "
            f"max_position_embeddings ({positions}); give at most {positions}"
        )
    stride = max(length // 2, 1) if options.stride is None else options.stride
    if stride >= length:
        raise UserError(
            f"--stride is {stride}, but a window has {length} tokens; give at most {length - 1}"
        )
    ends = config.eos_token_id
    named = (config.bos_token_id, ends[0] if isinstance(ends, list) else ends)
    start = next((each for each in (*starts, *named) if each is not None), 0)
    return Windowing(config, length, stride, start)


def _show(result: dict[str, Any]) -> None:
    rows = [*result["corpora"], result["total"]]
    if len(result["corpora"]) == 1:
        rows.pop()
    head = ("corpus", "documents", "tokens", "loss", "perplexity", "bits/byte")
    body = [
        (
            row["corpus"], f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}",
            f"{row['perplexity']:,.2f}",
            "not known" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
        )
        for row in rows
    ]  # fmt: skip
    print("\n".join(table(head, body)))
    print(f"window {result['window']:,} tokens, stride {result['stride']:,}; loss in nats a token")


if __name__ == "__main__":
    sys.exit(main())
