"""``python -m pypkg.bench generate``: tokens per second of generation, beside transformers.

Each baseline is a process of its own (``train_step/worker.py``) with the same random weights, and
continues the same prompts greedily, with its key-value cache. The processes take turns. Their
tokens have to be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import tempfile
from dataclasses import asdict
from typing import Any

from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.timing import interleave, summarize
from pypkg.bench.train_step.baselines import Baseline
from pypkg.bench.train_step.suite import start_worker
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config

logger = logging.getLogger("pypkg")

_BASELINES = (
    Baseline("pypkg", "generate_pypkg"),
    Baseline("transformers + torch", "generate_transformers", needs=("torch", "transformers")),
)
_PAUSE = 0.3  # seconds, for the workers of OpenMP runtimes to stop spinning


def run_generate(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests; imports no framework.

    Raises:
        UserError: the model is unknown, or has too few positions.
        BenchmarkError: a baseline failed, or its tokens differ.
    """
    config = load_config(options.config)
    if options.prompt + options.new > config.max_position_embeddings:
        raise UserError(
            f"--prompt {options.prompt} and --new {options.new} together exceed "
            f"max_position_embeddings ({config.max_position_embeddings}) of {options.config}"
        )
    chosen, notes = [], []
    for each in _BASELINES:
        missing = [name for name in each.needs if importlib.util.find_spec(name) is None]
        if missing:
            notes.append(f"left out: {each.name}, because {' and '.join(missing)} are missing")
        else:
            chosen.append(each)
    task = {name: getattr(options, name) for name in ("config", "batch", "new", "threads")}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        task |= {"folder": folder, "seq": options.prompt}
        with start_worker(Baseline("pypkg (weights)", "make_weights"), task):
            pass
        workers = {each.name: stack.enter_context(start_worker(each, task)) for each in chosen}
        logger.info("timing %d rounds, in turns", options.rounds)
        steps = {name: worker.step for name, worker in workers.items()}
        first = interleave(steps, 1, _PAUSE)
        check_tokens({name: result["loss"] for name, (result,) in first.items()})
        taken = interleave(steps, options.rounds, _PAUSE)
    rows = [
        {
            "baseline": name,
            "first_token": asdict(
                summarize([each["seconds"] - each["update_seconds"] for each in runs])
            ),
            "later_tokens": asdict(summarize([each["update_seconds"] for each in runs])),
            "peak_rss_bytes": runs[-1]["peak_rss_bytes"],
        }
        for name, runs in taken.items()
    ]
    return {
        "kind": "generate",
        # A result of its own on the page for each batch.
        "device": "cpu" if options.batch == 1 else f"cpu, batch {options.batch}",
        "workload": f"{options.config}: {config.num_parameters() / 1e6:.1f} M parameters, "
        f"{options.batch} prompts of {options.prompt} tokens, {options.new} tokens after each, "
        f"float32, greedy; one untimed round and {options.rounds} timed",
        "tokens_per_run": options.batch * (options.new - 1),
        "notes": notes,
        "rows": rows,
    }


def check_tokens(sums: dict[str, float]) -> None:
    """Raises BenchmarkError unless all baselines have made the same tokens."""
    if len(set(sums.values())) > 1:
        raise BenchmarkError(f"the baselines make different tokens; their checksums are {sums}")
