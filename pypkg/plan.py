"""``pypkg plan CONFIG.json [options] [--key value ...]``: memory, time and price before a run.

Arithmetic alone, without Paddle and without a GPU. Exit codes: 0 the layout fits, 1 it does not (or
none does, with --search), 2 an invalid setting or option, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pypkg.config import Settings
from pypkg.console.command_line import exit_code
from pypkg.errors import UserError
from pypkg.files.atomic import write_file
from pypkg.models.architecture.config import ModelConfig
from pypkg.models.architecture.registry import load_config
from pypkg.planner.output.picture import picture
from pypkg.planner.output.text import (
    as_json,
    changed_keys,
    describe,
    describe_search,
    launch_line,
    search_as_json,
)
from pypkg.planner.search.best import search
from pypkg.planner.search.plan import make_plan
from pypkg.planner.time.gpu_files import load_gpu
from pypkg.planner.time.gpus import GPUS
from pypkg.planner.time.step_time import Cluster
from pypkg.training.start.layout import degrees, layout_problems
from pypkg.training.start.start_up import load_run_settings

_GPUS_PER_NODE = 8
# Required by a run, but of no effect on a plan.
_NOT_PLANNED = {"input_dir": "data", "output_dir": "runs", "max_steps": 1_000_000, "do_train": True}
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# What each number counts, and a limit far beyond any run: bytes in place of GB are found.
_LIMITS = {
    "gpus": ("GPUs", 10**6),
    "nodes": ("machines", 10**6),
    "network": ("GB/s", 10**5),
    "tokens": ("tokens", 10**18),
    "price": ("of a currency", 10**6),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    options, rest = _parser().parse_known_args(arguments)
    return exit_code(lambda: _run(options, rest), "interrupted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pypkg plan",
        usage="pypkg plan CONFIG.json [options] [--key value ...]",
        description="Memory, time and price of a run on GPUs, before it is started. --key value is "
        "a setting of pypkg pretrain.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="number of GPUs; by default those of the nodes")
    parser.add_argument(
        "--gpu", default="a100-80g", metavar="NAME|FILE",
        help=f"{', '.join(GPUS)}, or a .json file: a result of make gpu-day, or fields of "
        "a GPU; by default a100-80g",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=int, help="machines; by default one for every 8 GPUs, or one for fewer"
    )
    parser.add_argument(
        "--network", type=float, metavar="GB/s",
        help="rate of all adapters of a machine together, in each direction; required for several "
        "machines",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=_number, help="tokens of the whole run, such as 1T or 300B"
    )
    parser.add_argument("--price", type=float, help="price of a GPU hour; takes --tokens")
    parser.add_argument(
        "--search", action="store_true", help="list the layouts that fit, fastest first"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="draw memory as stacked bars"
    )
    return parser


def _number(text: str) -> float:
    factor = _SUFFIXES.get(text[-1:].upper(), 0.0)
    try:
        return float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, which may end in K, M, B or T, found {text!r}"
        ) from None


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _check_options(options)
    cluster, world = _cluster(options)
    # Weights need not be here for a plan of their memory.
    arguments = [*rest, "--continue_training", "false"]
    settings = load_run_settings(arguments, world, False, _NOT_PLANNED)
    if settings.device == "cpu":
        raise UserError('device is "cpu", but plans are for GPUs; leave it out')
    config = _config(settings)
    if options.search:
        return _search(options, rest, settings, config, cluster, world)
    plan = make_plan(settings, config, degrees(settings, world), cluster)
    if options.picture:
        write_file(options.picture, picture(plan).encode())
    if options.json:
        print(json.dumps(as_json(plan, options.tokens, options.price), indent=2))
    else:
        print("\n".join(describe(plan, options.tokens, options.price)))
    return 0 if plan.fits else 1


def _search(
    options: argparse.Namespace,
    rest: Sequence[str],
    settings: Settings,
    config: ModelConfig,
    cluster: Cluster,
    world: int,
) -> int:
    given = degrees(settings, world)
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    global_rows = rows * given.data * given.sharding
    found = search(
        *(settings, config, world, global_rows, cluster),
        problems=lambda tried: layout_problems(tried, config, world),
    )
    if options.picture and found.fitting:
        write_file(options.picture, picture(found.fitting[0]).encode())
    elif options.picture:
        print(f"{options.picture} was not drawn: there is no layout to draw", file=sys.stderr)
    if options.json:
        content = search_as_json(found, settings, options.tokens, options.price)
        print(json.dumps(content, indent=2))
    else:
        print("\n".join(describe_search(found, options.tokens, options.price)))
        if found.fitting:
            best = found.fitting[0]
            changes = changed_keys(best, settings)
            print(f"\nthe first one changes {json.dumps(changes)}")
            print(launch_line(best, rest, changes))
    return 0 if found.fitting else 1


def _config(settings: Settings) -> ModelConfig:
    """The model as it is trained, with positions for all tokens of a sample."""
    config = load_config(settings.model_name_or_path, settings.allow_unknown_config)
    config = config.replace(**settings.model_overrides)
    positions = max(config.max_position_embeddings, settings.max_seq_length)
    return config.replace(max_position_embeddings=positions)


def _check_options(options: argparse.Namespace) -> None:
    """Refuses numbers that no run has, and options that would change nothing.

    Raises:
        UserError: the first of them.
    """
    for name, (unit, most) in _LIMITS.items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:  # also true of NaN
            raise UserError(
                f"--{name} is {value}; expected a number above 0, at most {most:,} {unit}"
            )
    if options.price is not None and options.tokens is None:
        raise UserError(
            f"--price is {options.price:g}, but a price is that of a whole run, whose tokens are "
            "not given; add --tokens, such as --tokens 1T"
        )
    if options.picture is not None and options.picture.suffix != ".svg":
        raise UserError(
            f"--picture is '{options.picture}'; expected a file that ends in .svg, since the "
            "picture is SVG"
        )


def _cluster(options: argparse.Namespace) -> tuple[Cluster, int]:
    """The machines, and the number of GPUs of all of them.

    Raises:
        UserError: numbers contradict each other, or the network between machines is not given.
    """
    gpu = load_gpu(options.gpu)
    gpus, nodes = options.gpus, options.nodes
    if nodes is None and gpus is not None and gpus > _GPUS_PER_NODE and gpus % _GPUS_PER_NODE:
        raise UserError(
            f"--gpus is {gpus}, which does not fill machines of {_GPUS_PER_NODE}; make it a "
            f"multiple of {_GPUS_PER_NODE}, or say with --nodes how many machines there are"
        )
    nodes = nodes or max(1, (gpus or 1) // _GPUS_PER_NODE)
    world = gpus or nodes * _GPUS_PER_NODE
    if world % nodes:
        raise UserError(
            f"--gpus is {world} and --nodes {nodes}, so that machines would differ; make --gpus a "
            "multiple of --nodes"
        )
    if nodes > 1 and options.network is None:
        raise UserError(
            f"{nodes} machines need --network, the GB/s of all adapters of a machine together each "
            "way: 8 of 400 Gbit/s are 400"
        )
    network = options.network * 1e9 if options.network else gpu.link
    return Cluster(gpu, world // nodes, network), world


if __name__ == "__main__":
    sys.exit(main())
