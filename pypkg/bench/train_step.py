"""``python -m pypkg.bench train-step``: a training step on CPU, each contender in its own process.

The processes stay alive and take turns step by step, so that a slow moment of the machine hits all
of them; their threads and allocator are their own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from pypkg.bench.case import BenchmarkError
from pypkg.bench.limits import MATMUL_SIZE
from pypkg.bench.timing import interleave, summarize
from pypkg.errors import UserError
from pypkg.models.config import ModelConfig
from pypkg.models.registry import load_config
from pypkg.paths import library_dir

logger = logging.getLogger("pypkg")

# glibc returns large buffers to the system and faults their pages in again at every use; these
# keep them, as pypkg.threads does for pypkg.
_KEEP_BUFFERS = {
    "GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**31 - 1}"
}
# Longer than Intel's OpenMP runtime lets its workers spin after the last parallel region.
_PAUSE = 0.3
_FIRST_LOSS_TOLERANCE = 0.5  # to ln(vocabulary): the logits of random weights are not quite 0
_SAME_LOSS_TOLERANCE = (0.02, 0.2)  # between contenders, first and last step; bfloat16 products


@dataclass(frozen=True)
class Contender:
    """A process that trains. ``environment`` is set before it starts.

    Args:
        stack: "pypkg" or "transformers"; a function of the worker.
        autocast: matrix products in bfloat16.
        needs: modules without which it is left out.
    """

    name: str
    stack: str
    autocast: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


_TORCH = ("torch", "transformers")
_COMPILED = Contender("pypkg", "pypkg", environment={"PYPKG_OPS_BACKEND": "compiled"})
CONTENDERS = (
    _COMPILED,
    Contender(
        "pypkg, bfloat16 products", "pypkg", True, environment={"PYPKG_OPS_BACKEND": "compiled"}
    ),
    Contender(
        "pypkg, reference operators", "pypkg", environment={"PYPKG_OPS_BACKEND": "reference"}
    ),
    Contender("transformers + torch, float32", "transformers", needs=_TORCH),
    Contender("transformers + torch, bfloat16 autocast", "transformers", True, needs=_TORCH),
    Contender(
        "transformers + torch, float32, buffers kept",
        "transformers",
        environment=_KEEP_BUFFERS,
        needs=_TORCH,
    ),
    Contender(
        "transformers + torch, bfloat16 autocast, buffers kept",
        "transformers",
        True,
        environment=_KEEP_BUFFERS,
        needs=_TORCH,
    ),
)


def run_train_step(options: argparse.Namespace) -> dict[str, Any]:
    """The measurements that the command line asks for; imports no framework.

    Raises:
        UserError: an unknown model or contender, or a sequence that the model cannot take.
        BenchmarkError: a contender failed, or its losses are not those of the others.
    """
    config = load_config(options.config)
    if options.seq > config.max_position_embeddings:
        raise UserError(
            f"--seq {options.seq} exceeds max_position_embeddings "
            f"({config.max_position_embeddings}) of {options.config}"
        )
    contenders, notes = _available(_choose(options.contender))
    task = {name: getattr(options, name) for name in ("config", "batch", "seq", "threads")}
    first_losses, samples, (rate, source) = _train(contenders, task, options.steps)
    tokens = options.batch * options.seq
    rows = [
        {
            "contender": name,
            **asdict(summarize([each["seconds"] for each in steps])),
            "tokens_per_step": tokens,
            "flops_per_step": tokens * config.flops_per_token(options.seq),
            "peak_rss_bytes": steps[-1]["peak_rss_bytes"],
            "first_loss": first_losses[name],
            "last_loss": steps[-1]["loss"],
        }
        for name, steps in samples.items()
    ]
    check_losses(rows, config)
    return {
        "kind": "train-step",
        "device": "cpu",
        "workload": f"{options.config}: {config.num_parameters() / 1e6:.1f} M parameters, "
        f"{options.batch} x {options.seq} tokens, one warm-up step and {options.steps} timed",
        "matmul_rate": rate,
        "matmul_source": f"{MATMUL_SIZE} x {MATMUL_SIZE}, in the process of {source}",
        "notes": notes,
        "rows": rows,
    }


def _train(
    contenders: Sequence[Contender], task: Mapping[str, Any], steps: int
) -> tuple[dict[str, float], dict[str, list[dict[str, float]]], tuple[float, str]]:
    """Losses of the untimed first step, the timed steps, and the best matrix product rate."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        task = {**task, "folder": folder}
        logger.info("making the weights that all begin with")
        with start_worker(Contender("weights", "make_weights"), task):
            pass
        workers = {}
        for contender in contenders:
            logger.info("starting %s", contender.name)
            workers[contender.name] = stack.enter_context(start_worker(contender, task))
        runs = {name: each.step for name, each in workers.items()}
        warm_up = interleave(runs, 1, _PAUSE)
        logger.info("timing %d steps each, in turns", steps)
        samples = interleave(runs, steps, _PAUSE)
        best = max((each.matmul_rate, name) for name, each in workers.items())
    return {name: each[0]["loss"] for name, each in warm_up.items()}, samples, best


class Worker:
    """The parent's end of a process that trains."""

    def __init__(self, name: str, process: subprocess.Popen, log: IO[str]) -> None:
        self._name = name
        self._process = process
        self._log = log
        self.matmul_rate: float = self._receive()["matmul_rate"]

    def step(self) -> dict[str, float]:
        """Trains one step; its loss, seconds and peak_rss_bytes so far."""
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _receive tells why
        return self._receive()

    def _receive(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        said = "\n".join(self._log.read().splitlines()[-15:])
        raise BenchmarkError(
            f"{self._name} failed with exit code {self._process.returncode}:\n{said}"
        )


@contextlib.contextmanager
def start_worker(contender: Contender, task: Mapping[str, Any]) -> Iterator[Worker]:
    """A process that is ready to train; it ends with the context.

    Raises:
        BenchmarkError: it failed while starting, with what it said.
    """
    command = [sys.executable, "-m", "pypkg.bench.train_step_worker"]
    spec = {**task, "stack": contender.stack, "autocast": contender.autocast}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **contender.environment},
            text=True,
        )
        try:
            yield Worker(contender.name, process, log)
        finally:
            process.stdin.close()  # the end of its input ends the worker
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _choose(names: Sequence[str] | None) -> list[Contender]:
    unknown = sorted(set(names or ()) - {each.name for each in CONTENDERS})
    if unknown:
        raise UserError(
            f"--contender {unknown[0]!r} is unknown; use one of "
            f"{', '.join(repr(each.name) for each in CONTENDERS)}"
        )
    return [each for each in CONTENDERS if not names or each.name in names]


def _available(contenders: Sequence[Contender]) -> tuple[list[Contender], list[str]]:
    """Those that can run here, and a note for each that cannot."""
    found, notes = [], []
    for each in contenders:
        missing = [name for name in each.needs if importlib.util.find_spec(name) is None]
        if each is _COMPILED and not (library_dir() / "pypkg_ops.so").exists():
            missing.append("the compiled operators")
        if missing:
            notes.append(f"left out: {each.name}, because {' and '.join(missing)} are missing")
            logger.warning(notes[-1])
        else:
            found.append(each)
    if not found:
        raise UserError("none of the contenders can run here: " + "; ".join(notes))
    return found, notes


def check_losses(rows: Sequence[Mapping[str, Any]], config: ModelConfig) -> None:
    """Raises BenchmarkError unless all begin at about ln(vocab_size) and train to the same loss."""
    expected = math.log(config.vocab_size)
    for row in rows:
        if not abs(row["first_loss"] - expected) <= _FIRST_LOSS_TOLERANCE:
            raise BenchmarkError(
                f"{row['contender']}: the loss of random weights is {row['first_loss']:.4f}, but "
                f"ln(vocab_size) is {expected:.4f}"
            )
        for key, tolerance in zip(("first_loss", "last_loss"), _SAME_LOSS_TOLERANCE):
            if not abs(row[key] - rows[0][key]) <= tolerance:
                raise BenchmarkError(
                    f"{key} of {row['contender']} is {row[key]:.4f}, but that of "
                    f"{rows[0]['contender']} is {rows[0][key]:.4f}: they do not train the same"
                )
