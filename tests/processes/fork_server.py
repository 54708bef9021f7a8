"""A process that has imported Paddle and pypkg, and forks processes that run Python scripts.

Argument: the number of an open SOCK_SEQPACKET socket. `forked.py` starts this process and describes
the protocol. No operator runs here and no thread starts here, so a fork copies a complete process:
the child is the only thread that there ever was.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
from functools import partial
from typing import Any

import numpy as np

_PR_SET_PDEATHSIG = 1
_OPENMP_LIBRARIES = ("libgomp", "libiomp5")


def preload() -> list[str]:
    """Imports what the scripts import; returns the paths of the loaded OpenMP libraries."""
    from pypkg.device.threads import import_paddle

    import_paddle()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot  # a run draws its loss curve with it

    import pypkg.training.run  # noqa: F401

    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads run after the imports; forking needs one")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        files = {line.split()[-1] for line in maps}
    return sorted(f for f in files if os.path.basename(f).startswith(_OPENMP_LIBRARIES))


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Forks a child for each request; returns the request in the child.

    In the server itself it returns None when the other end of ``connection`` is closed. The
    children that still run are killed then.
    """
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)  # the wakeup pipe tells
    signal.set_wakeup_fd(wake_write)
    children: set[int] = set()
    while True:
        ready, _, _ = select.select([connection, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _report_ended(connection, children)
        if connection not in ready:
            continue
        message, files, _, _ = socket.recv_fds(connection, 2**20, 2)
        if not message:
            for child in children:
                os.killpg(child, signal.SIGKILL)
            return None
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, file in enumerate(files, start=1):
                os.dup2(file, number)
            for file in (*files, wake_read, wake_write):
                os.close(file)
            connection.close()
            return json.loads(message)
        os.setpgid(child, child)  # here too: a program that knows the child may signal its group
        children.add(child)
        for file in files:
            os.close(file)
        _send(connection, {"started": child})


def _report_ended(connection: socket.socket, children: set[int]) -> None:
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        children.remove(child)
        _send(connection, {"ended": child, "code": os.waitstatus_to_exitcode(status)})


def _send(connection: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the next receive says so
        connection.send(json.dumps(message).encode())


def become(request: dict[str, Any], server: int, openmp: list[str]) -> None:
    """Gives this child the environment, folder, path and seeds that a started process has."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os.kill(os.getpid(), signal.SIGKILL)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    random.seed()
    np.random.seed()

    import paddle

    from pypkg.device import threads
    from pypkg.training.reporting import metrics

    # Half of a short run's time would go into the speed of the processor, which no test looks at.
    metrics._measure_cpu_peak = partial(metrics._measure_cpu_peak, runs=2)
    paddle.seed(int.from_bytes(os.urandom(4), "little"))
    use_threads(openmp)
    configure = threads.configure_cpu

    def configure_cpu(num_threads: int = 0) -> str:
        """The package's own; the libraries are loaded, so they are told the result."""
        del sys.modules["paddle"]  # the package's own refuses to run after its import
        try:
            return configure(num_threads)
        finally:
            sys.modules["paddle"] = paddle
            use_threads(openmp)

    threads.configure_cpu = configure_cpu


def use_threads(openmp: list[str]) -> None:
    """Tells the loaded libraries what they would read from the environment when loaded.

    MKL is loaded by the first matrix product and reads the environment itself.
    """
    from pypkg import _native

    number = int(os.environ.get("OMP_NUM_THREADS") or 1)
    for path in openmp:
        ctypes.CDLL(path).omp_set_num_threads(number)
    _native.set_num_threads(int(os.environ.get("PYPKG_NUM_THREADS") or number))


def run(arguments: list[str]) -> None:
    """What ``python *arguments`` does: "-m MODULE ..." or "SCRIPT ..."."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


def exit_code(arguments: list[str]) -> int:
    """Runs the script and tells how the interpreter would end."""
    try:
        run(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def end_without_teardown(codes: list[int]) -> None:
    """The last function of atexit in a child: ends the process with ``codes[0]``.

    Else the interpreter would take every module apart, which copies the memory that the child
    shares with the server: 0.7 s. What follows in C, exit() and its functions, takes place.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.PyDLL(None).exit(codes[0])


def main() -> None:
    codes: list[int] = []
    atexit.register(end_without_teardown, codes)  # first of all, so that it runs last of all
    connection = socket.socket(fileno=int(sys.argv[1]))
    server, openmp = os.getpid(), preload()
    request = serve(connection)
    if request is not None:
        become(request, server, openmp)
        codes.append(exit_code(request["arguments"]))


if __name__ == "__main__":
    main()
