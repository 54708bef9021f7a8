"""Python processes that start by a fork, in milliseconds, from a server that has imported Paddle.

A forked process is a process of its own: environment, folder, output files, process group, signals
and exit code are those of a started one. What it cannot show is what depends on the order of
imports, on variables that are read at import, or on how the interpreter takes its modules apart;
tests of these start real processes.

The server (`fork_server.py`) starts with the first use and ends, with all that it has forked, when
this process does. Messages are JSON. To the server: ``arguments``, ``environment`` and ``cwd``,
with the files of stdout and stderr as ancillary data. From it: ``{"started": pid}`` for each
request, and ``{"ended": pid, "code": exit code, or minus the number of a signal}``.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from pypkg.device.threads import cpu_environment

REPO = Path(__file__).resolve().parents[2]
_SERVER = Path(__file__).with_name("fork_server.py")
# Read when Paddle or the kernels are loaded, which the server has done.
_READ_AT_IMPORT = ("FLAGS_", "GLOG_", "MKL_DEBUG_CPU_TYPE", "PYPKG_CPU_ISA")


class Process:
    """A forked process, with the methods of subprocess.Popen that tests use."""

    def __init__(self, server: _Server, pid: int) -> None:
        self.pid = pid
        self._server = server

    @property
    def returncode(self) -> int | None:
        return self._server.codes.get(self.pid)

    def poll(self) -> int | None:
        self._server.receive(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            self._server.receive(left)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)


class _Server:
    def __init__(self) -> None:
        self.codes: dict[int, int] = {}  # of the processes that have ended
        self._started: list[int] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = {
            **os.environ,
            **cpu_environment(1),
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        self._folder = tempfile.TemporaryDirectory()
        preloaded = [_build_gloo_sockets(Path(self._folder.name)), os.environ.get("LD_PRELOAD")]
        preload = {"LD_PRELOAD": ":".join(filter(None, preloaded))}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(_SERVER), str(theirs.fileno())],
                env=self._environment | preload, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[object], environment: Mapping[str, str], cwd: Path,
        stdout: IO, stderr: IO,
    ) -> Process:  # fmt: skip
        for name in {**environment, **self._environment}:
            if name.startswith(_READ_AT_IMPORT):
                found, wanted = self._environment.get(name), environment.get(name)
                assert found == wanted, f"{name} is {found} at import; {wanted} needs a real start"
        request = {
            "arguments": [str(each) for each in arguments],
            "environment": dict(environment),
            "cwd": str(cwd),
        }
        files = [stdout.fileno(), stderr.fileno()]
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        while not self._started:
            self.receive(timeout=None)
        pid = self._started.pop()
        self.codes.pop(pid, None)  # of an earlier process with this number
        return Process(self, pid)

    def receive(self, timeout: float | None) -> None:
        """Waits for a message, then takes all that are there."""
        while select.select([self._socket], [], [], timeout)[0]:
            message = self._socket.recv(4096)
            if not message:
                raise RuntimeError(f"the fork server has ended: {self._process.wait()}")
            told = json.loads(message)
            if "started" in told:
                self._started.append(told["started"])
            else:
                self.codes[told["ended"]] = told["code"]
            timeout = 0

    def close(self) -> None:
        self._socket.close()
        self._process.wait()
        self._folder.cleanup()


def _build_gloo_sockets(folder: Path) -> str | None:
    """The compiled gloo_sockets.c; None without a compiler, where groups take seconds longer."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library, source = folder / "gloo_sockets.so", str(_SERVER.with_name("gloo_sockets.c"))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return str(library)


@cache
def _server() -> _Server:
    return _Server()


def start(
    arguments: Sequence[object],
    *,
    environment: Mapping[str, str],
    stdout: IO,
    stderr: IO,
    cwd: Path = REPO,
) -> Process:
    """Runs ``python *arguments`` (a script, or "-m" and a module) in a process group of its own.

    Raises:
        AssertionError: ``environment`` has another value than the server for a variable that is
            read at import.
    """
    return _server().start(arguments, environment, cwd, stdout, stderr)


def run(
    arguments: Sequence[object],
    *,
    environment: Mapping[str, str],
    timeout: float,
    cwd: Path = REPO,
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with captured text; no process of the group is left.

    Raises:
        subprocess.TimeoutExpired: after ``timeout`` seconds.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(arguments, environment=environment, stdout=stdout, stderr=stderr, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            kill_group(process)
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def kill_group(process: Process | subprocess.Popen) -> None:
    """Kills a process that leads a group, and what it has started; waits for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
