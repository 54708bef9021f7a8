"""One rank of ``checkpoint``: saves and loads a model with optimizer state, under a layout.

The argument is a JSON object. Rank 0 prints one JSON object for each round. Of values that differ
between ranks it prints the largest.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pypkg.device.threads import configure_cpu, import_paddle

_GIB = 2**30


def main() -> None:
    task = json.loads(sys.argv[1])
    configure_cpu(task["threads"])
    import_paddle()
    from pypkg.parallel import mesh
    from pypkg.parallel.launch import watchdog

    watchdog.start()  # without it, ranks that wait for the ``dd`` of rank 0 end after gloo's 30 s
    watchdog.compare_settings(sys.argv[1])
    with watchdog.starting_fleet():
        mesh.initialize(mesh.Degrees(**task["degrees"]))
    run = _Run(task)
    for number in range(task["rounds"]):
        result = run.measure(disk_first=number % 2 == 1)
        if mesh.current().rank == 0:
            print(json.dumps(result), flush=True)
    watchdog.leave()


class _Run:
    """A model that trains on short samples."""

    def __init__(self, task: dict[str, Any]) -> None:
        import paddle

        from pypkg.models import from_config
        from pypkg.models.architecture.registry import load_config
        from pypkg.models.pretrained import model_tensors
        from pypkg.models.weights.save_plan import SavePlan
        from pypkg.models.weights.writer_process import WriterProcess
        from pypkg.parallel import mesh
        from pypkg.parallel.optimizer.distribute import distribute
        from pypkg.parallel.optimizer.factory import UpdateOptions
        from pypkg.training.checkpoint.shared_memory import SharedMemory
        from pypkg.training.checkpoint.writing import optimizer_tensors
        from pypkg.training.tp_sharding import ModelTpSharding

        self._folder = Path(task["folder"])
        self._writer = WriterProcess() if task["asynchronous"] else None
        is_alone = mesh.current().world_size == 1
        paused, beside = SharedMemory(None), SharedMemory(8 * _GIB)
        self._memory = {"sync": None if is_alone else paused, "async": beside}
        config = load_config(task["config"])
        self._layer = from_config(config, seed=0)
        options = UpdateOptions(sharding_stage=task["sharding_stage"])
        sharding = ModelTpSharding(config)
        self._model, self._updater = distribute(self._layer, options, mesh.current(), sharding)
        ids = paddle.arange(8, 40).reshape([1, 32])
        self._batches = [{"input_ids": ids, "labels": ids}] * mesh.current().pipeline_degree
        self._step()
        sets = [model_tensors(self._layer), optimizer_tensors(self._updater, config)]
        self._plan = SavePlan(sets, beside.neighbours())
        self._num_bytes = sum(self._plan.num_bytes_of(r) for r in range(mesh.current().world_size))
        # Memory that a virtual machine's host gives at its first use is no part of a save: not that
        # of the copies, and not that in which the system keeps what is on its way to the disk.
        if self._writer is not None:
            self._writer.start()
            beside.emptied(self._plan)
        self._disk_alone()

    def _step(self) -> None:
        """One update. A save follows one; and memory is slower at first after a pause."""
        self._model.train()
        self._model.forward_backward(self._batches, self._updater.scale)
        self._updater.step(1e-3)
        self._model.eval()

    def measure(self, disk_first: bool) -> dict[str, Any]:
        """One round: a blocking save, an asynchronous save, loading, and ``dd`` in two ways.

        Args:
            disk_first: whether ``dd`` comes first, so that neither always finds the disk idle.
        """
        from pypkg.models.weights.tensor_writer import ThreadWriter
        from pypkg.models.weights.writer_process import ProcessWriter
        from pypkg.parallel.comm.collective import from_first_rank

        result: dict[str, Any] = self._disk_alone() if disk_first else {}
        folder, result["sync"] = self._save("sync", ThreadWriter)
        size = from_first_rank(lambda: sum(path.stat().st_size for path in folder.iterdir()))
        if self._writer is not None:
            _remove(folder)
            make_writer = partial(ProcessWriter, process=self._writer)
            folder, result["async"] = self._save("async", make_writer)
        result["load"] = self._load(folder)
        _remove(folder)
        if not disk_first:
            result |= self._disk_alone()
        return result | {"bytes": size}

    def _disk_alone(self) -> dict[str, float]:
        from pypkg.parallel.comm.collective import from_first_rank

        return from_first_rank(lambda: _seconds_of_dd(self._folder / "dd", self._num_bytes))

    def _save(self, kind: str, make_writer: Callable[..., Any]) -> tuple[Path, dict[str, float]]:
        from pypkg.models.pretrained import model_config_json
        from pypkg.models.weights.model_folder import CONFIG_FILE, write_json
        from pypkg.parallel import mesh
        from pypkg.parallel.comm.collective import from_all_ranks
        from pypkg.training.checkpoint.writing import CheckpointWriting
        from pypkg.training.state import TrainerState

        self._step()
        from_all_ranks(lambda: None)
        memory = _Memory()
        begin = time.perf_counter()
        writing = CheckpointWriting(
            self._folder,
            TrainerState(global_step=1),
            plan=self._plan,
            add_files=lambda to: write_json(to / CONFIG_FILE, model_config_json(self._layer)),
            settings_json="{}",
            memory=self._memory[kind],
            make_writer=make_writer,
        )
        stall = time.perf_counter() - begin
        folder = writing.finish()
        total = time.perf_counter() - begin
        share = writing.num_bytes_of(mesh.current().rank)
        of_ranks = from_all_ranks(lambda: (stall, total, memory.growth(), share))
        stalls, totals, grown, shares = zip(*of_ranks, strict=True)
        return folder, {
            "stall": max(stalls),
            "total": max(totals),
            "host_bytes": max(grown),
            "largest_share": max(shares) * len(shares) / max(sum(shares), 1),
        }

    def _load(self, folder: Path) -> dict[str, float]:
        from pypkg.models import from_pretrained
        from pypkg.parallel.comm.collective import from_all_ranks
        from pypkg.training.checkpoint.reading import load_optimizer

        from_all_ranks(lambda: None)
        before, begin = _read_bytes(), time.perf_counter()
        model = from_pretrained(folder)
        load_optimizer(folder, self._updater)
        seconds, read = time.perf_counter() - begin, _read_bytes() - before
        held = sum(p.size * p.element_size() for p in model.parameters()) + sum(
            t.size * t.element_size() for t in self._updater.optimizer.state_tensors()
        )
        of_ranks = from_all_ranks(lambda: (seconds, read, read / held))
        return dict(
            zip(("total", "read_bytes", "read_per_held"), map(max, zip(*of_ranks)), strict=True)
        )


class _Memory:
    """The largest growth of the resident memory of this process, in bytes."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        self._before = _status("VmRSS")

    def growth(self) -> int:
        """Bytes."""
        return _status("VmHWM") - self._before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def _read_bytes() -> int:
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.split("rchar:")[1].split()[0])


def _remove(folder: Path) -> None:
    """Removes a folder on the first rank."""
    from pypkg.parallel.comm.collective import from_first_rank

    from_first_rank(lambda: shutil.rmtree(folder))


def _seconds_of_dd(path: Path, size: int) -> dict[str, float]:
    """Seconds in which ``dd`` with fsync writes ``size`` bytes, rounded to whole blocks.

    "dd" writes through the page cache, "direct_dd" past it where the file system allows that.
    """
    block = 4 << 20
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-size // block)}"]
    seconds = {}
    for name, way in {"dd": [], "direct_dd": ["oflag=direct"]}.items():
        begin = time.perf_counter()
        done = subprocess.run([*command, "conv=fsync", *way], check=not way, capture_output=True)
        if done.returncode == 0:
            seconds[name] = time.perf_counter() - begin
        path.unlink(missing_ok=True)
    return seconds


if __name__ == "__main__":
    main()
