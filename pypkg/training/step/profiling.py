"""A window of steps through Paddle's profiler, as ``profiler_options`` asks for it.

Each rank leaves three files, which are named after it:

- ``rank0.trace.json``: a Chrome trace, for https://ui.perfetto.dev or chrome://tracing; the phases
  of a step are events of their own in it.
- ``rank0.operators.txt``: Paddle's tables of the operators and kernels.
- ``rank0.memory.jsonl``: memory at the end of each step of the window, in bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import paddle
from paddle import profiler

from pypkg.config.options.profiler_options import ProfilerOptions
from pypkg.errors import UserError
from pypkg.files import write_file
from pypkg.training.reporting.metrics import peak_memory_bytes

logger = logging.getLogger("pypkg")


class StepProfiler:
    """Records the steps of ``options`` on this rank.

    Profiling makes the steps of the window slower, so the speed in the log is lower there.

    Args:
        folder: folder for the results; it is created.
        rank: rank of this process.
    """

    def __init__(self, options: ProfilerOptions, folder: Path, rank: int) -> None:
        self._options, self._folder, self._name = options, folder, f"rank{rank}"
        self._steps = 0  # steps that this process has completed
        self._memory: list[dict[str, int]] = []
        self._profiler: profiler.Profiler | None = None
        self._start_if_due()

    def end_step(self, step: int) -> None:
        """Marks the end of step ``step`` of the run; writes the files after the last one.

        Raises:
            UserError: a file cannot be written.
        """
        self._steps += 1
        if self._profiler is not None:
            self._memory.append({"step": step, **memory_bytes()})
            self._profiler.step()
            if self._steps == self._options.stop:
                self._finish()
        else:
            self._start_if_due()

    def close(self) -> None:
        """Writes the files if the run ends within the window."""
        if self._profiler is not None:
            self._finish()

    def _start_if_due(self) -> None:
        if self._steps != self._options.first:
            return
        self._profiler = profiler.Profiler(
            targets=_targets(self._options.targets),
            record_shapes=self._options.record_shapes,
            on_trace_ready=lambda ended: ended.export(str(self._file("trace.json")), "json"),
        )
        self._profiler.start()

    def _finish(self) -> None:
        assert self._profiler is not None
        ended, self._profiler = self._profiler, None
        # Written first, because its error names a folder that cannot be written.
        lines = "".join(json.dumps(row) + "\n" for row in self._memory)
        write_file(self._file("memory.jsonl"), lines.encode())
        ended.stop()
        write_file(self._file("operators.txt"), self._tables(ended).encode())
        logger.info("profiled %d steps: %s", len(self._memory), self._file("trace.json"))

    def _file(self, suffix: str) -> Path:
        return self._folder / f"{self._name}.{suffix}"

    def _tables(self, ended: profiler.Profiler) -> str:
        """What ``summary`` prints."""
        text = io.StringIO()
        key = getattr(profiler.SortedKeys, _SORTED_KEYS[self._options.sorted_key])
        with contextlib.redirect_stdout(text):
            ended.summary(sorted_by=key, op_detail=True, thread_sep=False, time_unit="ms")
        return text.getvalue()


_SORTED_KEYS = {
    "total": "CPUTotal",
    "max": "CPUMax",
    "min": "CPUMin",
    "ave": "CPUAvg",
}


def _targets(name: str) -> list[Any]:
    cpu, gpu = profiler.ProfilerTarget.CPU, profiler.ProfilerTarget.GPU
    has_gpu = paddle.device.get_device().startswith("gpu")
    if name == "gpu" and not has_gpu:
        raise UserError(
            "profiler_options has state=GPU, but the run is on a CPU; leave state out, or set it "
            "to CPU"
        )
    return {"cpu": [cpu], "gpu": [gpu], "all": [cpu, gpu] if has_gpu else [cpu]}[name]


def memory_bytes() -> dict[str, int]:
    """Memory now and at its peak so far: of the GPU's allocator, or resident on a CPU."""
    if paddle.device.get_device().startswith("gpu"):
        cuda = paddle.device.cuda
        return {
            "allocated": cuda.memory_allocated(),
            "reserved": cuda.memory_reserved(),
            "peak": peak_memory_bytes(),
        }
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "peak": peak_memory_bytes()}
