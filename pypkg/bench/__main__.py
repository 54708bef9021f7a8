"""Command line of the benchmarks.

``python -m pypkg.bench ops`` times the operators. With ``--device cuda`` it times the kernels on a
GPU against torch, which needs nvcc and no Paddle. ``train-step`` times whole training steps, and
with ``--host-time`` the host's part of them. ``memory-passes`` counts the bytes that a layer reads
and writes. ``generate`` times the generation of tokens, ``preprocess`` tokenization, ``data-index``
the construction of index maps, ``data-loading`` the assembly of batches and ``checkpoint`` saving
and loading. ``learning-curves`` trains with each optimizer. ``report`` writes docs/benchmarks.md
and its figures from the recorded results. Exit codes: 0 success; 1 a baseline failed or its result
differs from the reference; 2 an invalid setting.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pypkg.bench.environment import describe_run
from pypkg.bench.ops.case import BenchmarkError
from pypkg.console.logs import configure_logging
from pypkg.device.threads import available_cores, configure_cpu, import_paddle
from pypkg.errors import UserError
from pypkg.files import write_file

logger = logging.getLogger("pypkg")

_REPRODUCE_CHECKPOINT = """\
to reproduce a table of docs/benchmarks.md, on a machine that does nothing else:
  python -m pypkg.bench checkpoint --config facebook/opt-125m --folder FOLDER --torch PYTHON \
    --update-docs

FOLDER lies on the disk to measure: a file system in memory shows no disk. It needs 12 bytes per
parameter of the model (llama-58m: 0.7 GB; facebook/opt-350m: 4 GB), and the machine four times as
much memory, or twice as much with --synchronous. The first save under a layout is in the figures. A
disk's rate may change twofold from one minute to the next: compare a time only with that of dd in
the same round.
"""
_DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    configure_logging()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    try:
        if options.command == "report":
            logger.info("wrote %s", _write_docs())
            return 0
        if options.command == "ops" and options.device == "cuda":
            return _run_gpu_kernels(options)
        return _measure(options, arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.update_docs and options.command == "ops" and (options.op or options.dtype):
        raise UserError("--update-docs needs all operators and dtypes; leave out --op and --dtype")
    if options.update_docs and not _DOCS.is_dir():
        raise UserError(f"--update-docs needs a checkout of the project; {_DOCS} does not exist")
    if options.command == "train-step" and options.host_time:
        options.threads = 1
    run = {
        "ops": _run_operators,
        "train-step": _run_train_step,
        "preprocess": _run_preprocess,
        "data-loading": _run_data_loading,
        "data-index": _run_data_index,
        "checkpoint": _run_checkpoint,
        "generate": _run_generate,
        "learning-curves": _run_learning_curves,
        "memory-passes": _run_memory_passes,
    }[options.command]
    described = describe_run(arguments, options.threads)
    result = {**described, **run(options)}
    from pypkg.bench.report.page import render
    from pypkg.bench.report.result import result_name

    print(render(result))
    if options.json:
        _write_json(options.json, result)
    if options.update_docs:
        _write_json(_DOCS / "benchmarks" / f"{result_name(result)}.json", result)
        logger.info("wrote %s", _write_docs())
    return 0


def _run_gpu_kernels(options: argparse.Namespace) -> int:
    from pypkg.bench.ops.gpu.run import run_gpu_kernels

    return run_gpu_kernels(options)


def _run_operators(options: argparse.Namespace) -> dict[str, Any]:
    # The workers of Intel's OpenMP runtime in Paddle spin for 200 ms after a product, on the cores
    # that the next baseline needs.
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    logger.info(configure_cpu(options.threads))
    import_paddle()
    from pypkg.bench.ops.suite import run_operators

    return run_operators(options)


def _run_train_step(options: argparse.Namespace) -> dict[str, Any]:
    if options.host_time:
        from pypkg.bench.train_step.host_time import run_host_time

        return run_host_time(options)
    from pypkg.bench.train_step.suite import run_train_step

    return run_train_step(options)


def _run_preprocess(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.data.preprocess_suite import run_preprocess

    return run_preprocess(options)


def _run_data_loading(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.data.loading_suite import run_data_loading

    return run_data_loading(options)


def _run_data_index(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.data.index_suite import run_data_index

    return run_data_index(options)


def _run_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.checkpoint.suite import run_checkpoint

    return run_checkpoint(options)


def _run_generate(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.generate import run_generate

    return run_generate(options)


def _run_learning_curves(options: argparse.Namespace) -> dict[str, Any]:
    from pypkg.bench.learning_curves import run_learning_curves

    return run_learning_curves(options)


def _run_memory_passes(options: argparse.Namespace) -> dict[str, Any]:
    logger.info(configure_cpu(options.threads))
    import_paddle()
    from pypkg.bench.memory_passes import run_memory_passes

    return run_memory_passes(options)


def _write_docs() -> Path:
    from pypkg.bench.report.page import write_docs

    return write_docs(_DOCS)


def _write_json(path: Path, result: dict[str, Any]) -> None:
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    logger.info("wrote %s", path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pypkg bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--threads", type=_positive, default=available_cores())
    measured.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    measured.add_argument(
        "--update-docs", action="store_true", help="keep the result in docs/ and remake the page"
    )

    ops = commands.add_parser("ops", parents=[measured], help="operators against their baselines")
    ops.add_argument(
        "--device", choices=("paddle", "cuda"), default="paddle", help="cuda: without Paddle"
    )
    ops.add_argument("--op", action="append", metavar="NAME", help="only this; may be repeated")
    ops.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    ops.add_argument(
        "--seconds", type=float, default=1.0, help="time spent on each shape and dtype"
    )
    ops.add_argument(
        "--torch-compile", action="store_true", help="time torch.compile too (minutes more)"
    )

    step = commands.add_parser("train-step", parents=[measured], help="training steps")
    step.add_argument("--config", default="llama-58m", help="a known model, or a folder")
    step.add_argument("--batch", type=_positive, default=4, help="sequences per step")
    step.add_argument("--seq", type=_positive, default=512, help="tokens per sequence")
    step.add_argument("--steps", type=_positive, default=5, help="timed steps per baseline")
    step.add_argument("--baseline", action="append", metavar="NAME", help="only this; repeatable")
    step.add_argument(
        "--host-time",
        action="store_true",
        help="of many layers of small matrices on one thread, forward and backward and update",
    )
    _add_paddlenlp(step)

    text = commands.add_parser("generate", parents=[measured], help="generation of tokens")
    text.add_argument("--config", default="llama-58m", help="a known model, or a folder")
    text.add_argument("--batch", type=_positive, default=1, help="prompts")
    text.add_argument("--prompt", type=_positive, default=32, help="tokens of a prompt")
    text.add_argument("--new", type=_positive, default=128, help="tokens after each prompt")
    text.add_argument("--rounds", type=_positive, default=5, help="timed runs per baseline")

    passes = commands.add_parser("memory-passes", parents=[measured], help="bytes of a layer")
    passes.add_argument("--config", default="facebook/llama-7b", help="a known model, or a folder")
    passes.add_argument("--seq", type=_positive, default=8192, help="tokens")

    _add_curves(commands, measured)
    _add_data(commands, measured)
    _add_checkpoint(commands, measured)
    commands.add_parser("report", help="make docs/benchmarks.md from docs/benchmarks/*.json")
    return parser


def _add_curves(commands: Any, measured: argparse.ArgumentParser) -> None:
    curves = commands.add_parser("learning-curves", parents=[measured], help="of each optimizer")
    curves.add_argument("--config", default="llama-58m", help="a known model, or a folder")
    curves.add_argument("--batch", type=_positive, default=1, help="sequences per step")
    curves.add_argument("--seq", type=_positive, default=128, help="tokens per sequence")
    curves.add_argument("--steps", type=_positive, default=300)
    curves.add_argument(
        "--optimizer", action="append", metavar="NAME", help="only this; repeatable"
    )
    curves.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep each curve here as it ends, and train "
        "none again that is here with the same settings"
    )  # fmt: skip
    curves.add_argument("--input-dir", type=Path, default=Path("runs/quickstart/data"))
    curves.add_argument("--tokenizer", type=Path, default=Path("runs/quickstart/tokenizer"))


def _add_data(commands: Any, measured: argparse.ArgumentParser) -> None:
    preprocess = commands.add_parser("preprocess", parents=[measured], help="text to tokens")
    preprocess.add_argument("--megabytes", type=_positive, default=128, help="of text")
    preprocess.add_argument("--vocab-size", type=_positive, default=32000)
    preprocess.add_argument("--rounds", type=_positive, default=3, help="runs of each baseline")
    _add_paddlenlp(preprocess)

    loading = commands.add_parser("data-loading", parents=[measured], help="tokens to batches")
    loading.add_argument("--megatokens", type=_positive, default=200, help="size of the corpus")
    loading.add_argument("--samples", type=_positive, default=40_000, help="read in each round")
    loading.add_argument("--rounds", type=_positive, default=5)
    loading.add_argument("--steps", type=_positive, default=200, help="of the training loop")

    index = commands.add_parser("data-index", parents=[measured], help="sample indices")
    index.add_argument("--documents", type=_positive, default=100_000_000)
    index.add_argument("--seq", type=_positive, default=4096, help="tokens per sample")
    index.add_argument("--rounds", type=_positive, default=5, help="timed runs per baseline")
    index.add_argument(
        "--site-packages",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="site-packages with fast_dataindex or megatron-core; may be repeated",
    )


def _add_checkpoint(commands: Any, measured: argparse.ArgumentParser) -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        parents=[measured],
        help="saving and loading under each layout",
        description="Times blocking and asynchronous saves, and loading, under each layout, beside "
        "dd with fsync and torch.distributed.checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_REPRODUCE_CHECKPOINT,
    )
    checkpoint.add_argument("--config", default="llama-58m", help="a known model, or a folder")
    checkpoint.add_argument(
        "--layout",
        action="append",
        metavar="NAME",
        help="only this, such as 'sharding2 stage 1'; more than one may be given",
    )
    checkpoint.add_argument("--rounds", type=_positive, default=3, help="of each layout")
    checkpoint.add_argument(
        "--synchronous",
        action="store_true",
        help="no asynchronous saves, which need memory for a copy of the state",
    )
    checkpoint.add_argument(
        "--folder", type=Path, help="on the disk to measure; default: that of temporary files"
    )
    checkpoint.add_argument("--torch", metavar="PYTHON", help="interpreter of an environment with "
                            "torch, for torch.distributed.checkpoint")  # fmt: skip


def _add_paddlenlp(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--paddlenlp", metavar="PYTHON", help="interpreter in whose environment PaddleNLP is"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
