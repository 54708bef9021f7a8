"""``python -m pypkg.bench checkpoint``: saving and loading under each layout.

A round is a blocking save, an asynchronous save unless they are left out, loading, and ``dd`` with
fsync, which writes the same number of bytes, through the page cache and past it. In every other
round ``dd`` comes first. An update precedes each save. The ranks of a layout are processes of this
machine. If torch is installed, torch.distributed.checkpoint saves the same number of bytes in one
process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pypkg.bench.ops.case import BenchmarkError
from pypkg.bench.timing import summarize
from pypkg.errors import UserError
from pypkg.models.architecture.registry import load_config
from pypkg.parallel.endpoints import free_ports
from pypkg.parallel.launch.launcher import rank_environment

logger = logging.getLogger("pypkg")

# By name: degrees of the mesh, and the ZeRO stage.
LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "alone": ({}, 0),
    "tp2": ({"tensor": 2}, 0),
    "pp2": ({"pipeline": 2}, 0),
    "sharding2 stage 1": ({"sharding": 2}, 1),
    "sharding2 stage 2": ({"sharding": 2}, 2),
    "sharding2 stage 3": ({"sharding": 2}, 3),
}
TORCH = "torch DCP, alone"
_TORCH_WORKER = Path(__file__).with_name("torch_worker.py")

Round = Mapping[str, Any]


def run_checkpoint(options: argparse.Namespace) -> dict[str, Any]:
    """The measurements that the command line asks for; imports no framework.

    Raises:
        UserError: an unknown model or layout.
        BenchmarkError: a process failed.
    """
    config = load_config(options.config)
    names = options.layout or list(LAYOUTS)
    if unknown := set(names) - LAYOUTS.keys():
        raise UserError(
            f"--layout {sorted(unknown)[0]!r} is none of {', '.join(map(repr, LAYOUTS))}"
        )
    rows, notes = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in names:
            logger.info("saving and loading under %s", name)
            rounds = _run_ranks(name, options, Path(folder))
            rows.append(summary(name, rounds))
        size = rows[0]["bytes"]
        python = options.torch or (sys.executable if importlib.util.find_spec("torch") else None)
        if options.synchronous:
            notes.append("synchronous saves alone")
        elif python is None:
            notes.append("torch is not installed: torch.distributed.checkpoint is left out")
        else:
            logger.info("saving with torch.distributed.checkpoint")
            words = [folder, size, options.rounds, options.threads]
            command = [python, str(_TORCH_WORKER), *map(str, words)]
            rows.append(summary(TORCH, _results(TORCH, [_start(command, {})])))
    return {
        "kind": "checkpoint",
        "device": f"cpu, {Path(options.config).name}",
        "workload": f"{options.config}: {config.num_parameters() / 1e6:.1f} M parameters in "
        f"float32 with AdamW's state, {options.rounds} rounds",
        "notes": notes,
        "rows": rows,
    }


def summary(layout: str, rounds: Sequence[Round]) -> dict[str, Any]:
    """A row of the result: medians and quartiles over the rounds, in seconds.

    ``of_dd`` and ``of_direct_dd`` are the times of ``dd`` divided by that of the blocking save of
    the same round. The first asynchronous save is reported separately if there are later ones.
    """
    row: dict[str, Any] = {"layout": layout, "bytes": rounds[0]["bytes"]}
    if "async" in rounds[0]:
        stalls = [each["async"]["stall"] for each in rounds]
        row["first_async_stall"] = stalls[0]
        row["async_stall"] = asdict(summarize(stalls[1:] or stalls))
    for kind, part in (
        ("sync", "total"),
        ("async", "total"),
        ("load", "total"),
    ):
        if kind in rounds[0]:
            values = [each[kind][part] for each in rounds]
            row[f"{kind}_{part}"] = asdict(summarize(values))
    for way in ("dd", "direct_dd"):
        if way in rounds[0]:
            ratios = [each[way] / each["sync"]["total"] for each in rounds]
            row[way] = asdict(summarize([each[way] for each in rounds]))
            row[f"of_{way}"] = asdict(summarize(ratios))
    if "dd" in rounds[0]:
        row["largest_share"] = rounds[0]["sync"]["largest_share"]
        row["sync_host_bytes"] = max(each["sync"]["host_bytes"] for each in rounds)
        row["read_per_held"] = max(each["load"]["read_per_held"] for each in rounds)
    return row


def _run_ranks(name: str, options: argparse.Namespace, folder: Path) -> list[Round]:
    degrees, stage = LAYOUTS[name]
    count = max(degrees.values(), default=1)
    task = {
        "config": str(options.config),
        "degrees": degrees,
        "sharding_stage": stage,
        "folder": str(folder),
        "rounds": options.rounds,
        "threads": max(1, options.threads // count),
        "asynchronous": not options.synchronous,
    }
    command = [sys.executable, "-m", "pypkg.bench.checkpoint.worker", json.dumps(task)]
    if count == 1:
        return _results(name, [_start(command, {})])
    ports = free_ports(count + 2)
    return _results(name, [_start(command, rank_environment(rank, ports)) for rank in range(count)])


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment or None, text=True
    )


def _results(name: str, processes: Sequence[subprocess.Popen]) -> list[Round]:
    """The JSON lines that the first process printed; waits until all have ended."""
    try:
        said = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    if min(codes) < 0:  # the others have failed because of it
        raise BenchmarkError(
            f"{name}: a process was ended by {signal.Signals(-min(codes)).name}. The system sends "
            "SIGKILL where memory is short; --config takes a smaller model."
        )
    for code, (_, errors) in zip(codes, said, strict=True):
        if code:
            raise BenchmarkError(f"{name} failed:\n{errors[-3000:]}")
    return [json.loads(line) for line in said[0][0].splitlines() if line.startswith("{")]
