"""Hosts of the ranks, read from the endpoints (host:port) that the launcher set; free ports."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import random
import socket
from pathlib import Path

_LOOPBACK = "127.0.0.1"
_FIRST_PORT = 10_000
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def own_host() -> str:
    """Host at which other ranks reach this process (PADDLE_CURRENT_ENDPOINT)."""
    return _host(os.environ.get("PADDLE_CURRENT_ENDPOINT", "")) or _LOOPBACK


def hosts() -> list[str]:
    """Host of each rank, by rank (PADDLE_TRAINER_ENDPOINTS); empty without a launcher."""
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
    return [_host(each) for each in endpoints.split(",") if each]


def launched_machines() -> int:
    """Number of machines that the launcher was given (PADDLE_NNODES); 1 without a launcher."""
    return int(os.environ.get("PADDLE_NNODES", "1"))


def is_loopback(host: str) -> bool:
    """Whether ``host`` is a loopback address or "localhost": each machine reaches only itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_ports(count: int) -> list[int]:
    """``count`` ports of this machine at which nothing listens now.

    They are below the ephemeral ports if possible, because an outgoing connection could take an
    ephemeral port before a rank listens at it.
    """
    ports = range(_FIRST_PORT, _first_ephemeral_port())
    generator = random.SystemRandom()  # forked processes share the state of the usual one
    candidates = generator.sample(ports, min(len(ports), 8 * count))
    with contextlib.ExitStack() as stack:
        free: list[int] = []
        for port in itertools.chain(candidates, itertools.repeat(0)):  # 0: the system chooses
            each = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                each.bind(("", port))
                free.append(each.getsockname()[1])
            if len(free) == count:
                break
        return free


def _first_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL_PORTS.read_text().split()[0])
    except OSError:
        return 0


def _host(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]
