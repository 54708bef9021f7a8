"""``python -m pypkg.bench train-step``: a training step on CPU, each baseline in its own process.

The processes stay alive and take turns, one step each, so that a slow moment of the machine affects
all of them. Each process has its own threads and allocator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pypkg.bench.environment import cpu_device
from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.ops.limits import MATMUL_SIZE
from pypkg.bench.timing import interleave, summarize
from pypkg.bench.train_step.baselines import Baseline, choose_baselines
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config

logger = logging.getLogger("pypkg")

_WORKER = Path(__file__).with_name("worker.py")
# The workers of Intel's OpenMP runtime spin for a shorter time after the last parallel region.
_PAUSE = 0.3
_RANDOM_LOSS_TOLERANCE = 0.5  # difference to ln(vocab_size), as random weights have small logits
# Difference between baselines, some of which have products in bfloat16.
_FIRST_LOSS_TOLERANCE, _LAST_LOSS_TOLERANCE = 0.02, 0.2


def run_train_step(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests; imports no framework.

    Raises:
        UserError: a model or baseline is unknown, the sequence is too long for the model, or an
            interpreter has no PaddleNLP.
        BenchmarkError: a baseline failed, or its losses differ from those of the others.
    """
    config = load_config(options.config)
    if options.seq > config.max_position_embeddings:
        raise UserError(
            f"--seq {options.seq} exceeds max_position_embeddings "
            f"({config.max_position_embeddings}) of {options.config}"
        )
    baselines, notes = choose_baselines(options)
    task = {name: getattr(options, name) for name in ("config", "batch", "seq", "threads")}
    expected = math.log(config.vocab_size)
    first_losses, samples, (rate, source) = train(baselines, task, options.steps, expected)
    tokens = options.batch * options.seq
    rows = [
        {
            "baseline": name,
            **asdict(summarize([each["seconds"] for each in steps])),
            "tokens_per_step": tokens,
            "flops_per_step": tokens * config.flops_per_token(options.seq),
            "peak_rss_bytes": steps[-1]["peak_rss_bytes"],
            "first_loss": first_losses[name],
            "last_loss": steps[-1]["loss"],
        }
        for name, steps in samples.items()
    ]
    return {
        "kind": "train-step",
        "device": cpu_device(names_amd=True),
        "workload": f"{options.config}: {config.num_parameters() / 1e6:.1f} M parameters, "
        f"{options.batch} x {options.seq} tokens, one warm-up step and {options.steps} timed",
        "matmul_rate": rate,
        "matmul_source": f"{MATMUL_SIZE} x {MATMUL_SIZE}, in the process of {source}",
        "notes": notes,
        "rows": rows,
    }


def train(
    baselines: Sequence[Baseline],
    task: Mapping[str, Any],
    turns: int,
    expected: float,
    steps_per_turn: int = 1,
) -> tuple[dict[str, float], dict[str, list[dict[str, float]]], tuple[float, str]]:
    """Losses of the untimed first step, the timed steps, and the best matrix product rate.

    Raises:
        BenchmarkError: a baseline failed, or its losses differ from those of the others.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        task = {**task, "folder": folder}
        logger.info("making the weights that all begin with")
        with start_worker(Baseline("pypkg (weights)", "make_weights"), task) as maker:
            rates = [(maker.matmul_rate, "pypkg")]
        workers = {}
        for baseline in baselines:
            logger.info("starting %s", baseline.name)
            workers[baseline.name] = stack.enter_context(start_worker(baseline, task))
        warm_up = interleave({name: each.step for name, each in workers.items()}, 1, _PAUSE)
        first_losses = {name: result["loss"] for name, (result,) in warm_up.items()}
        check_first_losses(first_losses, expected)
        logger.info("timing %d steps each, in turns", turns * steps_per_turn)
        runs = {name: partial(each.steps, steps_per_turn) for name, each in workers.items()}
        taken = interleave(runs, turns, _PAUSE)
        samples = {name: list(chain.from_iterable(each)) for name, each in taken.items()}
        last_losses = {name: each[-1]["loss"] for name, each in samples.items()}
        check_same_loss("last", last_losses, _LAST_LOSS_TOLERANCE)
        rates += [(each.matmul_rate, name) for name, each in workers.items()]
    return first_losses, samples, max(rates)


class Worker:
    """A training process as seen by its parent."""

    def __init__(self, name: str, process: subprocess.Popen, log: IO[str]) -> None:
        self._name = name
        assert process.stdin is not None and process.stdout is not None  # pipes
        self._process, self._commands, self._answers = process, process.stdin, process.stdout
        self._log = log
        self.matmul_rate: float = self._receive()["matmul_rate"]

    def steps(self, count: int) -> list[dict[str, float]]:
        """``step``, ``count`` times."""
        return [self.step() for _ in range(count)]

    def step(self) -> dict[str, float]:
        """Trains one step; returns its loss, the peak_rss_bytes so far, and the seconds.

        ``update_seconds`` is the part after the backward pass.
        """
        try:
            self._commands.write("step\n")
            self._commands.flush()
        except BrokenPipeError:
            pass  # _receive reports the reason
        return self._receive()

    def _receive(self) -> dict[str, float]:
        line = self._answers.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        said = "\n".join(self._log.read().splitlines()[-15:])
        raise BenchmarkError(
            f"{self._name} failed with exit code {self._process.returncode}:\n{said}"
        )


@contextlib.contextmanager
def start_worker(baseline: Baseline, task: Mapping[str, Any]) -> Iterator[Worker]:
    """Starts a training process, which ends with the block.

    Raises:
        BenchmarkError: the process failed at its start; the message contains its output.
    """
    command = [sys.executable, "-m", "pypkg.bench.train_step.worker"]
    if baseline.python:
        command = [baseline.python, str(_WORKER)]
    spec = {**task, "stack": baseline.stack, "autocast": baseline.autocast}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **baseline.environment},
            text=True,
        )
        try:
            yield Worker(baseline.name, process, log)
        finally:
            if process.stdin is not None:
                process.stdin.close()  # the worker ends at the end of its input
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def check_first_losses(losses: Mapping[str, float], expected: float) -> None:
    """Raises BenchmarkError unless all losses are equal and near ``expected``."""
    for name, loss in losses.items():
        if not abs(loss - expected) <= _RANDOM_LOSS_TOLERANCE:
            raise BenchmarkError(
                f"{name}: the loss of random weights is {loss:.4f}, but ln(vocab_size) is "
                f"{expected:.4f}"
            )
    check_same_loss("first", losses, _FIRST_LOSS_TOLERANCE)


def check_same_loss(which: str, losses: Mapping[str, float], tolerance: float) -> None:
    """Raises BenchmarkError unless all losses are within ``tolerance`` of the first one."""
    first = next(iter(losses))
    for name, loss in losses.items():
        if not abs(loss - losses[first]) <= tolerance:
            raise BenchmarkError(
                f"the {which} loss of {name} is {loss:.4f}, but that of {first} is "
                f"{losses[first]:.4f}: they do not train the same"
            )
