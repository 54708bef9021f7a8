"""Hosts of a test: network namespaces of this machine, joined by a bridge.

Each has one network interface and no way out. They share the machine's disks. Making them takes
root and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_SUBNET = "10.77.0"
_numbers = itertools.count()


def obstacle() -> str | None:
    """Why this process cannot make hosts; None if it can."""
    if shutil.which("ip") is None:
        return "there is no ip (iproute2) for network namespaces"
    probe = f"pypkg-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


@dataclass
class Host:
    """A host and its processes.

    Attributes:
        address: IPv4 address of its interface.
        namespace: name of its network namespace.
    """

    address: str
    namespace: str
    _bridge: str
    _port: str

    def start(
        self,
        command: Sequence[object],
        log: IO,
        environment: Mapping[str, str],
        mounts: Mapping[Path, Path],
        read_only: Sequence[Path] = (),
    ) -> subprocess.Popen:
        """Starts ``command`` here, with all output to ``log``.

        Args:
            mounts: a folder as this host sees it, and what is there in truth.
            read_only: folders that this host has mounted for reading alone.
        """
        mounted = [("bind", source, target) for target, source in mounts.items()]
        mounted += [("bind,ro", folder, folder) for folder in read_only]
        script = "".join(
            f"mount --options {options} {shlex.quote(str(source))} {shlex.quote(str(target))} && "
            for options, source, target in mounted
        )
        script += "exec " + shlex.join(map(str, command))
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "bash", "-c", script],
            env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def cut(self) -> None:
        """Pulls the cable: packets are lost, and no end of a connection is told."""
        _ip("-n", self._bridge, "link", "set", self._port, "down")

    def mend(self) -> None:
        _ip("-n", self._bridge, "link", "set", self._port, "up")

    def kill(self) -> None:
        """Ends all processes at once, after the cable: nobody hears of it, as of a power cut."""
        self.cut()
        self.kill_processes()

    def kill_processes(self) -> None:
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass

    def kill_ranks(self) -> None:
        """Ends the ranks that run here, and leaves their launcher."""
        for pid in self.processes():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"-m" not in words:  # the launcher's and the supervisor's
                os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Ids of the processes that run here."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]


@contextmanager
def network(size: int) -> Iterator[list[Host]]:
    """``size`` hosts that reach one another; with the context they and their processes end."""
    name = f"pypkg-{os.getpid()}-{next(_numbers)}"
    bridge = f"{name}-bridge"
    hosts: list[Host] = []
    try:
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge", "up")
        for number in range(1, size + 1):
            host = Host(f"{_SUBNET}.{number}", f"{name}-{number}", bridge, f"port{number}")
            _ip("netns", "add", host.namespace)
            hosts.append(host)
            inside = ("-n", host.namespace)
            _ip(
                *inside, "link", "add", "eth0", "type", "veth",
                "peer", "name", host._port, "netns", bridge,
            )  # fmt: skip
            _ip("-n", bridge, "link", "set", host._port, "master", "bridge", "up")
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill_processes()
            _ip("netns", "delete", host.namespace)
        subprocess.run(["ip", "netns", "delete", bridge], capture_output=True)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
