"""Reports what a process can tell of how it was started: run by test_forked.py."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from pypkg.device.threads import configure_cpu

if sys.argv[2:] == ["configure"]:
    configure_cpu(3)

import numpy as np
import paddle

from pypkg import _native


def openmp_threads() -> dict[str, int]:
    """Of each OpenMP library that Paddle loads, by its name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in lines}
    names = {Path(file).name.split(".so")[0]: file for file in files}
    return {n: ctypes.CDLL(names[n]).omp_get_max_threads() for n in ("libgomp", "libiomp5")}


x = paddle.ones([512, 512])
found = {
    "arguments": sys.argv[2:],
    "name": __name__,
    "folder": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
    "first_on_path": sys.path[0],
    "openmp_threads": openmp_threads(),
    "native_threads": _native.num_threads(),
    "product": (x @ x).sum().item(),
    "leads_group": os.getpgrp() == os.getpid(),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}
drawn = {"numpy": np.random.random(), "paddle": paddle.rand([1]).item()}
Path(sys.argv[1]).write_text(json.dumps({"same": found, "drawn": drawn}))
