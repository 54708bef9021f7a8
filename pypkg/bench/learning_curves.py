"""``python -m pypkg.bench learning-curves``: the loss of the same model under each optimizer.

Each optimizer trains in a process of its own, from the same random weights on the same samples in
the same order. The runs differ in the optimizer and in the settings that belong to it. Results do
not depend on what else the machine does, except for the time of an update.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from pypkg.bench.ops.case import BenchmarkError
from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.models.architecture.registry import load_config
from pypkg.training.reporting.reporters import read_metrics

logger = logging.getLogger("pypkg")

# The settings in which a run differs from that of AdamW; `optim` is the name, unless it is among
# them. Lion's are those that Chen et al. (2023) advise: a learning rate three to ten times smaller,
# a weight decay as much larger, their betas.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_16bit_moment": {},
    "adamw_8bit": {},
    "adamw_stochastic_bf16": {"optim": "adamw", "device": "cpu", "bf16": True,
                              "stochastic_rounding": True},
    "lion": {"learning_rate": 2e-4, "min_learning_rate": 2e-5, "weight_decay": 0.5,
             "adam_beta1": 0.9, "adam_beta2": 0.99},
    "adafactor": {},
    "muon": {},
}  # fmt: skip
_POINTS, _EVALUATIONS = 60, 4  # of a curve
_EVALUATION_TOKENS = 16_384


def run_learning_curves(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark that the command line requests; imports no framework.

    Raises:
        UserError: the model is unknown, or a folder is missing.
        BenchmarkError: a run failed.
    """
    config = load_config(options.config)
    for name in ("input_dir", "tokenizer"):
        if not getattr(options, name).is_dir():
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is not a folder; "
                "`make pretrain` leaves both in runs/quickstart"
            )
    chosen = options.optimizer or list(OPTIMIZERS)
    for optimizer in chosen:
        if optimizer not in OPTIMIZERS:
            raise UserError(f"--optimizer {optimizer}: expected one of {', '.join(OPTIMIZERS)}")
    rows = [_curve(optimizer, options) for optimizer in chosen]
    return {
        "kind": "learning-curves",
        "device": "cpu",
        "workload": f"{options.config}: {config.num_parameters() / 1e6:.1f} M parameters, float32, "
        f"{options.steps} steps of {options.batch} x {options.seq} tokens; learning rate 6e-4 "
        "with a linear warm-up over a tenth of the steps and half a cosine to 6e-5, weight decay "
        "0.1, clipping at 1",
        "differences": {name: OPTIMIZERS[name] for name in chosen},
        "notes": [],
        "rows": rows,
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that all runs share."""
    return {
        "model_name_or_path": options.config,
        "tokenizer_name_or_path": str(options.tokenizer.resolve()),
        "input_dir": str(options.input_dir.resolve()),
        "split": "969,30,1",
        "max_seq_length": options.seq,
        "per_device_train_batch_size": options.batch,
        "per_device_eval_batch_size": options.batch,
        "max_steps": options.steps,
        "learning_rate": 6e-4,
        "min_learning_rate": 6e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, options.steps // _POINTS),
        "eval_steps": max(1, options.steps // _EVALUATIONS),
        "eval_iters": max(1, _EVALUATION_TOKENS // (options.batch * options.seq)),
        "save_strategy": "no",
        "num_threads": options.threads,
        "do_train": True,
        "do_eval": True,
        "seed": 42,
    }


def _curve(optimizer: str, options: argparse.Namespace) -> dict[str, Any]:
    """The losses of one optimizer: those that --keep holds for the same settings, or new ones."""
    settings = _settings(options) | {"optim": optimizer} | OPTIMIZERS[optimizer]
    kept = options.keep / f"{optimizer}.json" if options.keep else None
    if kept and kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            logger.info("%s holds the curve of %s", kept, optimizer)
            return found["row"]
    with tempfile.TemporaryDirectory(prefix="pypkg-bench-") as folder:
        row = _train(optimizer, settings, options, Path(folder))
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, json.dumps({"settings": settings, "row": row}).encode())
    return row


def _train(
    optimizer: str, settings: dict[str, Any], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Trains with one optimizer; returns its losses."""
    output = folder / optimizer
    file = folder / f"{optimizer}.json"
    file.write_text(json.dumps({**settings, "output_dir": str(output)}), encoding="utf-8")
    logger.info("training %d steps with %s", options.steps, optimizer)
    command = [sys.executable, "-m", "pypkg.pretrain", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise BenchmarkError(f"training with {optimizer} failed:\n{ended.stderr[-2000:]}")
    metrics = read_metrics(output / "metrics.jsonl")
    logged = [row for row in metrics if "loss" in row]
    evaluated = [row for row in metrics if "eval_loss" in row]
    return {
        "optimizer": optimizer,
        "steps": [row["global_step"] for row in logged],
        "losses": [row["loss"] for row in logged],
        "eval_steps": [row["global_step"] for row in evaluated],
        "eval_losses": [row["eval_loss"] for row in evaluated],
        "tokens_per_second": median(row["tokens_per_second_per_device"] for row in logged),
    }
